"""The model's code against a reference, and against itself when the same work is cut in other pieces.

Every op is computed by its NumPy definition, so no kernel matters, on the reference's values and with its weights: the
first call whose result differs is called wrongly, or an op before it is missing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

import ops
from ops import Call, Tensor
from ops.call import as_tuple
from ops.difference import Difference, difference
from ops.tolerance import KERNEL

from .alignment import Alignment, Dry, Flow, Forced, Node
from .definitions import Definitions, begin
from .findings import Found, Kind, at, launched, outermost
from .values import Values, Weights

# What a definition in float64 may be from the reference, which rounds each of a call's steps to its own dtype.
BOUNDS = {"float64": 1e-5, "float32": 1e-5, "float16": 4e-3, "bfloat16": 3.2e-2}
_EQUAL = 1e-6  # constants, relative


class Step(NamedTuple):
    """What is done to a cache: `feed` tokens, for the `last` logits only, `keep` so many, or go on with a `copy`."""

    kind: str
    tokens: int = 0


def feed(*counts: int) -> list[Step]:
    return [Step("feed", each) for each in counts]


def cuts(tokens: int) -> Iterator[tuple[str, list[Step]]]:
    """Ways to cut a text of so many tokens, by name."""
    half, quarter = tokens // 2, tokens // 4
    for prompt in (half, 62) if tokens > 66 else (half,) if tokens > 8 else ():  # beyond 64 a cache grows
        yield f"a prompt of {prompt} tokens, then token by token", feed(prompt, *[1] * 4)
    yield "pieces of several lengths", feed(*_pieces(tokens, (5, 16, 1, 20, 3, 33, 2)))
    if tokens > 8:
        yield "a cache that was truncated", [*feed(half), Step("keep", quarter), *feed(1, 3, half - quarter)]
        yield "a cache that was copied", [*feed(quarter), Step("copy"), *feed(1, half - quarter)]
        yield "the last logits alone", [Step("last", half), Step("last", 1), Step("last", quarter)]
    yield "token by token", feed(*[1] * tokens)


def _pieces(tokens: int, sizes: Sequence[int]) -> Iterator[int]:
    done, i = 0, 0
    while done < tokens:
        size = min(sizes[i % len(sizes)], tokens - done)
        yield size
        done, i = done + size, i + 1


class Examination:
    """Compares forwards of a model with `values`, computed from `ids` in one forward. Raises Found."""

    def __init__(self, model: Any, ids: Sequence[int], values: Values, weights: Weights | None, kind: Kind):
        self.model, self.ids, self.values = model, ids, values
        self.kind: Kind = kind
        self.weights = _by_address(model, weights)

    def run(self, steps: Sequence[Step], deadline: float, note: str = "") -> int:
        """Take the steps; gives how many were done before `deadline` (of `time.monotonic`)."""
        definitions = Definitions(self.weights)
        cache, done = self.model.new_cache("float32"), 0
        for number, step in enumerate(steps):
            if time.monotonic() > deadline:
                return number
            if step.kind == "keep":
                cache.truncate(step.tokens)
                done = step.tokens
            elif step.kind == "copy":
                cache = cache.copy()
            else:
                where = f"{note}, at position {done}" if note and len(self.ids) > step.tokens else ""
                options = {"logits_to_keep": 1} if step.kind == "last" else {}
                self._forward(cache, definitions, done, done + step.tokens, where, options)
                done += step.tokens
        return len(steps)

    def _forward(
        self, cache: Any, definitions: Definitions, start: int, stop: int, where: str, options: dict[str, int]
    ) -> None:
        ids = self.ids[start:stop]
        flow = Flow()
        with outermost(flow, Dry()):
            self.model(ids, cache.copy(), **options)
        examined = _Examined(flow.nodes, Alignment(flow.nodes, self.values, start, stop), definitions, self.kind, where)
        with outermost(examined, definitions):
            self.model(ids, cache, **options)
        definitions.next_forward()


def _by_address(model: Any, weights: Weights | None) -> dict[int, np.ndarray]:
    """The reference's weights by the memory of ours that they stand in for."""
    found: dict[int, np.ndarray] = {}
    for name, weight in model.parameters() if weights is not None else ():
        wanted = weights.find(name, weight.shape) if weights is not None else None
        if wanted is not None and wanted.shape == weight.shape:
            found[begin(weight)] = np.asarray(wanted)
    return found


