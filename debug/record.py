"""Record: what is remembered of one call. Held: a tensor that is kept, in memory or in a file."""

from __future__ import annotations

import tempfile
from collections import deque
from typing import Any, NamedTuple

import numpy as np

import ops
from ops import Call, Spec, Tensor
from ops.display import Statistics
from ops.op import registry
from ops.spec import DTYPES

from .statistics import Moments


class Held:
    """A kept tensor: the tensor itself, a copy of it, or where its bytes are in a file."""

    __slots__ = ("_offset", "_spill", "_tensor", "spec")

    def __init__(self, tensor: Tensor):
        self.spec = tensor.spec
        self._tensor: Tensor | None = tensor
        self._spill: _Spill | None = None
        self._offset = 0

    @property
    def tensor(self) -> Tensor:
        """The tensor, read from its file where it was spilled."""
        if self._tensor is not None:
            return self._tensor
        assert self._spill is not None
        return from_bytes(self._spill.read(self._offset, self.spec.nbytes), self.spec)

    @property
    def referred(self) -> Tensor | None:
        """The tensor when it is in memory."""
        return self._tensor

    def copy(self) -> None:
        """Hold a copy from now on: the tensor's memory is about to change."""
        if self._tensor is not None:
            self._tensor = from_bytes(to_bytes(self._tensor).copy(), self.spec)

    def spill(self, spill: _Spill) -> None:
        """Hold the bytes in a file from now on."""
        if self._tensor is not None:
            self._offset = spill.write(to_bytes(self._tensor))
            self._spill, self._tensor = spill, None


class _Spill:
    """A temporary file for tensors; it is gone with the last one who holds it."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="limpid-trace-")  # noqa: SIM115 - open as long as this lives

    def write(self, data: np.ndarray) -> int:
        """Append bytes; gives where they begin."""
        offset = self._file.seek(0, 2)
        self._file.write(data.data)
        return offset

    def read(self, offset: int, count: int) -> np.ndarray:
        """uint8 [count]."""
        self._file.seek(offset)
        return np.frombuffer(bytearray(self._file.read(count)), "uint8")

    def __del__(self) -> None:
        self._file.close()


def to_bytes(tensor: Tensor) -> np.ndarray:
    """A tensor's memory as uint8 [nbytes]; of a packed weight its records."""
    if tensor.spec.format is not None:
        return np.from_dlpack(tensor.buffer.data)
    return tensor.numpy().reshape(-1).view("uint8")


def from_bytes(data: np.ndarray, spec: Spec) -> Tensor:
    """The tensor of `spec` over uint8 [nbytes]."""
    if spec.format is not None:
        return ops.tensor_from_packed(data, spec)
    return ops.tensor(data.view(DTYPES[spec.dtype]).reshape(spec.shape), device=spec.device)


class Where(NamedTuple):
    """The part of a scope that a selector asks for: the number of the pass."""

    number: int


