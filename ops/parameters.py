"""What an op's signature asks for, and how messages call what was given."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from .tensor import Tensor


def kind_of(op_name: str, parameter: inspect.Parameter) -> tuple[type, bool]:
    """What a run-time parameter's annotation, a text or a type, asks for: Tensor, int or float, and whether or None."""
    annotation = parameter.annotation
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    names = [each.strip().rpartition(".")[2] for each in text.split("|")]
    kinds = {"Tensor": Tensor, "int": int, "float": float}
    if names[0] not in kinds or names[1:] not in ([], ["None"]):
        raise TypeError(f"{op_name}: {parameter} must be annotated as Tensor, int or float, or one of them | None")
    return kinds[names[0]], len(names) > 1


def type_name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def signature_line(name: str, function: Callable) -> str:
    """`name(x: Tensor, *, eps: float) -> Tensor`, for help and errors."""
    return f"{name}{inspect.signature(function)}".replace("'", "")