class _Examined(Forced):
    def __init__(self, nodes: list[Node], alignment: Alignment, definitions: Definitions, kind: Kind, where: str):
        super().__init__(nodes, alignment, definitions.array, definitions.put)
        self.definitions, self.where = definitions, where
        self.kind: Kind = kind
        self.unsure: set[int] = set()  # nodes that the reference has no value for

    def call(self, call: Call, launch: Callable[[Call], Any]) -> Any:
        return super().call(call, lambda changed: launched(call, lambda _: launch(changed), self.kind))

    def before(self, node: Node, call: Call) -> None:
        for name, value in call.inputs.items():
            if not isinstance(value, Tensor) or name not in node.takes:
                continue
            pair = self.alignment.input(node, name, self.definitions.array(value))
            if pair is not None and (found := self._beyond(call, *pair)) is not None:
                self._raise(call, self._wrong_input(node, name, found))

    def after(self, node: Node, call: Call, value: np.ndarray, wanted: list[np.ndarray]) -> None:
        if not wanted:
            self.unsure.add(node.index)
        for i, each in enumerate(wanted):
            if (found := self._beyond(call, value, each)) is None:
                continue
            if i and node.taken:
                continue  # the call is right, and what takes its output next will be seen to take another's
            if i:
                outer = node.gives[i].path or "the model"
                self._raise(call, f"it is the last op of {outer}, whose output is another: an op after it is missing")
            self._raise(call, self._wrong_output(node, call, found, each))
        self._check_constants(node, call)

    def _beyond(self, call: Call, value: np.ndarray, wanted: np.ndarray) -> Difference | None:
        rounded = KERNEL.get(str(call.constants.get("dtype")), 0.0)  # an op that is told a dtype rounds to it
        found = difference(value, wanted)
        return found if found.error > max(BOUNDS[self.alignment.values.dtype], rounded) else None

    def _raise(self, call: Call, message: str) -> None:
        raise Found(at(call, self.kind, message + (f" ({self.where})" if self.where else "")))

    def _wrong_input(self, node: Node, name: str, found: Difference) -> str:
        maker = self.nodes[node.makers[name]] if name in node.makers else None
        text = f"its input {name} is not what the reference has there, {found}"
        if maker is None:
            return text
        if maker.index in self.unsure:
            return f"{text}; {maker.address} ({maker.source}) made it, for which the reference has no value of its own"
        return f"{text}, though {maker.address} gave what it should: an op between is missing, or it takes another's"

    def _wrong_output(self, node: Node, call: Call, found: Difference, wanted: np.ndarray) -> str:
        text = f"on the reference's inputs its result is not the reference's, {found}"
        for reason, args, constants in self._variants(node, call):
            with np.errstate(all="ignore"):
                try:
                    results = as_tuple(call.op.reference(*args, **constants))
                except (ValueError, IndexError, ops.OpError):
                    continue  # no call that could have been meant
            result = np.asarray(results[0])
            if call.op.writes:
                result = result[: len(wanted)]
            if result.size == wanted.size and self._beyond(call, result.reshape(wanted.shape), wanted) is None:
                return f"{text}; it would be {reason}"
        unsure = [self.nodes[i] for i in node.makers.values() if i in self.unsure]
        if unsure:
            text += f"; or {unsure[0].address} ({unsure[0].source}), for which the reference has no value, is wrong"
        return text

    def _theirs(self, node: Node) -> dict[str, Any]:
        """The constants that the reference's call has, as far as it tells."""
        twin = self.alignment.twins.get(node.index)
        return twin.constants if twin else self.alignment.values.constants.get((node.path, node.op_name), {})

    def _variants(self, node: Node, call: Call) -> Iterator[tuple[str, list, dict[str, Any]]]:
        """Other calls that may have been meant: a reason, arguments and constants."""
        given = {n: self.definitions.array(x) if isinstance(x, Tensor) else x for n, x in call.inputs.items()}
        for name, value in self._theirs(node).items():
            if name in call.constants and not _same(call.constants[name], value):
                reason = f"with {name}={value!r}, as the reference has it, instead of {call.constants[name]!r}"
                yield reason, [*given.values()], call.constants | {name: value}
        for name, value in call.constants.items():
            if isinstance(value, bool):
                yield f"with {name}={not value}", [*given.values()], call.constants | {name: not value}
        if isinstance(positions := given.get("positions"), np.ndarray):
            right = np.arange(self.alignment.start, self.alignment.stop, dtype=positions.dtype)
            if not np.array_equal(positions, right):
                reason = f"with the positions {_few(right)} instead of {_few(positions)}"
                yield reason, [*(given | {"positions": right}).values()], call.constants
        if "frequencies" in given:
            for frequencies, factor in self.alignment.values.rotary:
                changed = given | {"frequencies": frequencies.reshape(-1)}
                reason = f"with the reference's frequencies {_few(frequencies)} times {factor:.6g} instead of "
                reason += f"{_few(given['frequencies'])} times {call.constants.get('scale', 1.0):.6g}"
                yield reason, [*changed.values()], call.constants | {"scale": factor}
        arrays = [name for name, each in given.items() if isinstance(each, np.ndarray)]
        for a, b in [(a, b) for i, a in enumerate(arrays) for b in arrays[i + 1 :]]:
            if given[a].shape == given[b].shape:
                yield f"with {a} and {b} swapped", [*(given | {a: given[b], b: given[a]}).values()], call.constants

    def _check_constants(self, node: Node, call: Call) -> None:
        """What the values of this text may not tell, such as a window that it does not fill."""
        for name, theirs in self._theirs(node).items():
            ours = call.constants.get(name, theirs)
            if name == "dtype" or _same(ours, theirs) or (name == "window" and _unfilled(ours, theirs)):
                continue
            self._raise(call, f"its {name} is {ours!r}, the reference has {theirs!r}")


def _same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, float) or isinstance(theirs, float):
        numbers = all(isinstance(each, (int, float)) for each in (ours, theirs))
        return numbers and abs(ours - theirs) <= _EQUAL * max(abs(ours), abs(theirs))
    return ours == theirs


def _unfilled(ours: Any, theirs: Any) -> bool:
    """A window that one side does not have: a model may leave one out that its context never fills."""
    return (ours is None) != (theirs is None)


def _few(values: np.ndarray) -> str:
    shown = ", ".join(f"{each:.4g}" for each in values.reshape(-1)[:4].tolist())
    return f"[{shown}{', ...' if values.size > 4 else ''}]"
