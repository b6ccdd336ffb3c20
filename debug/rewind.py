"""Going back in a pass: what its calls gave, what they overwrote, what was edited, and how it runs again from there.

Python cannot leave a frame and come back, so a pass that goes back runs its module again from the beginning. Calls
before the place it goes to are answered with what they gave; what calls overwrote has been put back. So the model's
code sees the same tensors, and the cache is what it was.
"""

from __future__ import annotations

import sys
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

import ops
from ops import Call, Selector, SelectorError, Spec, Tensor
from ops.call import tensors
from ops.scope import Scope
from ops.spec import DTYPES

from .record import to_bytes

LIMIT = 2 * 2**30  # bytes of outputs that a pass keeps; of those before, calls are computed again

__limpid_plumbing__ = True  # frames of this file pass calls on: the model's line is further out

Launch = Callable[[Call], Any]


class Key(NamedTuple):
    """Which call of a pass: its address, and how often a call was made there before."""

    address: str
    earlier: int


class Place(NamedTuple):
    """Where to stop: `before` the launch of a call, or `after` it, before it returns."""

    key: Key
    phase: str


class Rewind(BaseException):
    """Unwinds `run` to its beginning, to run again: from `target` on anew, up to the stop at `place`."""

    def __init__(self, run: Pass, target: Step, place: Place):
        super().__init__(f"rewind to {target.key.address}")
        self.run, self.target, self.place = run, target, place


class Step:
    """One call of a pass: the call (its tensors as specs), when it began and ended, and what it gave, where kept."""

    __slots__ = ("began", "call", "digest", "ended", "kept", "key", "output")

    def __init__(self, key: Key, call: Call, began: int):
        self.key, self.began = key, began
        self.ended: int | None = None
        self.call = call.replace(tuple(each.spec if isinstance(each, Tensor) else each for each in call.args))
        self.forget()

    def keep(self, output: Any) -> None:
        self.kept, self.output, self.digest = True, output, _digest(output)

    def forget(self) -> None:
        self.kept, self.output, self.digest = False, None, 0

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in tensors(self.output))


class Change(NamedTuple):
    """Elements of a tensor that were changed in place: which tensor, seen from the call, which elements, values."""

    kind: str  # "input", "output", or "result": the output of an earlier call
    which: Any
    elements: np.ndarray
    values: np.ndarray


class Edits:
    """What was edited at one place: arguments and output that were replaced, tensors that were changed in place."""

    def __init__(self) -> None:
        self.args: dict[str, Any] = {}
        self.constants: dict[str, Any] = {}
        self.output: Any = None
        self.changes: list[Change] = []

    def replace(self, args: dict[str, Any], constants: dict[str, Any]) -> None:
        """Other arguments; what was changed in the memory of those before is of no account any more."""
        self.args |= args
        self.constants |= constants
        self.changes = [each for each in self.changes if each.kind != "input" or each.which not in args]


