"""Ops: tensors, and the one seam through which every op call goes. Knows TVM and NumPy, nothing above it."""

from . import threads

threads.configure()  # TVM, which the others import, takes its settings from the environment

from . import tvm_import  # noqa: F401  isort: skip
from . import build, ceilings, device, memory, scope, select, spec, target
from .attention import attention
from .attention_steps import mix, scores, softmax_with_sinks
from .call import Call, Kernel
from .embedding import cache_write, columns, concat, embedding, join
from .errors import DTypeError, KernelError, OpError, SelectorError, ShapeError, SwapRefused, SwapWarning
from .experts import experts_linear
from .intercept import Interceptor, install, intercepted
from .linear import linear
from .norm import layer_norm, rms_norm
from .op import Op, like, op
from .pointwise import (
    add,
    add_row,
    cast,
    clamp,
    clamped_swiglu,
    copy,
    div,
    div_by,
    div_into,
    gelu,
    gelu_mul,
    mul,
    mul_row,
    neg,
    offset,
    relu,
    scale,
    sigmoid,
    silu,
    silu_mul,
    softcap,
    sub,
    tanh,
)
from .prepare import prepare
from .recurrent import token_mix, wkv
from .reduce import argmax, log_softmax, softmax, top_k
from .rotary import rope
from .routing import combine, route
from .select import Selector
from .spec import Dim, Spec
from .state_space import causal_conv, selective_scan, softplus
from .swap import reload, restore
from .tensor import Tensor, empty, integer, tensor, tensor_from_packed, zeros

from . import examples  # isort: skip  they are of all ops

__all__ = [
    "Call",
    "DTypeError",
    "Dim",
    "Interceptor",
    "Kernel",
    "KernelError",
    "Op",
    "OpError",
    "Selector",
    "SelectorError",
    "ShapeError",
    "Spec",
    "SwapRefused",
    "SwapWarning",
    "Tensor",
    "add",
    "add_row",
    "argmax",
    "attention",
    "build",
    "cache_write",
    "cast",
    "causal_conv",
    "ceilings",
    "clamp",
    "clamped_swiglu",
    "columns",
    "combine",
    "concat",
    "copy",
    "device",
    "div",
    "div_by",
    "div_into",
    "embedding",
    "empty",
    "examples",
    "experts_linear",
    "gelu",
    "gelu_mul",
    "install",
    "integer",
    "intercepted",
    "join",
    "layer_norm",
    "like",
    "linear",
    "log_softmax",
    "memory",
    "mix",
    "mul",
    "mul_row",
    "neg",
    "offset",
    "op",
    "prepare",
    "reload",
    "relu",
    "restore",
    "rms_norm",
    "rope",
    "route",
    "scale",
    "scope",
    "scores",
    "select",
    "selective_scan",
    "sigmoid",
    "silu",
    "silu_mul",
    "softcap",
    "softmax",
    "softmax_with_sinks",
    "softplus",
    "spec",
    "sub",
    "tanh",
    "target",
    "tensor",
    "tensor_from_packed",
    "threads",
    "token_mix",
    "top_k",
    "wkv",
    "zeros",
]
