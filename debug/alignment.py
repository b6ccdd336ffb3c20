"""Alignment: which values of a reference a call's inputs and outputs should be, by module names and the flow of data.

A first run follows every tensor from the call that makes it to the calls and modules that take it (`Flow`). A call's
output is then what the reference has for the module that gives it; else for the call of the same place, where both runs
make the same ops; else for the module, or the attention, that takes it. So a model is aligned with one that is cut into
other modules or other ops, such as one in transformers, which tells only what its modules take and give.
"""

from __future__ import annotations

from collections.abc import Callable
from difflib import SequenceMatcher
from typing import Any, NamedTuple

import numpy as np

import ops
from ops import Call, Tensor
from ops.call import tensors
from ops.scope import Scope

from .definitions import begin
from .findings import Found, at
from .values import CallValues, Values

# The slots that an op's inputs are, and that its output is. The steps of attention lie one module deeper.
_INPUTS = {"attention": {"q": "q", "k": "k", "v": "v"}, "scores": {"q": "q", "k": "k"}, "mix": {"v": "v"}}
_OUTPUTS = {"attention": "mixed", "mix": "mixed"}
_ANOTHER = 1e3  # how much nearer a value is to be to another alternative than the first
_WRITTEN = ("k", "v")  # what is written to a buffer that attention reads is one of these


class Place(NamedTuple):
    """A value's place: a module's path, a slot, and which time the module runs in the forward."""

    path: str
    slot: str
    time: int = 0


class Node:
    """One call in the flow of a forward.

    `makers` are the nodes that make its inputs, by argument; `gives` are the places that its output is; `taken` those
    that it goes to; `takes` the places that its inputs are. Of several places one must fit, the first most likely.
    """

    def __init__(self, call: Call, index: int, source: str):
        self.index, self.address, self.path, self.op_name = index, call.address, call.path, call.op.name
        self.source, self.writes = source, bool(call.op.writes)
        self.makers: dict[str, int] = {}
        self.gives: list[Place] = []
        self.taken: list[tuple[Place, ...]] = []
        self.takes: dict[str, tuple[Place, ...]] = {}
        self.constants = call.constants
        self.results: list[np.ndarray] = []


def root(tensor: Tensor) -> Tensor:
    """The tensor that a view is a view of, through all views."""
    while isinstance(tensor.owner, Tensor):
        tensor = tensor.owner
    return tensor