class Pass:
    """One outermost forward, as far as it has come."""

    def __init__(self, whole: bool = True):
        self.whole = whole  # False: it was not seen from the beginning, and cannot run again
        self.steps: dict[Key, Step] = {}
        self.edits: dict[Place, Edits] = {}
        self.place: Place | None = None  # where the rewind that is under way stops
        self._overwritten: list[tuple[np.ndarray, Any, np.ndarray]] = []  # memory, which part of it, what was there
        self._earlier: Counter[str] = Counter()
        self._keeping: deque[Step] = deque()
        self._bytes, self._clock = 0, 0

    def run(self, scope: Scope, run: Callable[..., Any]) -> Any:
        """Run the module, again after each rewind, to its end."""
        while True:
            try:
                output = run(*scope.args, **scope.constants)
            except Rewind as rewind:
                if rewind.run is not self:
                    raise
                self._restore(rewind)
                continue
            if self.place is not None:
                print(f"rewind: this time the pass made no call {self.place.key.address} to stop at", file=sys.stderr)
            return output

    def begin(self, call: Call) -> tuple[Step, bool]:
        """The step of a call that begins, and whether it is one from before the place that a rewind goes to."""
        address = call.address
        key = Key(address, self._earlier[address])
        self._earlier[address] += 1
        step = self.steps.get(key)
        if step is not None:
            return step, True
        step = self.steps[key] = Step(key, call, self._tick())
        return step, False

    def end(self, step: Step, output: Any) -> None:
        """A call is about to return `output`."""
        step.ended = step.ended or self._tick()
        self._bytes -= step.nbytes
        if not step.kept:
            self._keeping.append(step)
        step.keep(output)
        self._bytes += step.nbytes
        while self._bytes > LIMIT:
            self._drop(self._keeping.popleft())

    def repeat(self, step: Step, call: Call, launch: Launch) -> Any:
        """What a call from before the rewind's place gives: what it gave. Only what it writes is written again."""
        call = self.edited(step.key, call)
        if step.kept and not call.op.writes:
            self.redo(Place(step.key, "after"), call, step.output)
            return step.output
        self.save(call)
        output = self.edited_output(step.key, call, launch(call))
        self.end(step, output)
        return output

    def edited(self, key: Key, call: Call) -> Call:
        """The call as the edits made before its launch have it."""
        edits = self.edits.get(Place(key, "before")) if self.edits else None
        if edits is None:
            return call
        if edits.args or edits.constants:
            call = call.replace(tuple((call.inputs | edits.args).values()), call.constants | edits.constants)
        self.redo(Place(key, "before"), call, None)
        return call

    def edited_output(self, key: Key, call: Call, output: Any) -> Any:
        """The output as the edits made after the launch have it."""
        edits = self.edits.get(Place(key, "after")) if self.edits else None
        if edits is None:
            return output
        if edits.output is not None:
            output = edits.output
        self.redo(Place(key, "after"), call, output)
        return output

    def redo(self, place: Place, call: Call, output: Any) -> None:
        """Change in place what was changed in place there before."""
        for change in self.edits[place].changes if place in self.edits else ():
            tensor = self._tensor(change, call, output)
            if tensor is not None:
                memory = _words(tensor)
                self._save(memory, change.elements)
                memory[change.elements] = change.values

    def watch(self, call: Call, output: Any) -> Watched:
        """The tensors that a prompt may change: inputs and output of the call, and results that somebody still has."""
        found: dict[tuple[str, Any], Tensor] = {
            ("input", name): each for name, each in call.inputs.items() if isinstance(each, Tensor)
        }
        found |= {("output", i): each for i, each in enumerate(tensors(output))}
        for step in self.steps.values():
            results = tuple(tensors(step.output))
            for i in range(len(results)):
                if sys.getrefcount(results[i]) > 3:  # others than the step, `results` and the question itself
                    found["result", (step.key, i)] = results[i]
        return Watched(found)

    def changed(self, watched: Watched) -> list[Change]:
        """What a prompt changed in place; what was there before is remembered."""
        found = []
        for tensor, before, change in watched.changes():
            self._overwritten.append((_words(tensor), change.elements, before))
            found.append(change)
        return found

    def save(self, call: Call) -> None:
        """Remember what the launch is about to overwrite."""
        for tensor in call.written.values() if call.op.writes else ():
            self._save(*_part(call, tensor))

    def mark(self) -> int:
        """What `undo` takes to come back to now."""
        return len(self._overwritten)

    def undo(self, mark: int = 0) -> None:
        """Put back what was overwritten since `mark`."""
        while len(self._overwritten) > mark:
            memory, part, before = self._overwritten.pop()
            memory[part] = before

    def retry(self, step: Step, mark: int) -> None:
        """Put back what a launched call has done since `mark`, to launch it again."""
        self.undo(mark)
        for key in [key for key, each in self.steps.items() if each.began > step.began]:  # made inside the call
            self._drop(self.steps.pop(key))
            self._earlier[key.address] -= 1

    def under_way(self, call: Call) -> Step | None:
        """The step of a call that has begun and not returned."""
        address = call.address
        return next((each for each in self.steps.values() if each.key.address == address and not each.ended), None)

    def first(self, where: str, until: Step | None) -> Step:
        """The first call so far that a selector means. Raises SelectorError with the nearest addresses."""
        selector, steps = Selector(where), list(self._until(until))
        found = next((step for step in steps if selector.matches(step.call)), None)
        if found is None:
            near = selector.nearest(step.key.address for step in steps) or [step.key.address for step in steps][-5:]
            raise SelectorError(f"{where}: no such call in this pass so far; nearest: {', '.join(near) or 'none'}")
        return found

    def previous(self, count: int, until: Step | None) -> Step:
        """The call `count` calls before. Raises SelectorError where there is none."""
        earlier = [step for step in self._until(until) if step is not until]
        if not 0 < count <= len(earlier):
            raise SelectorError(f"back {count}: this pass has {len(earlier)} calls before this one")
        return earlier[-count]

    def _until(self, step: Step | None) -> Iterator[Step]:
        return (each for each in self.steps.values() if step is None or each.began <= step.began)

    def _tensor(self, change: Change, call: Call, output: Any) -> Tensor | None:
        """The tensor that a change is of, in this run; None when it has become another one, or is not there."""
        if change.kind == "input":
            return call.inputs.get(change.which)
        key, i = change.which if change.kind == "result" else (None, change.which)
        step = self.steps.get(key) if key else None
        return dict(enumerate(tensors(step.output if step else output))).get(i)

    def _restore(self, rewind: Rewind) -> None:
        """Everything as it was when the pass began; of the calls, what came before the target is kept."""
        self.undo()
        target = rewind.target
        self.steps = {key: step for key, step in self.steps.items() if step.began < target.began}
        self._keeping = deque(step for step in self._keeping if step.key in self.steps and step.kept)
        self._bytes = sum(step.nbytes for step in self._keeping)
        for step in [*self._keeping]:
            # The target was made inside this call, or the model has changed in place what the call gave.
            if step.ended is None or step.ended > target.began or step.digest != _digest(step.output):
                self._keeping.remove(step)
                self._drop(step)
        self._earlier.clear()
        self.place = rewind.place

    def _drop(self, step: Step) -> None:
        self._bytes -= step.nbytes
        step.forget()

    def _save(self, memory: np.ndarray, part: Any) -> None:
        self._overwritten.append((memory, part, memory[part].copy()))

    def _tick(self) -> int:
        self._clock += 1
        return self._clock


