"""Call: one op call as tools see it. Kernel: what computes it. Use: a kernel in use for some calls."""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any, Self, cast

import numpy as np

from . import device
from . import scope as scopes
from .errors import SelectorError
from .spec import Spec
from .tensor import Tensor

if TYPE_CHECKING:
    from .op import Op
    from .plan import Plan
    from .scope import Scope
    from .select import Selector

uses_lock = threading.Lock()  # of the kernels in use, all ops'
_HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep
_RUN, _PASS_SCOPE = scopes.run.__code__, scopes._pass_scope.__code__


class Call:
    """One op call: the op, its run-time `args`, its compile-time `constants`, and where it was made.

    `args` is positional, in the order of the op's signature, without trailing defaults.
    """

    __slots__ = ("_plan", "args", "constants", "op", "ordinal", "scope")

    def __init__(
        self, op: Op, args: tuple, constants: dict[str, Any], scope: Scope, ordinal: int, plan: Plan | None = None
    ):
        self.op, self.args, self.constants, self.scope, self.ordinal = op, args, constants, scope, ordinal
        self._plan = plan  # where it is known already

    def replace(self, args: tuple | None = None, constants: dict[str, Any] | None = None) -> Call:
        """The same call with other arguments."""
        changed = Call.__new__(Call)
        changed.op, changed.scope, changed.ordinal, changed._plan = self.op, self.scope, self.ordinal, None
        changed.args = self.args if args is None else tuple(args)
        changed.constants = self.constants if constants is None else dict(constants)
        return changed

    @property
    def path(self) -> str:
        """The path of the module that made the call, such as `layers.0.mlp.gate_proj`."""
        return self.scope.path

    @property
    def address(self) -> str:
        """Where in the model: `path/op[ordinal]`."""
        return f"{self.path}/{self.op.name}[{self.ordinal}]"

    @property
    def full_address(self) -> str:
        """The address and the pass: `path/op[ordinal]@pass`."""
        return f"{self.address}@{self.scope.number}"

    @property
    def inputs(self) -> dict[str, Any]:
        """The run-time arguments by name."""
        return dict(zip(self.op.parameters, self.args, strict=False))

    @property
    def outputs(self) -> tuple[Spec, ...]:
        """Shapes and dtypes of the outputs, before the launch."""
        return (self._plan or self.op.plan(self.args, self.constants)).outputs

    @property
    def device(self) -> str:
        """Where its tensors are."""
        return next((each.spec.device for each in self.args if isinstance(each, Tensor)), "cpu")

    @property
    def written(self) -> dict[str, Tensor]:
        """The arguments that the kernel writes, by name; an absent one is left out."""
        inputs = self.inputs
        return {name: inputs[name] for name in self.op.writes if inputs.get(name) is not None}

    @property
    def frame(self) -> FrameType | None:
        """The frame of the model's code that makes the call. Only while the call runs, and in its thread."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and not self._made_in(frame):  # past the code of the tools that look on
            frame = frame.f_back
        while frame is not None and not _is_users(frame):
            if frame.f_code is _PASS_SCOPE:  # tools that the module call passes through
                while frame.f_code is not _RUN:
                    frame = cast("FrameType", frame.f_back)
            frame = frame.f_back
        return frame

    def _made_in(self, frame: FrameType) -> bool:
        """True for the frame of `Op._observed` that this call, or the one it replaces, was made in."""
        if frame.f_code.co_name != "_observed" or not frame.f_code.co_filename.startswith(_HERE):
            return False
        made = frame.f_locals.get("call")
        return made is not None and (made.scope, made.op, made.ordinal) == (self.scope, self.op, self.ordinal)

    @property
    def source(self) -> str:
        """File and line of the model's code that makes the call, `llm/models/llama.py:57`, in a notebook
        `Cell In[3]:7`. Only while it runs."""
        frame = self.frame
        return f"{_relative(frame.f_code.co_filename, os.getcwd())}:{frame.f_lineno}" if frame else "?"

    def __repr__(self) -> str:
        values = [f"{name}={_brief(value)}" for name, value in (self.inputs | self.constants).items()]
        return f"{self.full_address}({', '.join(values)})"


@functools.lru_cache(1024)
def _relative(path: str, folder: str) -> str:
    return cell_of(path) or os.path.relpath(path, folder)


def cell_of(path: str) -> str | None:
    """A notebook's cell as IPython calls it, `Cell In[3]`, by the file that its code says it is in; else None."""
    if "IPython" not in sys.modules or (shell := sys.modules["IPython"].get_ipython()) is None:
        return None
    named = shell.compile.format_code_name(path)
    return None if named is None else " ".join(named)


def _is_users(frame: FrameType) -> bool:
    """True for a frame outside the runtime: not in ops, and not where a module only passes a call on."""
    if frame.f_code.co_filename.startswith(_HERE):
        return False
    return not frame.f_globals.get("__limpid_plumbing__", False)


