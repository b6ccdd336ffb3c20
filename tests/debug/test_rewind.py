"""Going back in a pass and on again: to the bit what a straight run gives, and an edited one what it gives edited."""

from __future__ import annotations

import bdb
import re
from typing import Any

import numpy as np
import pytest

import ops
from debug import rewind
from debug.stop import stop, stops
from llm.nn import Module
from tests.debug.typed import typed
from tests.llm import small

BEFORE = {"prefill": 0, "decode": 21, "growth": 63}  # tokens in the cache; its first buffers hold 64
NEW = {"prefill": 9, "decode": 1, "growth": 3}


class Case:
    """A model and a cache that holds tokens; each `run` goes on from the same state."""

    def __init__(self, rng: np.random.Generator, phase: str, dtype: str = "float32"):
        self.model = small.model(rng, dtype)
        self.cache = self.model.new_cache()
        if BEFORE[phase]:
            self.model(rng.integers(0, 256, BEFORE[phase]), self.cache)
        self.ids = rng.integers(0, 256, NEW[phase])

    def run(self) -> tuple[np.ndarray, list[np.ndarray]]:
        """The logits, and what the cache holds afterwards, as bits."""
        cache = self.cache.copy()
        logits = self.model(self.ids, cache)
        assert len(cache) == len(self.cache) + len(self.ids)
        held = [each.numpy()[: len(cache)] for i in range(3) for each in (cache[i].keys, cache[i].values)]
        return bits(logits.numpy()), [bits(each) for each in held]


def bits(array: np.ndarray) -> np.ndarray:
    return array.copy().view(f"u{array.itemsize}")


def same(actual: Any, expected: Any) -> bool:
    return all(np.array_equal(a, b) for a, b in zip((actual[0], *actual[1]), (expected[0], *expected[1]), strict=True))


class Changes(ops.Interceptor):
    """What a session edits, done by a program: `make(call, launch)` stands for the call at an address."""

    def __init__(self, address: str, make: Any):
        self.address, self.make = address, make

    def call(self, call: ops.Call, launch: Any) -> Any:
        return self.make(call, launch) if call.address == self.address else launch(call)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("phase", BEFORE)
def test_back_and_on_is_a_straight_run(rng, monkeypatch, phase, dtype):
    case = Case(rng, phase, dtype)
    straight = case.run()
    session = typed(
        monkeypatch,
        "p call.address", "goto layers.1.mlp",
        "p call.address", "back",
        "p call.address", "goto layers.0.self_attn",
        "p call.address", "c",
        "rerun layers.0/add[0]",  # at the stop again
        "p output.shape", "goto embed_tokens",
        "p call.address", "rerun", "p output.shape", "back 2", "c",
        "c",
    )  # fmt: skip
    with stop("layers.2.self_attn/attention[0]") as s:
        again = case.run()
    assert same(again, straight)
    addresses = [
        "layers.2.self_attn/attention[0]", "layers.1.mlp.gate_proj/linear[0]",
        "layers.1.post_attention_layernorm/rms_norm[0]", "layers.0.self_attn.q_proj/linear[0]",
        "embed_tokens/embedding[0]",
    ]  # fmt: skip
    shown = [line.removeprefix("(Pdb) ") for line in session.said.splitlines()]
    assert [line.strip("'") for line in shown if line.startswith("'")] == addresses
    tokens = len(case.ids)
    assert shown.count(f"({tokens}, 4, 8)") == 1  # the attention, after its launch
    assert shown.count(f"({tokens}, 32)") == 1  # the embedding
    assert "back 2: this pass has 0 calls before this one" in session.said
    assert not session.left
    assert (s.hits, s.stopped) == (4, 3)  # the call was made anew four times, once on the way of `rerun`


@pytest.mark.parametrize("phase", BEFORE)
def test_a_tensor_edited_in_place(rng, monkeypatch, phase):
    case = Case(rng, phase)
    address = "layers.1.self_attn/attention[0]"

    def fresh(call: ops.Call, launch: Any) -> Any:
        call.inputs["q"].numpy()[-1, 1] *= -3.0
        return launch(call)

    with ops.intercepted(Changes(address, fresh)):
        wanted = case.run()
    for place in ("layers.0", "layers.1.self_attn.k_proj", "layers.1.self_attn/rope[1]"):
        session = typed(monkeypatch, 'call.inputs["q"].numpy()[-1, 1] *= -3.0', f"goto {place}", "c", "c")
        with stop(address):
            again = case.run()
        assert same(again, wanted), place
        assert not session.left
    assert not same(case.run(), wanted)


