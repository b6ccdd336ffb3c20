"""Swaps: an op's kernel replaced by hand-written source while the program runs, checked against the op's reference.

    @ops.rms_norm.swap("c", where="layers.0-3.*", check="first 8, then 1/64")
    def block_norm():
        r'''
        void block_norm(const float* x, const float* weight, float* out, int rows, int width, float eps) { ... }
        '''

Parameters bind by name (`ops/languages/binding.py`). A new kernel is compared with the reference on the op's edge cases
at once, then on calls as they come; one that is wrong is refused. Later calls are sampled: a wrong one puts the swap in
quarantine for its shapes, and the op's own kernel computes again. An edited file or cell replaces the kernel in use,
when it is right.
"""

from __future__ import annotations

import ast
import atexit
import contextlib
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from . import languages, verify
from .call import Call, Kernel, Use, raw, uses_lock
from .errors import KernelError, OpError, SelectorError, SwapRefused, SwapWarning
from .languages.base import LaunchError, Options, SourceError
from .languages.kernel import Shape, SourceKernel
from .languages.source import Origin, definition, plain_function, redefined
from .listing import Text
from .op import Op, registry
from .select import Selector
from .table import Table
from .tensor import Tensor

_LOOK = 0.25  # seconds between looks at the file of a swap
_scoped: ContextVar[frozenset[int]] = ContextVar("limpid_swaps", default=frozenset())


@dataclass(frozen=True)
class Recipe:
    """What a swap's kernel is made from, again and again: see `Op.swap`."""

    op: Op
    language: str
    origin: Origin
    decorated: Any  # of a language whose kernels are functions
    shape: Shape
    dims: Mapping[str, Any]
    options: Options
    where: Selector
    edge_cases: bool

    def kernel(self) -> tuple[Kernel, int]:
        """The kernel, and on how many edge cases it was right. Raises SwapRefused, or what the compiler says."""
        made = languages.make(
            self.language, self.op, self.origin, self.decorated, self.shape, self.dims, self.options
        )  # fmt: skip
        return made, verify.verify(self.op, made, self.where) if self.edge_cases else 0

    def text(self) -> str | None:
        """What the kernel is written in, as it is now; None for what stands in no file."""
        if self.language in languages.TEXTS:
            return self.origin.read().text
        return ast.unparse(definition(self.origin.function)[0]) if self.origin.path and self.origin.function else None

    def again(self) -> Recipe:
        """The recipe with the function as its file has it now."""
        function = plain_function(self.decorated)
        if self.origin.function is None or self.language in languages.TEXTS or function is None:
            return self
        return replace(self, decorated=redefined(function))


