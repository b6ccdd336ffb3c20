"""Kernels against their definitions, on a model's real inputs, over many lengths of prompts and caches."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

import ops
from ops import Call, Tensor
from ops.call import tensors
from ops.difference import Difference, Expected, bound
from ops.spec import FLOATS, INTEGERS

from .alignment import Flow, Node
from .definitions import begin
from .findings import Found, at, launched, outermost
from .poison import poison

EDGES = (1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 130, 255, 256, 257)
FAR = (511, 512, 513, 1023, 1024, 1025)
MOST = 320  # tokens up to which every length is tried


class Sweep:
    """Runs a model over prompts and caches of many lengths and checks each call that is new. Raises Found."""

    def __init__(self, model: Any, ids: Sequence[int]):
        self.model, self.ids = model, ids
        self.checked = _Checked()
        self.seconds_a_token = 0.0

    def prepare(self) -> None:
        """Have the kernels ready: one for each range of lengths."""

        def run() -> None:
            for size in (1, 2, 17):
                cache = self.model.new_cache()
                self.model(self.ids[:size], cache)
                self.model(self.ids[:1], cache)

        ops.prepare(run, progress=False)

    def run(self, deadline: float) -> str:
        """Go on until `deadline` (of `time.monotonic`); tells what was looked into."""
        done: list[str] = []
        for name, sizes in self._tasks():
            if not self._affords(sum(sizes), deadline):
                continue
            if self._take(sizes, deadline):
                done.append(name)
        prompts = [int(each.split()[1]) for each in done if each.startswith("prompt")]
        others = [each for each in done if not each.startswith("prompt")]
        told = [f"{self.checked.count} calls", f"prompts of {_ranges(prompts) or 'no'} tokens", *others]
        return "; ".join(told)

    def _tasks(self) -> Iterator[tuple[str, list[int]]]:
        """Names and the sizes of the pieces that are fed: the lengths first at which kernels change, then all."""
        most = min(self.model.context, MOST, len(self.ids))
        edges = [each for each in EDGES if each < most]
        for length in edges:
            yield f"prompt {length}", [length, 1]
        yield f"caches of 0 to {most - 1} tokens", [1] * most
        yield f"pieces of 2 to 16 tokens to {most}", _cycle(range(2, 17), most)
        yield f"pieces of 17 to 66 tokens to {most}", _cycle((17, 33, 64, 18, 66, 31), most)
        for length in range(1, most + 1):
            if length not in edges:
                yield f"prompt {length}", [length]
        for length in FAR:
            if length < min(self.model.context, len(self.ids)):
                yield f"prompt {length}", [length, 1]

    def _affords(self, tokens: int, deadline: float) -> bool:
        return time.monotonic() + self.seconds_a_token * tokens < deadline

    def _take(self, sizes: Sequence[int], deadline: float) -> bool:
        """Feed the pieces; False when the time was up before the end."""
        started, done = time.monotonic(), 0
        cache = self.model.new_cache()
        with outermost(self.checked):
            for size in sizes:
                if time.monotonic() > deadline:
                    return False
                self.checked.situation = f"{size} token{'s' * (size > 1)}" + (f" after {done}" if done else "")
                self.model(self.ids[done : done + size], cache)
                done += size
        self.seconds_a_token = (time.monotonic() - started) / done
        return True


def _cycle(sizes: Sequence[int], total: int) -> list[int]:
    found: list[int] = []
    while sum(found) < total:
        found.append(min(sizes[len(found) % len(sizes)], total - sum(found)))
    return found


def _ranges(numbers: Sequence[int]) -> str:
    """Numbers as ranges: 1-3, 15, 16."""
    found: list[list[int]] = []
    for each in sorted(numbers):
        if found and each == found[-1][-1] + 1:
            found[-1] = [found[-1][0], each]
        else:
            found.append([each])
    return ", ".join("-".join(map(str, each)) for each in found)


class _Checked(ops.Interceptor):
    """Checks each call against its definition, once for the shapes and the integers that it is given.

    The output's memory and the rows of a cache that are not in use hold NaN before the launch: what a kernel leaves
    unwritten, or reads without right, shows.
    """

    def __init__(self) -> None:
        self.seen: set[tuple] = set()
        self.probed: set[str] = set()  # addresses
        self.count, self.situation = 0, ""

    def call(self, call: Call, launch: Callable[[Call], Any]) -> Any:
        key = (call.address, *map(_key, call.args))
        if key in self.seen:
            output = launched(call, launch, "kernel")
            floats = (each for each in tensors(output) if each.dtype in FLOATS)
            if not call.op.writes and not all(np.isfinite(each.numpy()).all() for each in floats):
                self._check_finite(call, output, Expected(call))
            return output
        self.seen.add(key)
        self.count += 1
        _spoil_unused_rows(call)
        try:
            wanted = Expected(call)
        except IndexError as error:
            raise Found(at(call, "model", f"its arguments are wrong: {error}, with {self.situation}")) from error
        poison(*call.outputs)
        read = {name: _bits(value) for name, value in call.inputs.items() if name not in call.op.writes}
        output = launched(call, launch, "kernel")
        for name, bits in read.items():
            if _bits(call.inputs[name]) != bits:
                text = (
                    f"{_kernel(call)} changes its input {name}, which {call.op.name} only reads, with {self.situation}"
                )
                raise Found(at(call, "kernel", text))
        self._judge(call, wanted, output)
        self._check_finite(call, output, wanted)
        if "eps" in call.constants and call.address not in self.probed:
            self._probe(call, launch)
        return output

    def _check_finite(self, call: Call, output: Any, wanted: Expected) -> None:
        """Until here everything was finite; -inf is what a mask is made of."""
        for name, tensor, right in wanted.pairs(output):
            values = tensor.numpy()
            if name in call.op.writes or tensor.dtype not in FLOATS:
                continue
            if (np.isinf(values) & np.isfinite(right)).any():
                text = f"its result, up to {np.abs(right).max():.6g}, is beyond the range of {tensor.dtype}"
            elif np.isnan(values).any() or np.isposinf(values).any():
                text = "NaN or infinity is born here, by its definition too"
            else:
                continue
            raise Found(at(call, "model", f"{text}, with {self.situation}"))

    def _probe(self, call: Call, launch: Callable[[Call], Any]) -> None:
        """An epsilon tells on small inputs only: the same call on such."""
        self.probed.add(call.address)
        first = call.args[0].numpy().astype("float32")
        size = float(np.sqrt(np.mean(first**2))) or 1.0
        small = ops.tensor(
            first * np.float32(np.sqrt(call.constants["eps"]) / size), call.args[0].dtype, call.args[0].device
        )
        changed = call.replace((small, *call.args[1:]))
        self._judge(changed, Expected(changed), launch(changed))

    def _judge(self, call: Call, wanted: Expected, output: Any) -> None:
        for (name, tensor, found), right in zip(wanted.differences(output), wanted.values, strict=True):
            if not found.error <= bound(tensor):
                raise Found(at(call, "kernel", self._described(call, name, tensor, found, right)))

    def _described(self, call: Call, name: str, tensor: Tensor, found: Difference, right: np.ndarray) -> str:
        text = (
            f"{_kernel(call)} differs from the definition of {call.op.name} in {name}, {found}, with {self.situation}"
        )
        with np.errstate(invalid="ignore"):
            values, right = tensor.numpy().astype("float64"), np.asarray(right, "float64")
        left = int(np.isnan(values).sum() - np.isnan(right).sum())
        if left > 0:
            text += f"; {left} elements are NaN: not written, or made of what the call has no right to read"
        return text


def _kernel(call: Call) -> str:
    use = call.op.used_for(call)
    return f"the kernel {use.kernel.name}, which is in use for it," if use else "its kernel"


def _bits(value: Any) -> Any:
    """What a tensor's memory holds."""
    return ctypes.string_at(begin(value), value.nbytes) if isinstance(value, Tensor) else value


