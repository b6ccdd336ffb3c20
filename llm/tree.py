"""How a model prints: its tree of modules with shapes, dtypes and sizes; equal neighbours fold into one line."""

from __future__ import annotations

from html import escape
from typing import Any, NamedTuple

from ops import Spec, Tensor
from ops.display import box

from .nn import Module, ModuleList


class Node(NamedTuple):
    """A line of the tree and what lies below it."""

    name: str
    what: str
    size: str
    below: list[Node]

    @property
    def line(self) -> str:
        return f"{self.name}: {self.what}" + (f"  {self.size}" if self.size else "")


def text(module: Module) -> str:
    """The tree below `module`, as text."""
    return "\n".join([f"{type(module).__name__}  {size(module.nbytes)}", *_lines(_below(module), "  ")])


def html(module: Module) -> str:
    """The same for a notebook: a module opens and closes by a click; the first two levels are open."""
    return box(_item(Node("", type(module).__name__, size(module.nbytes), _below(module)), 2))


def _lines(nodes: list[Node], indent: str) -> list[str]:
    return [line for node in nodes for line in (indent + node.line, *_lines(node.below, indent + "  "))]


def _item(node: Node, opened: int) -> str:
    """A node as HTML, with `opened` levels open."""
    name = f"<b>{escape(node.name)}</b> " if node.name else ""
    label = f"{name}{escape(node.what)} <span style='opacity:.72;font-size:12px'>{escape(node.size)}</span>"
    if not node.below:
        return f"<div style='margin-left:1.1em;white-space:nowrap'>{label}</div>"
    below = "".join(_item(each, opened - 1) for each in node.below)
    look = "margin-left:1.1em;border-left:1px solid rgba(128,128,128,.45);padding-left:.4em"
    head = f"<summary style='cursor:pointer;white-space:nowrap'>{label}</summary>"
    return f"<details{' open' if opened > 0 else ''}>{head}<div style='{look}'>{below}</div></details>"


def size(count: int) -> str:
    """Bytes for people: 1.5 GB."""
    amount = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000 or unit == "GB":
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.3g} {unit}"
        amount /= 1000
    raise AssertionError


def _below(module: Module) -> list[Node]:
    nodes: list[Node] = []
    for name, value in vars(module).items():
        if name.startswith("_"):
            continue
        if isinstance(value, (Tensor, Spec)):
            spec = value.spec if isinstance(value, Tensor) else value
            missing = "" if isinstance(value, Tensor) else "  not loaded"
            nodes.append(
                Node(name, f"{spec.dtype}[{', '.join(map(str, spec.shape))}]", size(spec.nbytes) + missing, [])
            )
        elif isinstance(value, ModuleList):
            nodes += _members(name, value)
        elif isinstance(value, Module):
            nodes.append(_member(name, value))
    return nodes


def _member(name: str, value: Any) -> Node:
    if not isinstance(value, Module):
        return Node(name, repr(value), "", [])
    below, kind = _below(value), type(value).__name__
    if len(below) == 1 and below[0].name == "weight" and not below[0].below:  # a module that is just its weight
        return Node(name, f"{kind}  {below[0].what}", below[0].size, [])
    return Node(name, kind, size(value.nbytes), below)


def _members(name: str, values: ModuleList) -> list[Node]:
    """Equal neighbours are one node."""
    nodes: list[Node] = []
    start = 0
    while start < len(values):
        shown = _member("", values[start])
        stop = start + 1
        while stop < len(values) and _member("", values[stop]) == shown:
            stop += 1
        label = f"{name}.{start}" if stop == start + 1 else f"{name}.{start}-{stop - 1}"
        times = "" if stop == start + 1 else f"{stop - start} x "
        nodes.append(shown._replace(name=label, what=times + shown.what))
        start = stop
    return nodes