class Watched:
    """Tensors, and copies of what is in them."""

    def __init__(self, found: dict[tuple[str, Any], Tensor]):
        self._found = [(*name, each, _words(each).copy()) for name, each in found.items()]

    def changes(self) -> Iterator[tuple[Tensor, np.ndarray, Change]]:
        """Each tensor that has changed since: the elements' values before, and the change."""
        for kind, which, tensor, before in self._found:
            now = _words(tensor)
            elements = np.flatnonzero(now != before)
            if elements.size:
                yield tensor, before[elements], Change(kind, which, elements, now[elements].copy())


def fitting(value: Any, spec: Spec, name: str) -> Tensor:
    """A copy of `value`, a tensor, an array or a number, as a tensor of `spec`. Raises ShapeError."""
    if isinstance(value, Tensor) and spec.format is not None and value.spec == spec:
        return value
    if spec.format is not None:
        raise ops.ShapeError(
            f"{name} is {spec}, a packed weight: another one takes its place, ops.tensor(array, dtype)"
        )
    array = np.asarray(value)
    try:
        array = np.broadcast_to(array, spec.shape)
    except ValueError:
        raise ops.ShapeError(f"{name} is {spec}; given shape {list(array.shape)}") from None
    return ops.tensor(np.array(array, DTYPES[spec.dtype], order="C"), device=spec.device)


def _words(tensor: Tensor) -> np.ndarray:
    """A tensor's memory as a flat array of unsigned integers, one an element; of a packed weight the bytes."""
    data = to_bytes(tensor)
    return data if tensor.spec.format is not None else data.view(f"u{DTYPES[tensor.dtype].itemsize}")


def _part(call: Call, tensor: Tensor) -> tuple[np.ndarray, Any]:
    """The memory of a written argument and what of it the call may change: of a cache the rows at its positions."""
    if call.op is not ops.cache_write or not tensor.size:
        return _words(tensor), slice(None)
    rows = np.unique(call.inputs["positions"].numpy())
    return _words(tensor).reshape(len(tensor), -1), rows[(rows >= 0) & (rows < len(tensor))]


def _digest(output: Any) -> int:
    digest = 0
    for each in tensors(output):
        digest = zlib.crc32(to_bytes(each).data, digest)
    return digest
