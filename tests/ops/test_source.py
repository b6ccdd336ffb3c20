"""Every op shows what was generated for it, in each language."""

import pytest
from tvm import tirx

import ops
from ops import KernelError, Op, Spec, pointwise

X, W, IDS = Spec((3, 4), "float32"), Spec((5, 4), "float32"), Spec((3,), "int32")
HEADS, CACHE, ROW = Spec((3, 2, 4), "float32"), Spec((8, 2, 4), "float32"), Spec((4,), "float32")
LOGITS, SINKS = Spec((3, 2, 8), "float32"), Spec((2,), "float32")
ARGUMENTS = {
    "embedding": (IDS, W), "cache_write": (CACHE, HEADS, IDS), "linear": (X, W), "rope": (HEADS, IDS, SINKS),
    "attention": (HEADS, CACHE, CACHE, IDS), "scores": (HEADS, CACHE, IDS), "mix": (LOGITS, CACHE),
    "softmax_with_sinks": (LOGITS, SINKS), "rms_norm": (X, ROW), "layer_norm": (X, ROW),
    "add_row": (X, ROW), "mul_row": (X, ROW),
    "join": (HEADS, Spec((3, 2, 2), "float32")), "token_mix": (X, Spec((1, 4), "float32"), ROW),
    "wkv": (X, X, ROW, ROW, Spec((3, 4), "float32")), "combine": (HEADS, Spec((3, 2), "float32")),
    "experts_linear": (X, Spec((6, 4), "float32"), Spec((3, 1), "int32")), "route": (X, ROW),
    "causal_conv": (X, Spec((1, 4), "float32"), Spec((4, 2), "float32"), ROW),
    "selective_scan": (HEADS, Spec((3, 2), "float32"), SINKS, LOGITS, LOGITS, SINKS, Spec((2, 4, 8), "float32")),
    "scale": (X, 2.0), "offset": (X, 2.0), "div_by": (X, 2.0), "div_into": (X, 2.0),
}  # fmt: skip
CONSTANTS = {
    "attention": {"scale": 0.5}, "scores": {"scale": 0.5}, "rms_norm": {"eps": 1e-6}, "layer_norm": {"eps": 1e-6},
    "softcap": {"cap": 30.0}, "clamp": {"limit": 0.5}, "cast": {"dtype": "float16"}, "top_k": {"k": 2},
    "columns": {"start": 1, "stop": 3}, "clamped_swiglu": {"alpha": 1.7, "limit": 7.0},
    "experts_linear": {"experts": 2}, "route": {"k": 2, "scoring": "sigmoid", "normalise": True, "scale": 1.5},
}  # fmt: skip
OPS = {name: value for name, value in vars(ops).items() if isinstance(value, Op)}


@pytest.mark.parametrize("name", OPS)
def test_c(name):
    op = OPS[name]
    text = op.source("c", *ARGUMENTS.get(name, (X,) * len(op.parameters)), **CONSTANTS.get(name, {}))
    assert f"__tvm_ffi_{name}(" in text


def test_what_tvm_cannot_generate_is_said_by_name():
    @ops.op(symbolic={"x": "n"})
    def absolute(x: ops.Tensor) -> ops.Tensor:
        return ops.like(x)

    @absolute.kernel
    def _(x, out):
        return pointwise.blocks("absolute", tirx.abs, ("x",), (x,), out)

    assert "define " in absolute.source("llvm", X)
    with pytest.raises(KernelError, match=r"^absolute\(x=float32\[n, 4\]\) does not compile: .*fabs"):
        absolute.source("c", X)