@pytest.mark.parametrize("phase", BEFORE)
def test_a_replaced_input_and_output(rng, monkeypatch, phase):
    case = Case(rng, phase)

    def fresh_input(call: ops.Call, launch: Any) -> Any:
        doubled = ops.tensor(call.inputs["x"].numpy() * np.float32(2.0))
        return launch(call.replace((doubled, *call.args[1:])))

    def fresh_output(call: ops.Call, launch: Any) -> Any:
        return ops.tensor(launch(call).numpy() + np.float32(0.5))

    normed, added = "layers.0.post_attention_layernorm/rms_norm[0]", "layers.1/add[0]"
    with ops.intercepted(Changes(normed, fresh_input), Changes(added, fresh_output)):
        wanted = case.run()
    session = typed(
        monkeypatch,
        'edit x = call.inputs["x"].numpy() * 2.0', "c",
        "rerun", "output = output.numpy() + 0.5", "goto layers.1",  # the edit of layer 0 is behind it
        "c", "goto layers.0", "c", "c", "c",  # and before it: both stops come again
    )  # fmt: skip
    with stop(f"{normed}, {added}"):
        again = case.run()
    assert same(again, wanted)
    assert not session.left


def test_an_edit_after_the_launch_changes_the_output(rng, monkeypatch):
    case = Case(rng, "prefill")
    address = "layers.0.mlp/silu_mul[0]"

    def fresh(call: ops.Call, launch: Any) -> Any:
        output = launch(call)
        output.numpy()[:, 3] = 0.0
        return ops.tensor(np.full(output.shape, 0.25, "float32") * output.numpy())

    with ops.intercepted(Changes(address, fresh)):
        wanted = case.run()
    session = typed(
        monkeypatch,
        "rerun", "output.numpy()[:, 3] = 0.0", "edit output = 0.25 * output.numpy()", "goto embed_tokens", "c", "c",
    )  # fmt: skip
    with stop(address):
        again = case.run()
    assert same(again, wanted)
    assert not session.left


@pytest.mark.parametrize("phase", ["decode", "growth"])
def test_a_cache_edited_in_place(rng, monkeypatch, phase):
    """Rows from before the pass, and one that it wrote: a fresh run has them before the edit as they were."""
    case = Case(rng, phase)
    address, row = "layers.1.self_attn/attention[0]", len(case.cache)

    def fresh(call: ops.Call, launch: Any) -> Any:
        call.inputs["k"].numpy()[[2, row]] = 0.5
        return launch(call)

    with ops.intercepted(Changes(address, fresh)):
        wanted = case.run()
    for place in ("layers.0", "layers.1.self_attn/cache_write[0]"):
        session = typed(monkeypatch, f'call.inputs["k"].numpy()[[2, {row}]] = 0.5', f"goto {place}", "c", "c")
        with stop(address):
            again = case.run()
        assert same(again, wanted), place
        assert not session.left


def test_a_variable_of_the_model_edited_in_place(rng, monkeypatch):
    """`x` is normed by this call, and added again later."""
    case = Case(rng, "prefill")

    def fresh(call: ops.Call, launch: Any) -> Any:
        frame = call.frame
        assert frame is not None
        frame.f_locals["x"].numpy()[0] = 1.5
        return launch(call)

    with ops.intercepted(Changes("layers.1.post_attention_layernorm/rms_norm[0]", fresh)):
        wanted = case.run()
    session = typed(monkeypatch, "x.numpy()[0] = 1.5", "goto layers.0/add[1]", "c", "c")
    with stop("layers.1.post_attention_layernorm"):
        again = case.run()
    assert same(again, wanted)
    assert not session.left


@pytest.mark.parametrize("place", ["layers.0", "layers.1.self_attn"])
def test_a_variable_of_an_outer_frame_edited_in_place(rng, monkeypatch, place):
    case = Case(rng, "prefill")

    def fresh(call: ops.Call, launch: Any) -> Any:
        block = call.frame
        while block is not None and block.f_code.co_qualname != "Block.forward":
            block = block.f_back
        assert block is not None
        block.f_locals["x"].numpy()[0] = 1.5
        return launch(call)

    with ops.intercepted(Changes("layers.1.self_attn/rope[0]", fresh)):
        wanted = case.run()
    session = typed(monkeypatch, "up", "x.numpy()[0] = 1.5", f"goto {place}", "c", "c")
    with stop("layers.1.self_attn/rope[0]"):
        again = case.run()
    assert same(again, wanted)
    assert not session.left