def _key(value: Any) -> Any:
    """What a check depends on: shapes, dtypes, and integers, such as positions, by their values."""
    if not isinstance(value, Tensor):
        return value
    return (value.spec, value.numpy().tobytes()) if value.dtype in INTEGERS else value.spec


def _spoil_unused_rows(call: Call) -> None:
    """NaN in the rows of the keys and values that no position of the call reaches."""
    inputs = call.inputs
    positions = inputs.get("positions")
    if not {"q", "k", "v"} <= inputs.keys() or not isinstance(positions, Tensor) or not positions.size:
        return
    for name in ("k", "v"):
        inputs[name].numpy()[int(positions.numpy().max()) + 1 :] = np.nan


class Reads(ops.Interceptor):
    """Checks that each call reads what the call gave that made it. `nodes` tell which that is. Raises Found.

    Nothing is held, so memory is used again as it is without any tool.
    """

    def __init__(self, nodes: list[Node]):
        self.nodes = nodes
        self.given: list[np.ndarray | None] = []
        self.writers: list[tuple[int, int, str]] = []  # from where to where, and which call

    def call(self, call: Call, launch: Callable[[Call], Any]) -> Any:
        index = len(self.given)
        node = self.nodes[index] if index < len(self.nodes) else None
        if node is None or node.address != call.address:
            raise ops.OpError(f"{call.address}: the model runs differently each time")
        for name, value in call.inputs.items():
            if isinstance(value, Tensor) and name in node.makers:
                self._check(call, name, value, node.makers[name])
        self.given.append(None)
        output = launched(call, launch, "kernel")
        for each in (*tensors(output), *call.written.values()):
            self.writers.append((begin(each), begin(each) + each.nbytes, call.address))
        made = [*tensors(output)]
        self.given[index] = made[0].numpy().copy() if len(made) == 1 and not call.op.writes else None
        return output

    def _check(self, call: Call, name: str, value: Tensor, maker: int) -> None:
        right = self.given[maker]
        if right is None or right.size != value.size:
            return
        now = value.numpy().reshape(right.shape)
        if np.array_equal(now.view("uint8"), right.view("uint8")):
            return
        here = begin(value)
        writer = next((who for low, high, who in reversed(self.writers) if low <= here < high), "something")
        made = self.nodes[maker].address
        text = f"its input {name}, which {made} gave, was overwritten by {writer}: memory in use was given away"
        raise Found(at(call, "kernel", text))


def check_reads(model: Any, ids: Sequence[int]) -> str:
    """Check what calls read, in a prompt and in steps after it; tells what was looked into. Raises Found."""
    cache, done, count = model.new_cache(), 0, 0
    for size in (max(1, len(ids) - 3), 1, 1):
        piece = ids[done : done + size]
        if not piece:
            break
        flow = Flow()
        with outermost(flow):
            model(piece, cache.copy())
        reads = Reads(flow.nodes)
        nodes, flow = len(flow.nodes), None
        with outermost(reads):
            model(piece, cache)
        done, count = done + size, count + nodes
    return f"the inputs of {count} calls"