class Swap(Use):
    """A hand-written kernel in use for an op; what `@op.swap(...)` gives. `hits` counts the calls it was meant for."""

    def __init__(self, recipe: Recipe, schedule: verify.Schedule, enabled: bool):
        self.recipe, self.schedule, self.enabled = recipe, schedule, enabled
        self.quarantined: dict[tuple, str] = {}  # why, by the specs of the call
        self.seconds, self.timed = 0.0, 0  # in the kernel, of calls that were not checked
        self._since = 0  # hits before the kernel that is in use now
        self._gone = ""  # why it is not in use any more
        self._reloading = threading.Lock()
        self._seen, self._looked = _modified(recipe.origin), time.monotonic()
        self._text: str | None = None  # of what cannot be found again, such as a lambda
        with contextlib.suppress(SourceError):
            self._text = recipe.text()
        kernel, self.checked = recipe.kernel()
        super().__init__(recipe.op, kernel, recipe.where)

    @property
    def name(self) -> str:
        return self.recipe.origin.entry

    @property
    def state(self) -> str:
        """What it is doing, in a few words."""
        if self._gone or not self.enabled:
            return self._gone or "disabled"
        if self.quarantined:
            return f"quarantined for {', '.join(map(_shapes, self.quarantined))}"
        return "checking" if self.hits - self._since < self.schedule.first else "in use"

    def applies(self, call: Call) -> bool:
        return (self.enabled or id(self) in _scoped.get()) and self.where.matches(call)

    def enable(self) -> None:
        """On again, in all threads."""
        self.enabled = True

    def disable(self) -> None:
        """Off, but for `with swap.active()`: the kernel from before computes."""
        self.enabled = False

    @contextlib.contextmanager
    def active(self) -> Iterator[Self]:
        """On inside the `with`, in this thread, also when it is disabled. That it is not hit there is an error."""
        before = self.hits
        token = _scoped.set(_scoped.get() | {id(self)})
        try:
            yield self
        finally:
            _scoped.reset(token)
        if self.hits == before:
            raise SelectorError(f"{self!r}: no call of {self.op.name} in this `with` was meant")

    def remove(self) -> None:
        """The kernel from before is back. Raises SelectorError when no call was ever meant; twice is harmless."""
        if self._leave("removed") and not self.hits:
            raise SelectorError(f"{self!r} was removed, and had not been used: no call of {self.op.name} was meant")

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.remove()
        else:
            self._leave("removed")

    def _leave(self, why: str) -> bool:
        with uses_lock:
            was = self in self.op._uses
            self.op._uses = tuple(use for use in self.op._uses if use is not self)
        self._gone = self._gone or why
        return was

    def reload(self) -> bool:
        """Take the text as it is now, when it differs and is right; raises what is wrong with it, and the kernel from
        before stays in use. Gives whether the kernel is another one."""
        with self._reloading:
            self._seen = _modified(self.recipe.origin)
            if self._text is None or (text := self.recipe.text()) == self._text:
                return False
            recipe = self.recipe.again()
            kernel, checked = recipe.kernel()
            self.recipe, self.kernel, self.checked, self._text = recipe, kernel, checked, text
            self.quarantined, self._since = {}, self.hits
            self.seconds, self.timed = 0.0, 0
            return True

    def source(self, language: str | None = None) -> Text:
        """The kernel's own text, or what was made of it in another `language`: "asm", "ptx", "sass", "tvmscript"."""
        known = self.kernel.sources() or {self.recipe.language: self._text or ""}
        wanted = self.recipe.language if language is None else language
        if wanted not in known:
            raise OpError(f"{self.name} has no source in {wanted!r}, it has {', '.join(map(repr, known))}")
        return Text(known[wanted], wanted)

    def _look(self) -> None:
        """Reload when the file has changed; a wrong text is told of once, and changes nothing."""
        now = time.monotonic()
        if now - self._looked < _LOOK:
            return
        self._looked = now
        seen = _modified(self.recipe.origin)
        if seen == self._seen:
            return
        self._seen = seen
        try:
            self.reload()
        except (KernelError, OpError) as error:
            self._warn(f"{self.name} was edited, and the kernel from before stays in use: {error}")

    def launch(self, call: Call, outputs: tuple[Tensor, ...]) -> None:
        self._look()
        with uses_lock:
            number = self.hits - self._since
            self.hits += 1
        if self.quarantined and _specs(call) in self.quarantined:
            own(call, outputs)
        elif self.schedule.means(number):
            self._launch_checked(call, outputs, number)
        else:
            begin = time.perf_counter()
            self.kernel.launch(call, outputs)
            self.seconds, self.timed = self.seconds + time.perf_counter() - begin, self.timed + 1

    def _launch_checked(self, call: Call, outputs: tuple[Tensor, ...], number: int) -> None:
        before = {name: each.numpy().copy() for name, each in call.written.items()}
        wrong: Any
        try:
            wrong = verify.checked(call, outputs, lambda: self.kernel.launch(call, outputs))
        except LaunchError as error:
            wrong = f"{verify.shown(call)}: {error}"
        self.checked += 1
        if wrong is None:
            if isinstance(self.kernel, SourceKernel) and number + 1 >= self.schedule.first:
                self.kernel.trusted = True
            return
        for name, each in call.written.items():
            np.copyto(each.numpy(), before[name])
        if number == 0:
            self._leave("refused")
            raise SwapRefused(f"{self.name} is wrong at its first call, and was removed: {wrong}")
        self.quarantined[_specs(call)] = str(wrong)
        self._warn(f"{self.name} is wrong, and {self.op.name}'s own kernel computes these shapes again: {wrong}")
        own(call, outputs)

    def _warn(self, text: str) -> None:
        warnings.warn(text, SwapWarning, stacklevel=2)

    def __repr__(self) -> str:
        of = f"{self.name} ({self.recipe.language}) of {self.op.name} where {self.where}"
        return f"<swap {of}: {self.state}, {self.hits} hits>"


