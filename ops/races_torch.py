"""PyTorch's own functions for ops that it has, to race with. Only where torch is installed; nothing else needs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .call import Call, as_tuple
from .tensor import Tensor

_NAMES = {
    "add", "sub", "mul", "div", "neg", "tanh", "silu", "gelu", "silu_mul", "softmax", "log_softmax", "argmax", "linear",
    "rms_norm", "layer_norm", "embedding",
}  # fmt: skip


def knows(call: Call) -> bool:
    """Whether torch has the op, in one function over tensors that are not packed."""
    tensors = [each for each in call.args if isinstance(each, Tensor)]
    return call.op.name in _NAMES and all(each.spec.format is None and each.size for each in tensors)


def run(call: Call, outputs: tuple[Tensor, ...]) -> None:
    """Compute the call by torch, into the outputs."""
    import torch

    args = [_shared(torch, each) if isinstance(each, Tensor) else each for each in call.args]
    with torch.inference_mode():
        results = as_tuple(_function(torch, call)(*args))
        for target, result in zip(outputs, results, strict=True):
            _shared(torch, target).copy_(result)


def _shared(torch: Any, tensor: Tensor) -> Any:
    """The same memory as a torch tensor."""
    array = tensor.numpy()
    if tensor.dtype == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _function(torch: Any, call: Call) -> Callable[..., Any]:
    functional, constants = torch.nn.functional, call.constants
    if call.op.name == "rms_norm":

        def rms_norm(x: Any, weight: Any) -> Any:
            weight = weight.to(x.dtype) + (1 if constants.get("plus_one") else 0)
            return functional.rms_norm(x, x.shape[-1:], weight, constants["eps"])

        return rms_norm
    if call.op.name == "layer_norm":
        return lambda x, weight, bias=None: functional.layer_norm(
            x, x.shape[-1:], weight.to(x.dtype), None if bias is None else bias.to(x.dtype), constants["eps"]
        )
    if call.op.name == "embedding":
        return lambda ids, weight: functional.embedding(ids, weight)
    if call.op.name == "gelu":
        return lambda x: functional.gelu(x, approximate=constants.get("approximate", "none"))
    simple: dict[str, Callable[..., Any]] = {
        "silu": functional.silu,
        "silu_mul": lambda gate, up: functional.silu(gate) * up,
        "softmax": lambda x: torch.softmax(x, -1),
        "log_softmax": lambda x: torch.log_softmax(x, -1),
        "argmax": lambda x: torch.argmax(x, -1),
        "linear": lambda x, weight, bias=None: functional.linear(
            x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        ),
    }
    return simple.get(call.op.name) or getattr(torch, call.op.name)
