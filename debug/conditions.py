"""When a stop stops: functions of the call, asked before its launch.

What is true stops there. A function that is given instead is asked of the output, after the launch and before the model
gets it. Where the answer is a text it says why.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import ops
from ops import Call
from ops.call import tensors
from ops.difference import Expected, bound

Condition = Callable[[Call], Any]


def nonfinite(call: Call) -> Callable[[Any], str]:
    """The output holds a NaN or an infinity."""

    def judge(output: Any) -> str:
        for i, each in enumerate(tensors(output)):
            values = each.numpy()
            nan, inf = int(np.isnan(values).sum()), int(np.isinf(values).sum())
            if nan or inf:
                first = tuple(int(i) for i in np.argwhere(~np.isfinite(values))[0])
                return f"{_name(i)} holds {nan} NaN and {inf} infinite values, the first at {list(first)}"
        return ""

    return judge


def above(x: float) -> Condition:
    """An element of the output is larger than `x`, whatever its sign."""
    if isinstance(x, bool) or not isinstance(x, (int, float)):
        raise ops.OpError(f"above takes a number, when=above(1e3); given {type(x).__name__}")

    def condition(call: Call) -> Callable[[Any], str]:
        def judge(output: Any) -> str:
            for i, each in enumerate(tensors(output)):
                values = np.abs(np.asarray(each.numpy(), "float64"))
                if (values > x).any():
                    at = np.unravel_index(int(np.nanargmax(values)), values.shape)
                    return f"{_name(i)} is {float(each.numpy()[at]):.6g} at {[int(i) for i in at]}, above {x:g}"
            return ""

        return judge

    return condition


def diverges(tolerance: float | Call | None = None) -> Any:
    """The output, or what is written, is further from the NumPy reference on the same inputs than `tolerance`.

    Relative to max|reference|; None is the bound of a kernel in that dtype. `when=diverges` is the same as
    `when=diverges()`.
    """
    if isinstance(tolerance, Call):
        return diverges()(tolerance)
    given: float | None = tolerance

    def condition(call: Call) -> Callable[[Any], str]:
        wanted = Expected(call)

        def judge(output: Any) -> str:
            for name, tensor, found in wanted.differences(output):
                allowed = bound(tensor) if given is None else given
                if not found.error <= allowed:
                    return f"{name} is not what the reference gives: {found}; tolerance {allowed:g}"
            return ""

        return judge

    return condition


def _name(i: int) -> str:
    return f"output {i}" if i else "output"
