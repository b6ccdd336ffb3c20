"""The few parts that models are made of. A module is a plain Python object; its attribute paths name its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np

import ops
from ops import Spec, Tensor, hooks, scope, select
from ops.progress import tracked
from ops.quantize import KNOWN

from . import rope
from .errors import CheckpointError, UserError

if TYPE_CHECKING:
    from .adapters import Delta

_SLOW_LOAD = 64 * 2**20  # bytes above which loading shows its progress

Pack = Callable[[Mapping[str, Spec], Mapping[str, np.ndarray]], Mapping[str, Tensor]]

__limpid_plumbing__ = True  # frames of this file only pass calls on: tools look past them for the model's line


class Module:
    """Base of everything with weights. Assign tensors, modules and lists of modules to attributes; write `forward`.

    A weight that is not loaded yet stands as its `Spec`. Calling the module runs `forward` in the scope of its path.
    """

    _name = ""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return scope.run(self, self._name, self.forward, args, kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"{type(self).__name__} has no forward")

    def register_forward_pre_hook(
        self, hook: Callable[..., Any], *, prepend: bool = False, with_kwargs: bool = False
    ) -> hooks.Hook:
        """Call `hook(module, args)` before each forward; it gives None, or other args, one or a tuple. As in torch.

        With `with_kwargs` it is `hook(module, args, kwargs)`, and gives None or (args, kwargs). The hook is on in all
        threads, and is not copied with the module, until `remove()` of what this gives, or the end of its `with`.
        """
        return hooks.register(self, hook, True, prepend, with_kwargs)

    def register_forward_hook(
        self, hook: Callable[..., Any], *, prepend: bool = False, with_kwargs: bool = False
    ) -> hooks.Hook:
        """Call `hook(module, args, output)` after each forward; it gives None, or another output. As in torch.

        With `with_kwargs` it is `hook(module, args, kwargs, output)`. To be removed as a pre hook is.
        """
        return hooks.register(self, hook, False, prepend, with_kwargs)

    def swap(self, op: ops.Op, language: str, *, where: Any = None, **options: Any) -> Callable[[Any], Any]:
        """Decorator: `op.swap(language, ...)` for the calls made inside this module, whatever its path."""
        return op.swap(language, where=select.Inside(self, where), **options)

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, list) and (not value or any(isinstance(each, Module) for each in value)):
            value = ModuleList(value)  # an empty one too: modules may be appended to it
        if isinstance(value, (Module, ModuleList)):
            value._name = name
        object.__setattr__(self, name, value)

    def children(self) -> Iterator[tuple[str, Any]]:
        """Names and modules right below this one; the members of a list as `layers.0`."""
        for name, value in vars(self).items():
            if isinstance(value, ModuleList):
                yield from ((f"{name}.{i}", each) for i, each in enumerate(value))
            elif isinstance(value, Module):
                yield name, value

    def modules(self, path: str = "") -> Iterator[tuple[str, Module]]:
        """This module and all below it, by path."""
        yield path, self
        for name, child in self.children():
            if isinstance(child, Module):
                yield from child.modules(f"{path}.{name}" if path else name)

    def parameters(self) -> Iterator[tuple[str, Tensor | Spec]]:
        """Paths and weights, in the order they were declared."""
        for path, module in self.modules():
            for name, value in vars(module).items():
                if isinstance(value, (Tensor, Spec)) and not name.startswith("_"):
                    yield f"{path}.{name}" if path else name, value

    def set_parameter(self, path: str, value: Tensor | Spec) -> None:
        """Put a weight in its place by path. Raises KeyError where there is none."""
        *parents, name = path.split(".")
        module: Any = self
        try:
            for part in parents:
                module = list.__getitem__(module, int(part)) if isinstance(module, list) else getattr(module, part)
            getattr(module, name)
        except (AttributeError, IndexError, ValueError):
            raise KeyError(f"{type(self).__name__} has no weight {path!r}") from None
        setattr(module, name, value)

    def to(self, device: str) -> Self:
        """Move all tensors to a device, "cpu", "cuda" or "emulate", one after the other. Gives the module itself.

        Raises OpError where there is no such device, UserError while adapters are loaded.
        """
        ops.device.check(device)
        modules = [module for _, module in self.modules()]
        if any(isinstance(each, Linear) and (each._deltas or each._merged) for each in modules):
            raise UserError("adapters do not move: remove them, and load them again on the other device")
        for module in modules:
            for name, value in list(vars(module).items()):
                object.__setattr__(module, name, _moved(value, device))
        return self

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(weight.nbytes for _, weight in self.parameters())

    def __repr__(self) -> str:
        from .tree import text

        return text(self)

    def _repr_html_(self) -> str:
        from .tree import html

        return html(self)


def _moved(value: Any, device: str) -> Any:
    """A tensor, or a named tuple of tensors, on the device; all else as it is."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Spec):
        return value.on(device)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_moved(each, device) for each in value))
    return value


class ModuleList(list):
    """A list of modules whose members learn their place when they are taken out to be called."""

    _name = ""

    def __iter__(self) -> Iterator[Any]:
        for i in range(len(self)):
            yield self[i]

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        found = list.__getitem__(self, index)
        if isinstance(found, Module):
            name = f"{self._name}.{index if index >= 0 else index + len(self)}"
            if found._name != name:
                found._name = name
        return found