class Flow(ops.Interceptor):
    """Follows one forward. `array(tensor)` gives a tensor's values, where results are to be kept."""

    def __init__(self, array: Callable[[Tensor], np.ndarray] | None = None):
        self.nodes: list[Node] = []
        self.slots: dict[Place, np.ndarray] = {}
        self._array = array
        self._makers: dict[int, tuple[Tensor, int]] = {}  # by where memory begins, which is held
        self._times: dict[str, int] = {}
        self._running: dict[int, tuple[Place, Tensor | None]] = {}  # by the identity of a scope: its input

    def call(self, call: Call, launch: Callable[[Call], Any]) -> Any:
        node = Node(call, len(self.nodes), call.source)
        self.nodes.append(node)
        self._look_at_inputs(node, call)
        output = launch(call)
        self._check_memory(call, output)
        for each in (*tensors(output), *call.written.values()):
            self._makers[begin(each)] = each, node.index
            if self._array:
                node.results.append(np.array(self._array(each), copy=True))
        if node.op_name in _OUTPUTS:
            node.gives.append(Place(_attention(node), _OUTPUTS[node.op_name]))
            self._keep(node.gives[-1], next(tensors(output)))
        return output

    def scope(self, scope: Scope, run: Callable[..., Any]) -> Any:
        path = scope.path
        time = self._times[path] = self._times.get(path, -1) + 1
        given = next(tensors(scope.args), None)
        place = Place(path, "input", time)
        if given is not None:
            self._keep(place, given)
            if (maker := self._maker(given)) is not None:
                self.nodes[maker].taken.append((place,))
        self._running[id(scope)] = place, given
        output = run(*scope.args, **scope.constants)
        del self._running[id(scope)]
        if (given := next(tensors(output), None)) is not None:
            place = Place(path, "output", time)
            self._keep(place, given)
            if (maker := self._maker(given)) is not None:
                self.nodes[maker].gives.append(place)
        return output

    def _check_memory(self, call: Call, output: Any) -> None:
        """All results are held here: an output in the memory of one was given what is in use. Raises Found."""
        for each in tensors(output):
            held, index = self._makers.get(begin(each), (each, 0))
            if held is not each and each.size:
                text = f"its output is in the memory of what {self.nodes[index].address} gave, which is still in use"
                raise Found(at(call, "kernel", text))

    def _look_at_inputs(self, node: Node, call: Call) -> None:
        place, given = self._running.get(id(call.scope), (None, None))
        slots = _INPUTS.get(node.op_name, {})
        for name, value in call.inputs.items():
            if not isinstance(value, Tensor):
                continue
            maker = self._maker(value)
            if maker is not None:
                node.makers[name] = maker
            if name in slots:
                node.takes[name] = (Place(_attention(node), slots[name]),)
                self._keep_slot(node.takes[name][0], value, call)
            elif place is not None and given is not None and root(given) is root(value) and given.size == value.size:
                node.takes[name] = (place,)
        if "q" in node.takes and "q" in node.makers:
            self.nodes[node.makers["q"]].taken.append(node.takes["q"])
        for name in ("k", "v"):
            if name in node.takes and name in node.makers:
                self._is_cache(self.nodes[node.makers[name]], _attention(node), name)

    def _is_cache(self, writer: Node, path: str, slot: str) -> None:
        """`writer` puts keys or values where the attention of `path` reads them."""
        places = tuple(Place(path, each) for each in sorted(_WRITTEN, key=lambda each: each != slot))
        if not writer.writes or "x" in writer.takes:
            return
        writer.takes["x"] = places
        writer.taken.append(places)
        if "x" in writer.makers:
            self.nodes[writer.makers["x"]].taken.append(places)

    def _maker(self, tensor: Tensor) -> int | None:
        found = self._makers.get(begin(tensor)) or self._makers.get(begin(root(tensor)))
        return None if found is None else found[1]

    def _keep(self, place: Place, tensor: Tensor) -> None:
        if self._array:
            self.slots[place] = np.array(self._array(tensor), copy=True)

    def _keep_slot(self, place: Place, tensor: Tensor, call: Call) -> None:
        """Of a cache's buffer the rows that are in use."""
        if self._array:
            positions = call.inputs.get("positions")
            stop = int(positions.numpy().max()) + 1 if positions is not None and place.slot in _WRITTEN else None
            self.slots[place] = np.array(self._array(tensor)[:stop], copy=True)

    def values(self, tokens: int, dtype: str) -> Values:
        """What the run gave, for `tokens` tokens computed in `dtype`."""
        found = Values(tokens, dtype)
        for place, value in self.slots.items():
            found.add(place.path, place.slot, value)
        for node in self.nodes:
            found.calls.setdefault(node.path, []).append(CallValues(node.op_name, node.constants, node.results))
        return found


def _attention(node: Node) -> str:
    """The path of the module that makes a call of attention, or of one of its steps."""
    return node.path.removesuffix(".attention")


class Dry(ops.Interceptor):
    """Supplies zeros instead of launching, for a forward of which only the flow is wanted."""

    def call(self, call: Call, launch: Callable[[Call], Any]) -> Any:
        outputs = tuple(ops.zeros(spec) for spec in call.outputs)
        return outputs[0] if len(outputs) == 1 else outputs or None