class Record:
    """One call: where it was made, with what, what it gave, and how long it took.

    `inputs` and `constants` by name, a tensor as its Spec; `outputs` are Specs. `seconds` is None when the call did not
    return. `output`, `input(name)` and `written(name)` give the tensors where they were kept.
    """

    __slots__ = (
        "constants", "held", "inputs", "kernel", "moments", "number", "op_name", "ordinal", "outputs", "path",
        "seconds", "source",
    )  # fmt: skip

    def __init__(self, call: Call, source: str):
        use = call.op.used_for(call)
        self.path, self.op_name, self.ordinal, self.number = call.path, call.op.name, call.ordinal, call.scope.number
        self.inputs: dict[str, Any] = {
            name: value.spec if type(value) is Tensor else value
            for name, value in zip(call.op.parameters, call.args, strict=False)
        }
        self.constants = call.constants
        self.outputs: tuple[Spec, ...] = call.outputs
        self.source = source
        self.kernel = use.kernel.name if use else "tvm"
        self.seconds: float | None = None
        self.moments: list[Moments | Statistics | None] = []
        self.held: dict[str, Held] = {}

    @property
    def address(self) -> str:
        """Where in the model: `path/op[ordinal]`."""
        return f"{self.path}/{self.op_name}[{self.ordinal}]"

    @property
    def full_address(self) -> str:
        """The address and the pass: `path/op[ordinal]@pass`."""
        return f"{self.address}@{self.number}"

    # What a selector asks of a call.

    @property
    def op(self) -> Any:
        """The op; when this process has none of that name, something that has its name."""
        return registry.get(self.op_name) or _Named(self.op_name)

    @property
    def scope(self) -> Where:
        return Where(self.number)

    @property
    def args(self) -> tuple:
        """The run-time arguments, a tensor as its Spec."""
        return tuple(self.inputs.values())

    @property
    def statistics(self) -> tuple[Statistics | None, ...]:
        """Of each output; None where there are none to take."""
        return tuple(each.read() if isinstance(each, Moments) else each for each in self.moments)

    @property
    def output(self) -> Tensor:
        """The kept output, the first where there are several. Raises KeyError when it was not kept."""
        return self._kept("output")

    @property
    def kept_outputs(self) -> tuple[Tensor, ...]:
        """All kept outputs."""
        return tuple(held.tensor for name, held in self.held.items() if name.startswith("output"))

    def input(self, name: str) -> Tensor:
        """A kept input by its argument's name, as it was before the call."""
        return self._kept(f"input {name}")

    def written(self, name: str) -> Tensor:
        """A written argument by its name, as it was after the call."""
        return self._kept(f"written {name}")

    def _kept(self, name: str) -> Tensor:
        if name not in self.held:
            kept = ", ".join(self.held) or "nothing"
            raise KeyError(f"{self.full_address}: {name} was not kept ({kept} was); trace with keep=True")
        return self.held[name].tensor

    def __repr__(self) -> str:
        given = [f"{name}={value!r}" for name, value in (self.inputs | self.constants).items()]
        gave = ", ".join(map(str, self.outputs)) or "None"
        took = "did not return" if self.seconds is None else f"{self.seconds * 1e6:.1f} us"
        lines = [
            f"{self.full_address}  {self.source}",
            f"  ({', '.join(given)}) -> {gave}  {took}, kernel {self.kernel}",
        ]
        lines += [f"  {text}" for text in map(described, self.statistics) if text]
        return "\n".join(lines)


class _Named(NamedTuple):
    name: str


def described(found: Statistics | None) -> str:
    """Statistics in a line; empty where there are none."""
    if found is None:
        return ""
    parts = [] if found.least is None else [f"min {found.least:.4g}  mean {found.mean:.4g}  max {found.most:.4g}"]
    parts += [f"{name} {count}" for name, count in (("NaN", found.nan), ("Inf", found.inf)) if count]
    return "  ".join(parts)


class Keeper:
    """Keeps tensors by reference, the same one once, and copies it before an op writes to its memory.

    What is made (outputs, copies) counts; past `limit` bytes of that the oldest go to a temporary file, which is gone
    with the process. What was there anyway, such as a weight, does not.
    """

    def __init__(self, limit: int):
        self.limit, self.bytes, self.spilled = limit, 0, 0
        self._referred: dict[int, dict[Spec, Held]] = {}  # by the address that their memory begins at
        self._counted: deque[Held] = deque()
        self._spill: _Spill | None = None

    def keep(self, tensor: Tensor, made: bool) -> Held:
        """Hold a tensor; `made` when it is in memory only because we hold it."""
        here = self._referred.setdefault(_begin(tensor), {})
        held = here.get(tensor.spec)
        if held is None:
            held = here[tensor.spec] = Held(tensor)
            if made:
                self._count(held)
        return held

    def before_writing(self, tensor: Tensor) -> None:
        """Copy what is kept of the memory that `tensor` covers."""
        begin = _begin(tensor)
        end = begin + tensor.nbytes
        touched = [at for at in self._referred if at < end and begin < at + self._reach(at)]
        for at in touched:
            for held in self._referred.pop(at).values():
                held.copy()
                if held not in self._counted:
                    self._count(held)

    def _reach(self, at: int) -> int:
        return max((spec.nbytes for spec in self._referred[at]), default=0)

    def _count(self, held: Held) -> None:
        self._counted.append(held)
        self.bytes += held.spec.nbytes
        while self.bytes > self.limit:
            oldest = self._counted.popleft()
            self._spill = self._spill or _Spill()
            if (tensor := oldest.referred) is not None:
                self._referred.get(_begin(tensor), {}).pop(oldest.spec, None)
            oldest.spill(self._spill)
            self.bytes -= oldest.spec.nbytes
            self.spilled += oldest.spec.nbytes


def _begin(tensor: Tensor) -> int:
    return tensor.buffer.data.data_ptr()
