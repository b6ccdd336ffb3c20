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
from types import FrameType
from typing import Any, Self

from . import languages, verify
from .build import is_primfunc
from .call import Call, Use, raw, uses_lock
from .errors import KernelError, OpError, SelectorError, SwapRefused, SwapWarning
from .languages.base import Options, SourceError
from .languages.kernel import Shape
from .languages.source import Origin, decorated_again, definition, plain_function, redefined, written_in
from .listing import Text
from .op import Op, registry
from .select import Selector
from .table import Table
from .tensor import Tensor
from .trial import Failure, Trial, kind_of, kind_text

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

    def trial(self, text: str | None) -> Trial:
        """The kernel, right on the op's edge cases. Raises SwapRefused, or what the compiler says."""
        made = languages.make(
            self.language, self.op, self.origin, self.decorated, self.shape, self.dims, self.options
        )  # fmt: skip
        return Trial(made, verify.verify(self.op, made, self.where) if self.edge_cases else 0, text)

    def text(self) -> str | None:
        """What the kernel is written in, as it is now; None for what stands in no file."""
        if self.language in languages.TEXTS:
            return self.origin.read().text
        if self.origin.path is None or self.origin.function is None:
            return None
        return ast.unparse(definition(self.origin.function, self.origin.ordinal)[0])

    def again(self) -> Recipe:
        """The recipe with the function as its file has it now."""
        if is_primfunc(self.decorated) and self.origin.function is not None:
            return replace(self, decorated=decorated_again(self.origin.function, self.origin.ordinal))
        function = plain_function(self.decorated)
        if self.origin.function is None or self.language in languages.TEXTS or function is None:
            return self
        return replace(self, decorated=redefined(function, self.origin.ordinal))


class Swap(Use):
    """A hand-written kernel in use for an op; what `@op.swap(...)` gives. `hits` counts the calls it was meant for."""

    def __init__(self, recipe: Recipe, schedule: verify.Schedule, enabled: bool):
        self.recipe, self.schedule, self.enabled = recipe, schedule, enabled
        self._gone = ""  # why it is not in use any more
        self._reloading = threading.Lock()
        self._seen, self._looked = _modified(recipe.origin), time.monotonic()
        text: str | None = None  # of what cannot be found again, such as a lambda
        with contextlib.suppress(SourceError):
            text = recipe.text()
        self.trial = recipe.trial(text)
        self._before: Trial | None = None  # until a reloaded kernel has been right once
        super().__init__(recipe.op, self.trial.kernel, recipe.where)

    @property
    def name(self) -> str:
        return self.recipe.origin.entry

    @property
    def checked(self) -> int:
        """Calls that the kernel was compared with the reference in, edge cases included."""
        return self.trial.checked

    @property
    def state(self) -> str:
        """What it is doing, in a few words."""
        if self._gone or not self.enabled:
            return self._gone or "disabled"
        if kinds := [*self.trial.quarantined]:
            more = f" and {len(kinds) - 3} more" if len(kinds) > 3 else ""
            return f"quarantined for {', '.join(map(kind_text, kinds[:3]))}{more}"
        return "checking" if self.trial.calls < self.schedule.first else "in use"

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
        if self._gone:
            raise OpError(f"{self!r} was {self._gone}; put it in use again")
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
        if self.discard("removed") and not self.hits:
            raise SelectorError(f"{self!r} was removed, and had not been used: no call of {self.op.name} was meant")

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.remove()
        else:
            self.discard("removed")

    def discard(self, why: str) -> bool:
        """Out of use, whether it was used or not; `why` is what its state says then. Gives whether it was in use."""
        self._gone = self._gone or why
        return self._detach()

    def reload(self) -> bool:
        """Take the text as it is now, when it differs and is right; raises what is wrong with it, and the kernel from
        before stays in use. Gives whether the kernel is another one. What stands beside the kernel, such as the
        decorator's options, is as it was: run the file again."""
        with self._reloading:
            self._seen = _modified(self.recipe.origin)
            if self.trial.text is None or (text := self.recipe.text()) == self.trial.text:
                return False
            recipe = self.recipe.again()
            trial = recipe.trial(text)
            self._before = self.trial if self.trial.right or self.trial.checked else None
            self.recipe, self.trial, self.kernel = recipe, trial, trial.kernel
            return True

    def source(self, language: str | None = None) -> Text:
        """The kernel's own text, or what was made of it in another `language`: "asm", "ptx", "sass", "tvmscript"."""
        known = self.kernel.sources() or {self.recipe.language: self.trial.text or ""}
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
            self.hits += 1
        trial = self.trial
        failure = trial.launch(call, outputs, self.schedule)
        if failure is None:
            if trial.right and trial is self.trial:
                self._before = None
        elif failure.known:
            own(call, outputs)
        else:
            self._failed(trial, failure, call, outputs)

    def _failed(self, trial: Trial, failure: Failure, call: Call, outputs: tuple[Tensor, ...]) -> None:
        """Roll back a reload, refuse a kernel that was never right, or put it in quarantine for this kind of call."""
        if not trial.right:
            with self._reloading:
                before = self._before if trial is self.trial else self.trial
                if before is not None:
                    self.trial, self.kernel, self._before = before, before.kernel, None
            if before is None:
                self.discard("refused")
                text = f"{self.name} is wrong at its first call, and was removed: {failure.what}"
                raise SwapRefused(text) from failure.error
            self._warn(f"{self.name} was edited, and is wrong: the kernel from before is in use again: {failure.what}")
            if (again := before.launch(call, outputs, self.schedule)) is not None:
                self._failed(before, again, call, outputs)
            return
        own(call, outputs)  # its error, where the call itself is wrong, says nothing of the kernel
        trial.quarantined[kind_of(call)] = failure.what
        self._warn(f"{self.name} is wrong, and {self.op.name}'s own kernel computes such calls again: {failure.what}")

    def _warn(self, text: str) -> None:
        """Each time, and with the place of the kernel's own text."""
        place = self.recipe.origin.path or f"<{self.name}>"
        warnings.warn_explicit(text, SwapWarning, place, self.recipe.origin.where[1], registry={})

    def __repr__(self) -> str:
        of = f"{self.name} ({self.recipe.language}) of {self.op.name} where {self.where}"
        return f"<swap {of}: {self.state}, {self.hits} hits>"