class Linear(Module):
    """y = x @ weight.T + bias, and what adapters add (`llm.load_adapter`). weight: [outputs, inputs]."""

    _deltas: tuple[Delta, ...] = ()
    _merged: Any = None  # what adapters were merged into the weight

    def __init__(self, inputs: int, outputs: int, bias: bool = False, dtype: str = "float32"):
        self.weight: Any = Spec((outputs, inputs), dtype)
        self.bias: Any = Spec((outputs,), dtype) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = ops.linear(x, self.weight, self.bias)
        for delta in self._deltas:
            y = delta.added(x, y)
        return y


class RMSNorm(Module):
    """Root-mean-square normalisation; weight: [width]. `plus_one` multiplies by 1 + weight, as Gemma does."""

    def __init__(self, width: int, eps: float, dtype: str = "float32", plus_one: bool = False):
        self.weight: Any = Spec((width,), dtype)
        self.eps, self.plus_one = eps, plus_one

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, eps=self.eps, plus_one=self.plus_one)


class LayerNorm(Module):
    """Normalisation to mean 0 and variance 1; weight and, unless `bias` is False, bias: [width]."""

    def __init__(self, width: int, eps: float, dtype: str = "float32", bias: bool = True):
        self.weight: Any = Spec((width,), dtype)
        self.bias: Any = Spec((width,), dtype) if bias else None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, eps=self.eps)


class Embedding(Module):
    """Rows of weight [vocabulary, width] by token id."""

    def __init__(self, vocabulary: int, width: int, dtype: str = "float32"):
        self.weight: Any = Spec((vocabulary, width), dtype)
        self.dtype = dtype

    def forward(self, ids: Tensor) -> Tensor:
        return ops.embedding(ids, self.weight, dtype=self.dtype)


class Rotation(NamedTuple):
    """What rotates queries and keys in one forward: positions int32 [n], frequencies float32 [rotary/2], a factor."""

    positions: Tensor
    frequencies: Tensor
    scale: float
    interleaved: bool = False  # pairs are neighbours

    def __call__(self, x: Tensor) -> Tensor:
        return ops.rope(x, self.positions, self.frequencies, interleaved=self.interleaved, scale=self.scale)


class RotaryEmbedding:
    """Makes the `Rotation` of a forward. Some scalings depend on how many tokens there are in all."""

    def __init__(self, parameters: rope.Rope, interleaved: bool = False):
        self.parameters, self.interleaved = parameters, interleaved
        self._made: tuple[Any, Tensor, float] | None = None  # for the last regime

    def at(self, positions: Tensor, length: int) -> Rotation:
        """For tokens at `positions`, the last of which makes `length` tokens in all."""
        regime, made = (rope.regime(self.parameters, length), positions.device), self._made
        if made is None or made[0] != regime:
            values, scale = rope.frequencies(self.parameters, length)
            made = self._made = regime, ops.tensor(np.ascontiguousarray(values), device=positions.device), float(scale)
        return Rotation(positions, made[1], made[2], self.interleaved)


def load_parameters(
    module: Module,
    named: Mapping[str, np.ndarray],
    base: str = "",
    ignored: tuple[str, ...] = (),
    progress: bool = False,
    pack: Pack | None = None,
) -> None:
    """Give every parameter its array, without copying where the dtype is right.

    `pack(specs, arrays)` gives the tensors of packed weights, all at a time; without it they are packed one by one.

    `base` is dropped from the checkpoint's names; names that end with one of `ignored` may be left over. Missing,
    left-over and mis-shaped tensors are one CheckpointError that lists them; then nothing has been changed.
    """
    arrays = {name.removeprefix(base): array for name, array in named.items()}
    wanted = dict(module.parameters())
    missing = [name for name in wanted if name not in arrays]
    extra = [name for name in arrays if name not in wanted and not name.endswith(ignored or ("\0",))]
    twice = [name for name in arrays if base and name in named and base + name in named]
    wrong = [
        f"{name} is {list(arrays[name].shape)}, expected {list(spec.shape)}"
        for name, spec in wanted.items()
        if name in arrays and tuple(arrays[name].shape) != spec.shape
    ]
    problems = [f"missing: {_listed(missing)}"] * bool(missing) + [f"left over: {_listed(extra)}"] * bool(extra)
    problems += [f"wrong shape: {_listed(wrong)}"] * bool(wrong)
    problems += [f"there with and without {base!r} in front: {_listed(twice)}"] * bool(twice)
    if problems:
        raise CheckpointError(f"the checkpoint does not fit {type(module).__name__}: {'; '.join(problems)}")
    matrices = {name: Spec(each.shape, each.dtype) for name, each in wanted.items() if each.dtype in KNOWN}
    ready = pack(matrices, arrays) if pack and matrices else {}
    for name, spec in tracked(wanted.items(), "Loading weights", shown=progress and module.nbytes > _SLOW_LOAD):
        made = ready[name] if name in ready else ops.tensor(np.ascontiguousarray(arrays[name]), spec.dtype)
        module.set_parameter(name, made)


def _listed(names: list[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
