"""How a model prints: its tree of modules with shapes, dtypes and sizes; equal neighbours fold into one line."""

from __future__ import annotations

import re
from typing import Any

from ops import Spec, Tensor

from .nn import Module, ModuleList


def text(module: Module) -> str:
    """The tree below `module`, as text."""
    return "\n".join([f"{type(module).__name__}  {size(module.nbytes)}", *_inside(module, "  ")])


def size(count: int) -> str:
    """Bytes for people: 1.5 GB."""
    amount = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000 or unit == "GB":
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.3g} {unit}"
        amount /= 1000
    raise AssertionError


def _inside(module: Module, indent: str) -> list[str]:
    lines = []
    for name, value in vars(module).items():
        if name.startswith("_"):
            continue
        if isinstance(value, (Tensor, Spec)):
            spec = value.spec if isinstance(value, Tensor) else value
            missing = "" if isinstance(value, Tensor) else "  not loaded"
            lines.append(
                f"{indent}{name}: {spec.dtype}[{', '.join(map(str, spec.shape))}]  {size(spec.nbytes)}{missing}"
            )
        elif isinstance(value, ModuleList):
            lines += _members(name, value, indent)
        elif isinstance(value, Module):
            lines += _member(name, value, indent)
    return lines


def _member(name: str, value: Any, indent: str) -> list[str]:
    if not isinstance(value, Module):
        return [f"{indent}{name}: {value!r}"]
    inside = _inside(value, indent + "  ")
    if len(inside) == 1 and inside[0].lstrip().startswith("weight: "):  # a module that is just its weight: one line
        return [f"{indent}{name}: {type(value).__name__}  {inside[0].strip().removeprefix('weight: ')}"]
    return [f"{indent}{name}: {type(value).__name__}  {size(value.nbytes)}", *inside]


def _members(name: str, values: ModuleList, indent: str) -> list[str]:
    lines: list[str] = []
    start = 0
    while start < len(values):
        shown = _member("", values[start], indent)
        stop = start + 1
        while stop < len(values) and _member("", values[stop], indent) == shown:
            stop += 1
        label = f"{name}.{start}" if stop == start + 1 else f"{name}.{start}-{stop - 1}"
        times = "" if stop == start + 1 else f"{stop - start} x "
        lines += [re.sub(r"^(\s*): ", rf"\g<1>{label}: {times}", shown[0]), *shown[1:]]
        start = stop
    return lines
