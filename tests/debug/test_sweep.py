"""Wrong kernels are found, whatever it is that they are wrong for, and so is memory that is given away in use."""

import time

import numpy as np
import pytest

import ops
from debug.findings import Found
from debug.sweep import Sweep
from ops import Kernel, memory
from ops.call import as_tuple

from .patients import culprit, patient, some_layer


def by_definition(op, change):
    """A kernel that computes the op by its definition, then does some harm: `change(call, results)`."""

    def launch(call: ops.Call, outputs: tuple) -> None:
        given = [each.numpy() if isinstance(each, ops.Tensor) else each for each in call.args]
        with np.errstate(all="ignore"):
            results = [np.array(each) for each in as_tuple(op.reference(*given, **call.constants))]
        for target, result in zip((*outputs, *call.written.values()), results, strict=True):
            before = target.numpy().copy()
            target.numpy()[...] = result.astype(target.numpy().dtype)
            change(call, target.numpy(), before)

    return Kernel("mine", "python", launch)


def at_one_length(call, result, before):
    if len(result) == 23:
        result[22] *= 1.001


def in_one_cache(call, result, before):
    if call.args[3].numpy().max() == 37:
        result[-1, -1] = 0


def in_one_head(call, result, before):
    result[..., 2, :] *= 1.0001


def last_row_unwritten(call, result, before):
    if len(result) > 1:
        result[-1] = before[-1]


def past_a_block(call, result, before):
    result[..., 32:] += 1e-3


def swept(model):
    """What the sweep finds; there must be something."""
    sweep = Sweep(model, [i * 7 % 256 for i in range(model.context)])
    with pytest.raises(Found) as found:
        sweep.run(time.monotonic() + 60)
    return found.value.finding


KERNELS = [
    (ops.silu_mul, "mlp/silu_mul[0]", at_one_length),
    (ops.attention, "self_attn/attention[0]", at_one_length),
    (ops.attention, "self_attn/attention[0]", in_one_cache),
    (ops.attention, "self_attn/attention[0]", in_one_head),
    (ops.rope, "self_attn/rope[0]", in_one_head),
    (ops.rms_norm, "post_attention_layernorm/rms_norm[0]", last_row_unwritten),
    (ops.silu_mul, "mlp/silu_mul[0]", past_a_block),
    (ops.linear, "mlp.down_proj/linear[0]", last_row_unwritten),
]


@pytest.mark.parametrize(("op", "at", "harm"), KERNELS, ids=lambda value: getattr(value, "__name__", value))
def test_a_wrong_kernel(rng, op, at, harm):
    layer = some_layer(rng)
    model, _ = patient(rng)
    where = f"layers.{layer}.{at}"
    with op.use(by_definition(op, harm), where=where):
        found = swept(model)
    assert (found.kind, found.address, found.op) == ("kernel", where, op.name), str(found)
    assert found.source.startswith("llm/models/llama.py:")
    assert "the kernel mine, which is in use for it," in found.message


@pytest.mark.parametrize("options", [{"dtype": "float16"}, {"packed": "q4"}])
def test_a_wrong_kernel_in_a_narrow_dtype_and_packed(rng, options):
    model, _ = patient(rng, **options)
    where = f"layers.{some_layer(rng)}.mlp.down_proj/linear[0]"
    with ops.linear.use(by_definition(ops.linear, last_row_unwritten), where=where):
        assert swept(model).address == where


def test_a_kernel_with_another_epsilon(rng):
    """It shows on small inputs only, and the model's are large."""
    model, _ = patient(rng)

    def careless(x, weight, *, eps, plus_one):
        return ops.rms_norm.reference(x, weight, eps=0.8 * eps, plus_one=plus_one)

    with ops.rms_norm.use(careless, where="norm"):
        assert swept(model).address == "norm/rms_norm[0]"


def test_a_nan_that_the_definition_has_too(rng):
    model, _ = patient(rng)
    layer = some_layer(rng)
    model.layers[layer].mlp.forward = lambda x: ops.div(ops.sub(x, x), ops.sub(x, x))
    found = swept(model)
    assert found.address == f"layers.{layer}.mlp/div[0]" and "is born here" in found.message


class Meddling(ops.Interceptor):
    """A tool that is on around the doctor and changes what a call gives."""

    def call(self, call, launch):
        output = launch(call)
        if call.address == "layers.1.self_attn.o_proj/linear[0]":
            output = ops.tensor(output.numpy() * np.float32(1.01))
        return output


def test_what_a_tool_does_that_is_on_is_found(rng):
    model, _ = patient(rng)
    handle = ops.install(Meddling())
    try:
        assert culprit(model).address == "layers.1.self_attn.o_proj/linear[0]"
    finally:
        handle.remove()
    with ops.intercepted(Meddling()):
        assert culprit(model).address == "layers.1.self_attn.o_proj/linear[0]"


def test_an_overflow(rng):
    layer = some_layer(rng)
    model, _ = patient(rng, "float16")
    model.layers[layer].mlp.down_proj.weight.numpy()[...] *= 3000
    found = culprit(model)
    assert found.address == f"layers.{layer}.mlp.down_proj/linear[0]" and "beyond the range of float16" in found.message


def test_memory_that_is_given_away_in_use(rng, monkeypatch):
    def reshape(self, *shape):
        view = right(self, *shape)
        view.owner = view.buffer  # not the tensor: it dies, and its memory is used again
        return view

    right = ops.Tensor.reshape
    model, _ = patient(rng)
    monkeypatch.setattr(ops.Tensor, "reshape", reshape)
    found = culprit(model, seconds=0)
    memory.clear()
    assert found.path.startswith("layers.0.self_attn") and "was overwritten by" in found.message


def test_the_sweep_tries_every_length(rng):
    model, _ = patient(rng, max_position_embeddings=200)
    tasks = dict(Sweep(model, [0] * 200)._tasks())
    assert {len(sizes) and sizes[0] for name, sizes in tasks.items() if name.startswith("prompt")} == {*range(1, 201)}
    assert tasks["caches of 0 to 199 tokens"] == [1] * 200
