"""An op run as the steps that it is written of, each a call that tools see: `with ops.attention.steps():`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .intercept import Interceptor

if TYPE_CHECKING:
    from .call import Call
    from .op import Op


class Steps(Interceptor):
    """Runs an op as its steps; they are filed under the op's name, as `layers.0.self_attn.attention/softmax[0]`."""

    def __init__(self, op: Op, composed: Callable):
        self._op, self._composed = op, composed

    @property
    def name(self) -> str:
        return self._op.name

    def call(self, call: Call, launch: Callable[[Call], Any]) -> Any:
        return self._composed(*call.args, **call.constants) if call.op is self._op else launch(call)