def own(call: Call, outputs: tuple[Tensor, ...]) -> None:
    """What the op's own kernel gives."""
    plan = call._plan or call.op.plan(call.args, call.constants)
    plan.run(*raw(call.args), *[each.buffer.data for each in outputs])


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
    shape = Shape(grid, block, shared)
    options = Options(device, (flags,) if isinstance(flags, str) else tuple(flags), sandbox)

    def swap(decorated: Any) -> Swap:
        origin = (
            decorated if isinstance(decorated, Origin) else _origin(op, language, decorated, file, sys._getframe(1))
        )
        recipe = Recipe(
            op, language, origin, decorated, shape, dict(dims or {}), options, selector, edge_cases
        )  # fmt: skip
        return install(Swap(recipe, schedule, active))

    return swap


def _origin(op: Op, language: str, decorated: Any, file: str | Path | None, frame: FrameType) -> Origin:
    """Where the text of what was decorated, in a frame, stands. Raises SwapRefused for what holds none."""
    function = plain_function(decorated)
    name = getattr(decorated, "__name__", None) or op.name
    if is_primfunc(decorated):
        name = str(decorated.attrs["global_symbol"])
        function = written_in(frame, name)
    if language in languages.TEXTS and (function is None or not name.isidentifier()):
        given = getattr(decorated, "__name__", repr(decorated))
        raise SwapRefused(f"a kernel in {language} is called by the name of the function: use def, not {given}")
    return Origin.of(name, function, Path(file).absolute() if file is not None else None)


def install(swap: Swap) -> Swap:
    """Put a swap in use, last and so first to be asked. One of the same name for the same calls, from an earlier run
    of a cell or a file, goes."""
    op = swap.op
    with uses_lock:
        old = [
            use for use in op._uses
            if isinstance(use, Swap) and use.name == swap.name and use.where.same(swap.where)
        ]  # fmt: skip
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
        each.discard("removed")
    return listing


def reload() -> list[Swap]:
    """Reload all swaps; gives those whose kernel is another one now. Raises all that is wrong, when all were tried."""
    changed, wrong = [], []
    for each in installed():
        try:
            changed += [each] * each.reload()
        except (KernelError, OpError) as error:
            wrong.append(error)
    if len(wrong) == 1:
        raise wrong[0]
    if wrong:
        raise KernelError("\n".join(map(str, wrong)))
    return changed


_COLUMNS = ("name", "op", "language", "where", "state", "hits", "checked", "us a call")


def table(swaps: list[Swap]) -> Table:
    """Swaps as a table, the first to be asked at the top."""
    rows = [
        (
            each.name, each.op.name, each.kernel.label, repr(each.where),
            each.state, each.hits, each.checked, each.trial.microseconds,
        )
        for each in reversed(swaps)
    ]  # fmt: skip
    return Table("swaps, the first to be asked at the top", _COLUMNS, rows)


@atexit.register
def _tell_unused() -> None:
    """A swap that silently did nothing is what people complain about most."""
    for each in installed():
        if not each.hits and each.enabled:
            print(f"limpid: {each!r} was never used", file=sys.stderr)
