"""Ops fused through Relax: one function each, the template's kernel of it, against the references in a row."""

import numpy as np
import pytest
import tvm_ffi
from tvm import tirx

import ops
from debug.poison import poison
from ops.quantize import FORMATS, quantize_activations
from ops.schedule import fused
from ops.spec import Dim, Spec
from ops.tolerance import KERNEL, relative_error
from tests.ops.capture import capture, compiled, only_function, tokens
from tests.ops.harness import random

EPS = 1e-5
SIZES = [1, 5, 40]
WEIGHTS = [("float32", "float32"), ("float16", "float16"), ("bfloat16", "bfloat16"), ("float32", "bfloat16")]
WEIGHTS += [("float32", form) for form in FORMATS] + [("bfloat16", "q8")]
SHAPES = [(7, 33), (96, 40), (100, 257)]


def spec(n, width, dtype):
    return Spec((tokens(n), width), dtype)


def run(kernel, *tensors, out):
    poison(Spec(out, tensors[0].dtype))
    y = ops.empty(out, tensors[0].dtype)
    kernel(*tensors, y)
    return y.numpy()


def chained(steps, *arrays):
    """The references one after the other, each result rounded to the activations' dtype as in a tensor."""
    dtype = arrays[0].dtype

    def call(op, *values, **constants):
        return op.reference(*values, **constants).astype(dtype)

    return steps(call, *arrays)


def check(steps, n, out, *tensors, **inputs):
    """Fuse, schedule, launch, compare; gives the result."""
    result = run(compiled(steps, **inputs), *tensors, out=(n, out))
    expected = chained(steps, *(each.numpy() for each in tensors))
    error = relative_error(result.astype("float64"), expected.astype("float64"), str(result.dtype))
    assert error <= KERNEL[str(result.dtype)], f"error {error:.3g}"
    return result


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype, weight", WEIGHTS)
@pytest.mark.parametrize("k, out", SHAPES)
def test_silu_mul_in_the_epilogue_of_linear(rng, n, dtype, weight, k, out):
    x, w, up = (random(rng, shape, dtype) for shape in ((n, k), (out, k), (n, out)))
    check(
        lambda call, x, w, up: call(ops.silu_mul, call(ops.linear, x, w), up),
        n, out, ops.tensor(x), ops.tensor(w.astype("float32"), weight), ops.tensor(up),
        x=spec(n, k, dtype), w=Spec((out, k), weight), up=spec(n, out, dtype),
    )  # fmt: skip


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bias_activation_and_residual_in_the_epilogue(rng, n, dtype):
    k, out = 65, 19
    x, w, bias, h = (random(rng, shape, dtype) for shape in ((n, k), (out, k), (out,), (n, out)))
    check(
        lambda call, x, w, bias, h: call(ops.add, call(ops.gelu, call(ops.linear, x, w, bias)), h),
        n, out, *map(ops.tensor, (x, w, bias, h)),
        x=spec(n, k, dtype), w=Spec((out, k), dtype), bias=Spec((out,), dtype), h=spec(n, out, dtype),
    )  # fmt: skip


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype, weight", [each for each in WEIGHTS if each[1] not in FORMATS])
@pytest.mark.parametrize("k, out", SHAPES)
def test_rms_norm_in_the_prologue_and_residual_in_the_epilogue(rng, n, dtype, weight, k, out):
    x, scale, w, h = (random(rng, shape, dtype) for shape in ((n, k), (k,), (out, k), (n, out)))
    check(
        lambda call, x, scale, w, h: call(ops.add, call(ops.linear, call(ops.rms_norm, x, scale, eps=EPS), w), h),
        n, out, ops.tensor(x), ops.tensor(scale), ops.tensor(w.astype("float32"), weight), ops.tensor(h),
        x=spec(n, k, dtype), scale=Spec((k,), dtype), w=Spec((out, k), weight), h=spec(n, out, dtype),
    )  # fmt: skip