class Alignment:
    """A forward's flow beside a reference's values, of which the forward has the tokens `start` to `stop`."""

    def __init__(self, nodes: list[Node], values: Values, start: int, stop: int):
        self.values, self.start, self.stop = values, start, stop
        self.twins = _twins(nodes, values)

    def given(self, node: Node, shape: tuple[int, ...]) -> list[np.ndarray]:
        """What the node's output should be, by what gives it: by every module that does, else by its twin call."""
        found = [self._at(place, shape) for place in node.gives]
        result = [each for each in found if each is not None]
        if not result and (twin := self.twins.get(node.index)) is not None and len(twin.outputs) == 1:
            value = _fitted(self.values.rows(twin.outputs[0], "output", self.start, self.stop), shape)
            result = [] if value is None else [value]
        return result

    def taken(self, node: Node, value: np.ndarray) -> np.ndarray | None:
        """What the node's output should be, by what takes it first."""
        for places in node.taken:
            if (found := self._nearest(places, value)) is not None:
                return found
        return None

    def input(self, node: Node, name: str, value: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """An input and what it should be; of a cache's buffer the rows in use."""
        places = node.takes.get(name, ())
        if not node.writes and any(place.slot in _WRITTEN for place in places):
            value = value[: self.stop]
        wanted = self._nearest(places, value)
        return None if wanted is None else (value, wanted)

    def cached(self, node: Node, value: np.ndarray) -> np.ndarray | None:
        """What the rows in use of a buffer should be that the node has written to."""
        return self._nearest(node.takes.get("x", ()), value[: self.stop])

    def _nearest(self, places: tuple[Place, ...], value: np.ndarray) -> np.ndarray | None:
        found = [each for place in places if (each := self._at(place, value.shape)) is not None]
        if len(found) < 2:
            return found[0] if found else None
        with np.errstate(all="ignore"):  # another is meant when the value is that: then what reads it is wrong
            return min(found, key=lambda each: _distance(value, each) * (1 if each is found[0] else _ANOTHER))

    def _at(self, place: Place, shape: tuple[int, ...]) -> np.ndarray | None:
        value = self.values.get(place.path, place.slot, place.time, shape[-1]) if shape else None
        if value is None:
            return None
        value = self.values.rows(value, place.slot, self.start, self.stop)
        return _fitted(value, shape)


def _fitted(value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    """A value in the shape that is asked for, or its last rows, such as a cache's new ones; None if it has no such."""
    if value.ndim and shape and 0 < shape[0] < len(value):
        value = value[len(value) - shape[0] :]
    return value.reshape(shape) if value.size == int(np.prod(shape)) else None


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    off = float(np.abs(a - b).max()) if a.size else 0.0
    return off if np.isfinite(off) else np.inf


def _twins(nodes: list[Node], values: Values) -> dict[int, CallValues]:
    """Calls of the reference by the index of ours: in each module, those that stand in the same order."""
    found: dict[int, CallValues] = {}
    ours: dict[str, list[Node]] = {}
    for node in nodes:
        ours.setdefault(node.path, []).append(node)
    for path, mine in ours.items():
        theirs = values.calls.get(path, [])
        names = [node.op_name for node in mine], [each.op_name for each in theirs]
        for block in SequenceMatcher(None, *names, autojunk=False).get_matching_blocks():
            found |= {mine[block.a + i].index: theirs[block.b + i] for i in range(block.size)}
    return found


class Forced(ops.Interceptor):
    """Runs a forward on a reference's values: what a call gives is looked at, then becomes what the reference has.

    So each call's inputs are the reference's, as far as it has them, and what differs is the call's own doing.
    `array(tensor)` reads values and `put(tensor, values)` sets them; `before(node, call)` and
    `after(node, call, value, wanted)` are for the tools that are made of this.
    """

    def __init__(self, nodes: list[Node], alignment: Alignment, array: Callable[[Tensor], np.ndarray], put: Callable):
        self.nodes, self.alignment, self.array, self.put = nodes, alignment, array, put
        self._at = 0

    def before(self, node: Node, call: Call) -> None:
        """Called before the launch, with the inputs as they will be taken."""

    def after(self, node: Node, call: Call, value: np.ndarray, wanted: list[np.ndarray]) -> None:
        """Called after it, with what came out and what the reference has in its place; an empty list for nothing."""

    def call(self, call: Call, launch: Callable[[Call], Any]) -> Any:
        node = self.nodes[self._at] if self._at < len(self.nodes) else None
        if node is None or node.address != call.address:
            expected = node.address if node else "no call"
            raise ops.OpError(f"{call.address} where a first run made {expected}: the model runs differently each time")
        self._at += 1
        self.before(node, call)
        output = launch(call)
        given = [*tensors(output)]
        if len(given) == 1:
            value = self.array(given[0])
            taken = None if (wanted := self.alignment.given(node, value.shape)) else self.alignment.taken(node, value)
            wanted = wanted if taken is None else [taken]
            self.after(node, call, value, wanted)
            if wanted:
                self.put(given[0], wanted[0])
        for buffer in call.written.values():
            self._cached(node, call, buffer)
        return output

    def _cached(self, node: Node, call: Call, buffer: Tensor) -> None:
        value = np.array(self.array(buffer), copy=True)
        wanted = self.alignment.cached(node, value)
        self.after(node, call, value[: self.alignment.stop], [] if wanted is None else [wanted])
        if wanted is not None:
            value[: len(wanted)] = wanted
            self.put(buffer, value)