def own(call: Call, outputs: tuple[Tensor, ...]) -> None:
    """What the op's own kernel gives."""
    plan = call._plan or call.op.plan(call.args, call.constants)
    plan.run(*raw(call.args), *[each.buffer.data for each in outputs])


def _specs(call: Call) -> tuple:
    return tuple(each.spec if isinstance(each, Tensor) else type(each) for each in call.args)


def _shapes(kind: tuple) -> str:
    return f"({', '.join(each.__name__ if isinstance(each, type) else str(each) for each in kind)})"


def _modified(origin: Origin) -> float | None:
    """When the file of the text was written last; None for what is in none."""
    try:
        return os.stat(origin.path).st_mtime_ns if origin.path else None
    except OSError:  # an editor is replacing it
        return None


def decorator(
    op: Op, language: str, *, where: Any = None, check: str = "first 8, then 1/64", edge_cases: bool = True,
    grid: Any = None, block: Any = None, shared: Any = 0, dims: Mapping[str, Any] | None = None,
    file: str | Path | None = None, device: str | None = None, flags: tuple[str, ...] = (), sandbox: bool = True,
    active: bool = True,
) -> Callable[[Any], Swap]:  # fmt: skip
    """See `Op.swap`."""
    languages.check_name(language)
    schedule, selector = verify.Schedule.of(check), Selector(where)
    shape, options = Shape(grid, block, shared), Options(device, tuple(flags), sandbox)

    def swap(decorated: Any) -> Swap:
        if isinstance(decorated, Origin):
            origin = decorated
        else:
            function = plain_function(decorated)
            name = getattr(decorated, "__name__", None) or op.name
            if language in languages.TEXTS and not name.isidentifier():
                raise SwapRefused(f"a kernel in {language} is called by the name of the function: use def, not {name}")
            origin = Origin(name, function, Path(file) if file is not None else None)
        recipe = Recipe(
            op, language, origin, decorated, shape, dict(dims or {}), options, selector, edge_cases
        )  # fmt: skip
        return install(Swap(recipe, schedule, active))

    return swap


def install(swap: Swap) -> Swap:
    """Put a swap in use, last and so first to be asked; one of the same name, from an earlier run of a cell, goes."""
    op = swap.op
    with uses_lock:
        old = [use for use in op._uses if isinstance(use, Swap) and use.name == swap.name]
        op._uses = (*[use for use in op._uses if use not in old], swap)
    for each in old:
        each._gone = "replaced"
    return swap


def installed() -> list[Swap]:
    """All swaps that are in use, of all ops."""
    return [use for op in registry.values() for use in op._uses if isinstance(use, Swap)]


def restore() -> Table:
    """Remove every swap of every op: the ops' own kernels are back. Gives the listing of what was removed."""
    found = installed()
    listing = table(found)
    for each in found:
        each._leave("removed")
    return listing


def reload() -> list[Swap]:
    """Reload all swaps; gives those whose kernel is another one now. Raises what is wrong with the first that is."""
    return [each for each in installed() if each.reload()]


_COLUMNS = ("name", "op", "language", "where", "state", "hits", "checked", "us a call")


def table(swaps: list[Swap]) -> Table:
    """Swaps as a table, the first to be asked at the top."""
    rows = [
        (
            each.name, each.op.name, each.recipe.language + (" emulated" if _emulated(each) else ""), repr(each.where),
            each.state, each.hits, each.checked, each.seconds / each.timed * 1e6 if each.timed else None,
        )
        for each in reversed(swaps)
    ]  # fmt: skip
    return Table("swaps, the first to be asked at the top", _COLUMNS, rows)


def _emulated(swap: Swap) -> bool:
    return getattr(swap.kernel, "emulated", False)


@atexit.register
def _tell_unused() -> None:
    """A swap that silently did nothing is what people complain about most."""
    for each in installed():
        if not each.hits and each.enabled:
            print(f"limpid: {each!r} was never used", file=sys.stderr)
