"""`limpid watch FILE`: a model stays loaded; at every save the kernels in FILE are verified, raced and put in use."""

from __future__ import annotations

import contextlib
import os
import runpy
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ops import KernelError, OpError, SwapWarning, swap

from .errors import UserError

_LOOK = 0.1  # seconds between looks at the files
_TOKENS = 24

Race = Callable[[Any], Any]  # a context manager for a selector, as debug.race


def watch(file: str, model: Any, prompt: str, race: Race, say: Callable[[str], None], once: bool = False) -> None:
    """Run FILE, whose swaps are then in use, and again whenever it, or a source file of its swaps, is saved.

    Each time it says how long it took until the kernels were verified, how they race on the model's own inputs, and
    whether the model still writes the same text. `race` is `debug.race`. Ends with Ctrl-C, or after one time.
    """
    if not os.path.isfile(file):
        raise UserError(f"{file}: no such file; watch takes a Python file with swaps, such as @ops.rms_norm.swap('c')")
    wanted = model.generate(prompt, max_tokens=_TOKENS)
    with _told_of_warnings(say):
        while True:
            seen = _modified(file)
            _run(file, model, prompt, wanted, race, say)
            if once:
                return
            say(f"watching {', '.join(sorted(_files(file)))}; Ctrl-C ends")
            while _modified(file) == seen:
                time.sleep(_LOOK)


def _run(file: str, model: Any, prompt: str, wanted: str, race: Race, say: Callable[[str], None]) -> None:
    """Run the file once and say how its kernels are; an error is said, and the kernels from before stay in use."""
    begin = time.perf_counter()
    old = swap.installed()
    before = {each.name for each in old}
    try:
        runpy.run_path(file, run_name="limpid.watched")
    except (KernelError, OpError) as error:
        say(str(error))
        return
    except Exception:  # the user's own file: where in it is what counts
        say(traceback.format_exc(limit=-1).strip())
        return
    ready = time.perf_counter() - begin
    for each in old:  # what the file does not hold any more
        each.discard("removed")
    swaps = swap.installed()
    if not swaps:
        say(f"{file} puts no kernel in use; decorate one with @ops.NAME.swap(...)")
        return
    new = ", ".join(each.name for each in swaps if each.name not in before) or "again"
    say(f"verified in {ready:.2f} s: {new}")
    try:
        text = model.generate(prompt, max_tokens=_TOKENS)
        with race(lambda call: any(each.applies(call) and each.op is call.op for each in swaps)) as races:
            model(model.tokenizer.encode(prompt))
    except (KernelError, OpError) as error:
        say(str(error))
        return
    for each in races:
        say(repr(each))
    say("the text is the same" if text == wanted else f"the text has CHANGED:\n{text}\ninstead of\n{wanted}")


def _files(file: str) -> set[str]:
    return {file, *(path for each in swap.installed() if (path := each.recipe.origin.path))}


def _modified(file: str) -> dict[str, int]:
    """When each file was written last; an editor that replaces one has it gone for a moment."""
    found = {}
    for path in _files(file):
        with contextlib.suppress(OSError):
            found[path] = Path(path).stat().st_mtime_ns
    return found


@contextlib.contextmanager
def _told_of_warnings(say: Callable[[str], None]) -> Iterator[None]:
    """A kernel put in quarantine is said here, and not with the line of a runtime file."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", SwapWarning)
        show = warnings.showwarning

        def shown(message: Any, category: type[Warning], *place: Any) -> None:
            say(str(message)) if issubclass(category, SwapWarning) else show(message, category, *place)

        warnings.showwarning = shown
        yield