def _brief(value: Any) -> str:
    return repr(value.spec) if isinstance(value, Tensor) else repr(value)


class Kernel:
    """What computes an op: `launch(call, outputs)` fills the output tensors, and written arguments in place.

    `name` says which kernel, `origin` where it comes from: "tvm" for a compiled one, else its language.
    """

    def __init__(self, name: str, origin: str, launch: Callable[[Call, tuple[Tensor, ...]], None]):
        self.name, self.origin, self.launch = name, origin, launch
        self.dtypes: dict[str, str] = {}  # of the op's arguments and outputs, by name, where the kernel fixes them

    @property
    def emulated(self) -> bool:
        """Whether it runs on another machine than it is written for."""
        return False

    @property
    def label(self) -> str:
        """Its language, and whether that is emulated."""
        return f"{self.origin} emulated" if self.emulated else self.origin

    def launch_here(self, call: Call, outputs: tuple[Tensor, ...]) -> None:
        """`launch` in this process, for a kernel that else runs in a sandbox."""
        self.launch(call, outputs)

    def fits(self, call: Call) -> bool:
        """Whether the kernel is made for sizes like the call's."""
        return True

    def sources(self) -> dict[str, str]:
        """What it is written in and what was made of that, by the name of the language; nothing where that is lost."""
        return {}

    @classmethod
    def from_python(cls, function: Callable) -> Kernel:
        """A kernel from a function with the signature of the op's reference: NumPy arrays in, arrays out.

        The arrays it gets are read-only: what it changes, it returns.
        """

        def launch(call: Call, outputs: tuple[Tensor, ...]) -> None:
            arrays = [_read_only(each) if isinstance(each, Tensor) else each for each in call.args]
            results = [np.asarray(each) for each in as_tuple(function(*arrays, **call.constants))]
            targets = (*outputs, *call.written.values())
            if len(results) != len(targets):
                raise ValueError(f"{name} gave {len(results)} arrays, {call.op.name} has {len(targets)} to fill")
            for target, result in zip(targets, results, strict=True):
                if result.shape != target.shape:
                    raise ValueError(f"{name} gave the shape {result.shape}, {call.op.name} gives {target.spec}")
                np.copyto(target.numpy(), result, casting="same_kind")

        name = getattr(function, "__name__", repr(function))
        return cls(name, "python", launch)

    @classmethod
    def from_compiled(cls, name: str, run: Callable) -> Kernel:
        """A kernel from a function compiled for the CPU that takes the runtime tensors of inputs, then outputs."""

        def launch(call: Call, outputs: tuple[Tensor, ...]) -> None:
            device.wait(call.device)
            run(*raw(call.args), *[each.buffer.data for each in outputs])

        return cls(name, "tvm", launch)

    def __repr__(self) -> str:
        return f"<kernel {self.name} ({self.origin})>"


class Use:
    """A kernel in use for the calls that a selector means; `hits` counts them. In a `with`, no hit is an error."""

    def __init__(self, op: Op, kernel: Kernel, where: Selector):
        self.op, self.kernel, self.where, self.hits = op, kernel, where, 0

    def remove(self) -> None:
        """The kernel from before is back. Removing twice is harmless."""
        self._detach()

    def _detach(self) -> bool:
        """Out of the op's uses; gives whether it was among them."""
        with uses_lock:
            was = self in self.op._uses
            self.op._uses = tuple(use for use in self.op._uses if use is not self)
        return was

    def applies(self, call: Call) -> bool:
        """Whether it computes the call."""
        return self.where.matches(call)

    def launch(self, call: Call, outputs: tuple[Tensor, ...]) -> None:
        """Count the call and compute it."""
        with uses_lock:
            self.hits += 1
        self.kernel.launch(call, outputs)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.remove()
        if kind is None and not self.hits:  # it would pass for a kernel that changes nothing
            raise SelectorError(f"{self!r}: no call of {self.op.name} in this `with` was meant")

    def __repr__(self) -> str:
        return f"<{self.op.name} by {self.kernel} where {self.where}, {self.hits} hits>"


def _read_only(x: Tensor) -> np.ndarray:
    array = x.numpy()
    array.flags.writeable = False
    return array


def raw(args: tuple) -> list:
    """Runtime tensors and scalars as a compiled function takes them; an absent argument (None) is left out."""
    return [each.buffer.data if type(each) is Tensor else each for each in args if each is not None]


def as_tuple(value: Any) -> tuple:
    """What a function returned, as a tuple: of one, of several, of none."""
    if value is None:
        return ()
    return value if isinstance(value, tuple) else (value,)


def tensors(output: Any) -> Iterator[Tensor]:
    """The tensors that an op or a module gave."""
    for each in output if isinstance(output, (tuple, list)) else (output,):
        if isinstance(each, Tensor):
            yield each