def quantised_bound(x, weight, form, expected):
    """How far a product with int8 of a norm may be from `expected`, when the norm is only nearly that of the reference.

    The sum of k squares in float32 is off by k units at the most, the norm by half of that and some more: by `off`. The
    row's products scale with it. A code that lies so near to a half may be the next one.
    """
    unit, (_, k) = 2.0**-24, x.shape
    off = (k / 2 + 8) * unit
    norm = x / np.sqrt(np.mean(x.astype("float64") ** 2, -1, keepdims=True) + EPS)
    codes, scales = quantize_activations(norm.astype("float32"), form.group)
    exact = np.zeros(codes.shape)
    exact.reshape(len(x), -1)[:, :k] = norm
    exact = exact * 127 / np.abs(exact).max(-1, keepdims=True)
    unsure = np.abs(exact - np.floor(exact) - 0.5) <= 127 * (4 * off + 4 * unit)
    spread = (unsure * scales[..., None]).reshape(len(x), -1)[:, :k]
    size = np.abs(codes * scales[..., None]).reshape(len(x), -1)[:, :k] @ np.abs(weight).T
    return 1e-5 * np.abs(expected).max() + 2 * off * np.abs(expected) + 8 * unit * size + spread @ np.abs(weight).T


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("k, out", SHAPES)
def test_activations_are_quantised_in_the_norm(rng, n, form, k, out):
    def steps(call, x, scale, w):
        return call(ops.linear, call(ops.rms_norm, x, scale, eps=EPS), w)

    x, scale, w = random(rng, (n, k), "float32"), np.ones(k, "float32"), random(rng, (out, k), "float32")
    inputs = {"x": spec(n, k, "float32"), "scale": Spec((k,), "float32"), "w": Spec((out, k), form)}
    weight = ops.tensor(w, form)
    result = run(compiled(steps, **inputs), ops.tensor(x), ops.tensor(scale), weight, out=(n, out))
    expected = chained(steps, x, scale, weight.numpy()).astype("float64")
    values = np.asarray(weight.numpy(), "float64")
    assert (np.abs(result - expected) <= quantised_bound(x, values, FORMATS[form], expected)).all()


@pytest.mark.parametrize("form", FORMATS)
def test_a_quantised_norm_is_nowhere_in_memory(form):
    k = 1000
    module = capture(
        lambda call, x, scale, w: call(ops.linear, call(ops.rms_norm, x, scale, eps=EPS), w),
        x=Spec((Dim("n", 17), k), "float32"), scale=Spec((k,), "float32"), w=Spec((60, k), form),
    )  # fmt: skip
    kernel = fused.schedule(only_function(fused.fuse(module)), 17)
    made = []
    tvm_ffi.structural_walk(kernel.body, (tirx.AllocBuffer, lambda each: made.append(each.buffer)))
    assert any(str(each.dtype) == "int8" for each in made)
    floats = [each.shape for each in made if str(each.dtype) == "float32"]
    assert floats and not any(isinstance(size, tirx.IntImm) and int(size) >= k for shape in floats for size in shape)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("weight", ["float32", "q4"])
def test_all_threads_and_both_slots(rng, n, weight):
    k, out = 544, 1031
    x, up = random(rng, (n, k), "float32"), random(rng, (n, out), "float32")
    w = ops.tensor(random(rng, (out, k), "float32"), weight)
    check(
        lambda call, x, w, up: call(ops.mul, call(ops.linear, call(ops.neg, x), w), up),
        n, out, ops.tensor(x), w, ops.tensor(up),
        x=spec(n, k, "float32"), w=Spec((out, k), weight), up=spec(n, out, "float32"),
    )  # fmt: skip


def test_what_holds_no_product_is_scheduled_as_blocks(rng):
    x, scale = random(rng, (40, 70), "float32"), random(rng, (70,), "float32")
    check(
        lambda call, x, scale: call(ops.silu, call(ops.rms_norm, call(ops.neg, x), scale, eps=EPS)),
        40, 70, ops.tensor(x), ops.tensor(scale), x=spec(40, 70, "float32"), scale=Spec((70,), "float32"),
    )  # fmt: skip


def test_what_a_template_without_slots_computes_stays_alone():
    q, cache = Spec((Dim("n", 17), 4, 16), "float32"), Spec((Dim("t"), 2, 16), "float32")
    module = fused.fuse(
        capture(
            lambda call, q, k, v, at: call(ops.add, call(ops.attention, q, k, v, at, scale=0.25), q),
            q=q, k=cache, v=cache, at=Spec((Dim("n", 17),), "int32"),
        )
    )  # fmt: skip
    functions = [each for each in module.functions.values() if isinstance(each, tirx.PrimFunc)]
    assert len(functions) == 2
    assert [bool(each.attrs.get("has_template", False)) for each in functions].count(True) == 1
