"""Wrong code of a model and a wrong cache are found by a reference: the op, the layer, the line."""

import dataclasses
from contextlib import contextmanager

import numpy as np
import pytest

import llm.cache
import ops
from debug.diagnosis import doctor
from llm.models.llama import MLP, Attention, Block
from llm.nn import Rotation

from .patients import culprit, patient, some_layer
from .twins import twin

HERE = "tests/debug/test_examination.py"


def norm_twice(self, x, rotate, cache):
    x = x + self.self_attn(self.input_layernorm(self.input_layernorm(x)), rotate, cache)
    return x + self.mlp(self.post_attention_layernorm(x))


def no_residual(self, x, rotate, cache):
    x = self.self_attn(self.input_layernorm(x), rotate, cache)
    return x + self.mlp(self.post_attention_layernorm(x))


def gate_and_up(self, x):
    return self.down_proj(ops.silu_mul(self.up_proj(x), self.gate_proj(x)))


def attend(self, x, rotate, cache, turned=True, scale=1.0, shift=0, **constants):
    n = x.shape[0]
    q, k, v = (each(x).reshape(n, -1, self.head_dim) for each in (self.q_proj, self.k_proj, self.v_proj))
    q, k = rotate(q), rotate(k) if turned else k
    keys, values = cache.write(k, v, rotate.positions)
    seen = ops.tensor(np.minimum(rotate.positions.numpy() + shift, keys.shape[0] - 1))
    mixed = ops.attention(q, keys, values, seen, scale=scale * self.head_dim**-0.5, **constants)
    return self.o_proj(mixed.reshape(n, -1))


def keys_not_turned(self, x, rotate, cache):
    return attend(self, x, rotate, cache, turned=False)


def no_scale(self, x, rotate, cache):
    return attend(self, x, rotate, cache, scale=self.head_dim**0.5)


def leaking_mask(self, x, rotate, cache):
    return attend(self, x, rotate, cache, shift=1)


def wide_window(self, x, rotate, cache):
    return attend(self, x, rotate, cache, window=9)


CODE = [
    (Block, norm_twice, "input_layernorm/rms_norm[0]"),
    (Block, no_residual, "post_attention_layernorm/rms_norm[0]"),
    (MLP, gate_and_up, "mlp/silu_mul[0]"),
    (Attention, keys_not_turned, "self_attn/cache_write[0]"),
    (Attention, no_scale, "self_attn/attention[0]"),
    (Attention, leaking_mask, "self_attn/attention[0]"),
    (Attention, wide_window, "self_attn/attention[0]"),
]


@contextmanager
def wrong_forward(model, kind, forward, layer):
    """`forward` in the place of one layer's."""
    chosen = next(each for _, each in model.layers[layer].modules() if type(each) is kind)
    chosen.forward = forward.__get__(chosen)
    yield
    del chosen.forward


@pytest.mark.parametrize(("kind", "forward", "at"), CODE, ids=lambda value: getattr(value, "__name__", ""))
def test_wrong_code(rng, kind, forward, at):
    layer = some_layer(rng)
    model, _ = patient(rng)
    right, _ = patient(rng)
    for name, weight in model.parameters():
        right.set_parameter(name, weight)
    for reference in (twin(model), right):
        with wrong_forward(model, kind, forward, layer):
            found = culprit(model, reference)
        assert (found.kind, found.address) == ("model", f"layers.{layer}.{at}"), str(found)
        assert found.source.startswith((HERE, "llm/cache.py")), found.source


def wrong_theta(model):
    model.rotary.parameters = dataclasses.replace(model.rotary.parameters, theta=10500.0)
    return "layers.0.self_attn/rope[0]", "with the reference's frequencies"


def wrong_interleaving(model):
    return "layers.0.self_attn/rope[0]", "with interleaved=False"


def wrong_eps(model):
    model.layers[1].post_attention_layernorm.eps = 1.2e-5
    return "layers.1.post_attention_layernorm/rms_norm[0]", "eps"


def test_a_layer_that_is_left_out(rng):
    model, _ = patient(rng, num_hidden_layers=3)
    theirs = twin(model)
    middle = model.layers[1]
    middle.forward = lambda x, rotate, cache: x
    found = culprit(model, theirs)
    assert found.kind == "model" and found.address == "layers.2.input_layernorm/rms_norm[0]", str(found)


@pytest.mark.parametrize("harm", [wrong_theta, wrong_interleaving, wrong_eps])
def test_wrong_constants(rng, monkeypatch, harm):
    model, _ = patient(rng)
    theirs = twin(model)
    if harm is wrong_interleaving:
        interleaved = lambda self, x: ops.rope(x, self.positions, self.frequencies, interleaved=True)  # noqa: E731
        monkeypatch.setattr(Rotation, "__call__", interleaved)
    address, told = harm(model)
    found = culprit(model, theirs)
    assert (found.kind, found.address) == ("model", address) and told in found.message, str(found)


def test_a_window_that_is_one_too_wide(rng):
    model, _ = patient(rng, model_type="mistral", sliding_window=8)
    theirs = twin(model)
    assert doctor(model, theirs, seconds=5).ok
    model.layers[1].self_attn.window = 9
    found = culprit(model, theirs)
    assert found.address == "layers.1.self_attn/attention[0]" and "window" in found.message


def test_a_window_that_the_text_does_not_fill(rng):
    model, _ = patient(rng, model_type="mistral", sliding_window=47)
    theirs = twin(model)
    model.layers[0].self_attn.window = 48
    found = culprit(model, theirs)
    assert found.address == "layers.0.self_attn/attention[0]"
    assert "its window is 48, the reference has 47" in found.message


@contextmanager
def patched(monkeypatch, owner, name, value):
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, value)
        yield


def row_too_low(self, keys, values, positions, right=llm.cache.Layer.write):
    if len(positions) == 1 and positions.item() > 20:
        positions = ops.tensor(positions.numpy() - 1)
    return right(self, keys, values, positions)


def truncated_too_far(self, length, right=llm.cache.Cache.truncate):
    right(self, max(length - 1, 0))


def last_row_lost(buffer, rows, cache, right=llm.cache._grown):
    larger = right(buffer, rows, cache)
    if buffer is not None and larger is not buffer:
        larger.numpy()[len(cache) - 1] = 0
    return larger


def late_positions(self, tokens, right=llm.cache.Cache.extend):
    positions = right(self, tokens)
    return ops.tensor(positions.numpy() + 1) if 1 < tokens < 10 and len(self) else positions


CUTS = [
    (llm.cache.Layer, "write", row_too_low, "layers.0.self_attn/cache_write[0]"),
    (llm.cache.Cache, "truncate", truncated_too_far, "layers.0.self_attn/rope[0]"),
    (llm.cache, "_grown", last_row_lost, "layers.0.self_attn/cache_write[0]"),
    (llm.cache.Cache, "extend", late_positions, "layers.0.self_attn/rope[0]"),
]


@pytest.mark.parametrize(("owner", "name", "wrong", "address"), CUTS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_wrong_cache(rng, monkeypatch, owner, name, wrong, address):
    model, pristine = patient(rng, max_position_embeddings=100)
    with patched(monkeypatch, owner, name, wrong):
        for reference in (pristine, twin(model)):
            found = culprit(model, reference)
            assert (found.kind, found.address) == ("cut", address), str(found)