def replaced(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    return gate * up


def test_a_replaced_kernel(rng, monkeypatch):
    """What came before the place that a rewind goes to stays as it was computed."""
    case = Case(rng, "decode")
    with ops.silu_mul.use(replaced, where="layers.1-2"):
        wanted = case.run()
    monkeypatch.setattr("llm.models.llama.replaced", replaced, raising=False)
    session = typed(monkeypatch, "used = ops.silu_mul.use(replaced)", "rerun", "goto layers.1.mlp", "rerun", "c", "c")
    try:
        with stop("layers.1.mlp/silu_mul[0]"):
            again = case.run()
    finally:
        for use in ops.silu_mul._uses:
            use.remove()
    assert same(again, wanted)
    assert not session.left


def test_undo(rng, monkeypatch):
    case = Case(rng, "decode")
    straight = case.run()
    session = typed(
        monkeypatch,
        'call.inputs["x"].numpy()[...] = 0.0', "edit weight = 1.0", "rerun", "output.numpy()[...] = 3.0",
        "edit output = 2.0", "goto layers.0", "c", "undo", "c",
    )  # fmt: skip
    with stop("layers.1.input_layernorm"):
        again = case.run()
    assert same(again, straight)
    assert not session.left


class InPlace(Module):
    """A layer that changes its input's memory: what an op gave is not what is there later."""

    def __init__(self, layer: Any):
        self.layer = layer

    def forward(self, x: ops.Tensor, rotate: Any, cache: Any) -> ops.Tensor:
        x.numpy()[...] *= 1.25
        return self.layer(x, rotate, cache)


def test_a_model_that_changes_tensors_in_place(rng, monkeypatch):
    case = Case(rng, "prefill")
    case.model.layers[1] = InPlace(case.model.layers[1])
    straight = case.run()
    session = typed(monkeypatch, "goto layers.1.layer.mlp", "goto layers.0.mlp", "c", "c")
    with stop("layers.2/add[1]"):
        again = case.run()
    assert same(again, straight)
    assert not session.left


def test_an_op_that_runs_as_its_steps(rng, monkeypatch):
    case = Case(rng, "decode")
    with ops.attention.steps():
        straight = case.run()
        session = typed(
            monkeypatch, "goto layers.1.self_attn.attention", "p call.address", "rerun", "back", "p call.address",
            "goto layers.0.self_attn.attention/mix", "c", "c",
        )  # fmt: skip
        with stop("layers.2.self_attn/attention[0]"):
            again = case.run()
    assert same(again, straight)
    assert re.findall(r"^\(Pdb\) '(layers.*)'$", session.said, re.M) == [
        "layers.1.self_attn.attention/scores[0]", "layers.1.self_attn/attention[0]",
    ]  # fmt: skip
    assert session.said.count("-> mixed = ops.attention(") == 6  # steps are made where the op is called
    assert not session.left


def test_without_room_to_keep_outputs(rng, monkeypatch):
    case = Case(rng, "prefill")
    straight = case.run()
    monkeypatch.setattr(rewind, "LIMIT", 3000)
    session = typed(monkeypatch, "goto layers.1.mlp", "back 3", "c", "c")
    with stop("layers.2/add[0]"):
        again = case.run()
    assert same(again, straight)
    assert not session.left


def test_every_pass_of_a_text(rng, monkeypatch):
    model = small.model(rng)
    prompt = rng.integers(0, 256, 60).tolist()  # the cache grows on the way
    straight = model.generate(prompt, max_tokens=12)
    session = typed(monkeypatch, *["goto layers.0.self_attn", "c", "c"] * 40)
    with stop("layers.1.self_attn/cache_write[1]") as s:
        again = model.generate(prompt, max_tokens=12)
    assert again.tokens == straight.tokens
    assert s.stopped == 2 * len(straight.tokens) > 0 or straight.finish_reason == "stop"
    assert "Stop at layers.0.self_attn.q_proj/linear[0]" in session.said


def test_what_cannot_be_gone_to(rng, monkeypatch):
    case = Case(rng, "prefill")
    session = typed(
        monkeypatch, "goto layers.2", "goto layers.0.self_atn", "goto", "back 100", "back x", "rerun layers.7",
        "edit z = 1", "edit x = np_is_not_here", "edit x = [1.0, 2.0]", "n", "n", "back", "q",
    )  # fmt: skip
    with pytest.raises(bdb.BdbQuit), stop("layers.1.input_layernorm"):
        case.run()
    said = session.said
    assert "layers.2: no such call in this pass so far" in said
    assert "layers.0.self_atn: no such call in this pass so far; nearest: layers.0.self_attn" in said
    assert "goto takes an address" in said
    assert "back 100: this pass has" in said
    assert "invalid literal for int()" in said
    assert "edit takes NAME = VALUE, the name one of x, weight; given 'z = 1'" in said
    assert "name 'np_is_not_here' is not defined" in said
    assert "x is float32[9, 32]; given shape [2]" in said
    assert "this works at a stop, while its call is under way" in said


def test_a_call_outside_a_pass_has_no_past(rng, monkeypatch):
    x = ops.tensor(rng.standard_normal((3, 4)).astype("float32"))
    session = typed(monkeypatch, "back", "rerun", "p output.shape", "edit output = 7.0", "c")
    with stop("/neg"):
        result = ops.neg(x)
    assert "this pass cannot be gone back in" in session.said
    assert (result.numpy() == 7.0).all()
    assert not session.left


def test_nothing_is_left_behind(rng):
    case = Case(rng, "decode")
    with pytest.raises(ops.SelectorError, match="meant none of the calls"), stop("layers.9"):
        case.run()
    assert stops() == ()
    assert not ops.intercept.chain()
