"""Activation patching: against a plain loop over runs, on a model whose answer is known, and how it shows itself."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from typing import Any

import numpy as np
import pytest

import llm
import ops
from debug.activation import Effects, activation_patching, run_with_cache
from ops import OpError, SelectorError
from tests.llm.small import model

PROMPT = "Mia gave the red ball to {}. The ball now belongs to"


@pytest.fixture(scope="module")
def tiny() -> Any:
    return llm.load("tiny")


@pytest.fixture(scope="module")
def effects(tiny) -> Effects:
    return activation_patching(tiny, PROMPT.format("Tom"), PROMPT.format("Ben"), (" Tom", " Ben"))


class Put(ops.Interceptor):
    """Replaces a row of one module's output, by other means than a patch."""

    def __init__(self, path: str, row: int, value: np.ndarray):
        self.path, self.row, self.value = path, row, value

    def scope(self, scope: Any, run: Any) -> Any:
        output = run(*scope.args, **scope.constants)
        if scope.path != self.path:
            return output
        changed = output.numpy().copy()
        changed[self.row] = self.value
        return ops.tensor(changed)


class Pool(llm.Module):
    def forward(self, x: ops.Tensor) -> ops.Tensor:
        return x[-1:]


class Pooled(llm.Module):
    """Gives one row, whatever it is given."""

    def __init__(self) -> None:
        self.layers = [Pool()]

    def forward(self, ids: Any) -> ops.Tensor:
        x = ops.tensor(np.asarray(ids, "float32")[:, None])
        for layer in self.layers:
            x = layer(x)
        return x * 2.0


def test_against_a_plain_loop(rng):
    net = model(rng)
    clean, corrupted = rng.integers(0, 256, (2, 5)).tolist()
    corrupted[0] = clean[0]
    weights = rng.standard_normal(258)

    def metric(logits: np.ndarray) -> float:
        return float(logits[-1] @ weights)

    found = activation_patching(net, clean, corrupted, metric)
    best, worst = (metric(net(ids).numpy()) for ids in (clean, corrupted))
    _, recording = run_with_cache(net, clean)
    for kind, suffix in (("residual", ""), ("attention", ".self_attn"), ("mlp", ".mlp")):
        assert found[kind].shape == (3, 5)
        for (layer, position), effect in np.ndenumerate(found[kind]):
            path = f"layers.{layer}{suffix}"
            with ops.intercepted(Put(path, position, recording[path].output.numpy()[position])):
                expected = (metric(net(corrupted).numpy()) - worst) / (best - worst)
            assert effect == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert not found["residual"][:, 0].any(), "what both prompts share before they differ restores nothing"
    assert found["residual"][-1, -1] == pytest.approx(1.0, abs=1e-6), "the last row of the last layer is the answer"
    assert not found["residual"][-1, :-1].any()


def test_who_it_belongs_to_moves_from_the_name_to_the_end(tiny, effects):
    tokens = tiny.tokenizer.encode(PROMPT.format("Tom"))
    name, end = tokens.index(tiny.tokenizer.encode(" Tom", bos=False)[0]), len(tokens) - 1
    residual = effects["residual"]
    assert residual.shape == (4, len(tokens))
    assert residual[0].argmax() == name and residual[0, name] > 0.8
    assert residual[-1].argmax() == end and residual[-1, end] == pytest.approx(1.0, abs=1e-5)
    assert effects.clean > 5 > -5 > effects.corrupted


def test_run_with_cache_is_a_plain_run(rng):
    net = model(rng)
    logits, recording = run_with_cache(net, [1, 2, 3])
    assert np.array_equal(logits.numpy(), net([1, 2, 3]).numpy())
    assert recording["layers.1"].output.shape == (3, 32)
    assert np.array_equal(recording["lm_head/linear[0]"].output.numpy(), logits.numpy())
    _, some = run_with_cache(net, [1, 2, 3], where="layers.0/add")
    assert [each.address for each in some] == ["layers.0/add[0]", "layers.0/add[1]"]


def test_places_by_name_path_and_call(rng):
    net = model(rng)
    clean, corrupted = [5, 6], [5, 7]

    def of(where: Any) -> Effects:
        return activation_patching(net, clean, corrupted, (8, 9), where)

    assert list(of(["mlp", "layers.*.self_attn/attention[0]"]).matrices) == ["mlp", "layers.*.self_attn/attention[0]"]
    both = of({"after attention": "layers.*/add[0]", "whole": "layers.*"})
    assert both["after attention"].shape == (3, 2)
    assert np.array_equal(both["whole"], of("residual")["residual"])
    with pytest.raises(KeyError, match="after attention, whole"):
        both["residual"]
    with pytest.raises(
        SelectorError, match=r"'layers\.\*\.selfattn' means no place in this model; there is layers\.\d\.self_attn"
    ):
        of("layers.*.selfattn")
    with pytest.raises(OpError, match="has 0 `\\*`, expected one"):
        of("layers.1.mlp")


def test_layers_without_such_a_place_are_empty(rng):
    net = model(rng)

    class Other(llm.Module):
        def forward(self, x: ops.Tensor) -> ops.Tensor:
            return x

    net.layers[1].mlp, net.layers[1].mixer = Other(), net.layers[1].mlp
    found = activation_patching(net, [5, 6], [5, 7], (8, 9), {"mixer": "layers.*.mlp.down_proj"})
    assert np.isnan(found["mixer"][1]).all() and np.isfinite(found["mixer"][[0, 2]]).all()
    assert "??" in repr(found) and found._repr_html_()


def test_what_cannot_be_compared_says_so(tiny):
    with pytest.raises(OpError, match=r"clean prompt has 3 tokens, .* corrupted one 2, .*align token by token"):
        activation_patching(tiny, [1, 2, 3], [1, 2], (1, 2))
    with pytest.raises(OpError, match="nothing to restore"):
        activation_patching(tiny, [1, 2, 3], [1, 2, 4], lambda logits: 1.0)
    with pytest.raises(OpError, match="nothing to restore"):
        activation_patching(tiny, [1, 2, 3], [1, 2, 4], lambda logits: float("nan"))
    with pytest.raises(OpError, match="or two tokens"):
        activation_patching(tiny, [1, 2], [1, 3], (1, 2, 3))
    with pytest.raises(OpError, match="compares single tokens"):
        activation_patching(tiny, [1, 2], [1, 3], (" Tom", "extraordinary"))
    with pytest.raises(OpError, match="a row for each of the 2 tokens"):
        activation_patching(Pooled(), [1, 2], [1, 3], lambda logits: float(logits[0, 0]), "residual")


def test_without_a_tokenizer_ids_stand_for_tokens(rng):
    net = model(rng)
    net.tokenizer = None
    assert activation_patching(net, [5, 6], [5, 7], (8, 9), "mlp").labels == ["5", "6 → 7"]
    with pytest.raises(OpError, match="no tokenizer"):
        activation_patching(net, "ab", "cd", (8, 9))


def test_text(effects):
    lines = repr(effects).splitlines()
    assert "residual" in lines[1] and "attention" in lines[1] and "mlp" in lines[1]
    name = next(line for line in lines if "Tom → Ben" in line)
    assert "██" in name
    assert "██" in next(line for line in lines if line.startswith(f"{len(effects.tokens) - 1:3} to"))
    assert lines[3].split() == ["0", "<s>", *["·" * 8] * 3], "what has no effect is dots"
    assert re.search(r"residual: most at layer \d, position \d+ .*: \d\.\d\d", lines[-3])


def test_picture(effects, tmp_path):
    shown = effects.plot(tmp_path / "effects.svg")
    root = ElementTree.parse(tmp_path / "effects.svg").getroot()
    texts = [each.text for each in root.iter("{http://www.w3.org/2000/svg}text")]
    boxes = list(root.iter("{http://www.w3.org/2000/svg}rect"))
    assert len(boxes) == 3 * 4 * len(effects.tokens)
    assert {"residual", "attention", "mlp", "Tom → Ben", "<s>"} <= set(texts)
    titles = [each.text or "" for each in root.iter("{http://www.w3.org/2000/svg}title")]
    layer, position = np.unravel_index(effects["residual"].argmax(), effects["residual"].shape)
    assert any(title.startswith(f"residual, layer {layer}, position {position} ") for title in titles)
    assert shown.data == effects._repr_html_() and "http" not in shown.data.replace("http://www.w3.org/2000/svg", "")
    effects.plot(tmp_path / "effects.html")
    assert "<svg" in (tmp_path / "effects.html").read_text("utf-8")
    with pytest.raises(OpError, match=r"neither in \.svg nor in \.html"):
        effects.plot(tmp_path / "effects.png")


def test_tokens_are_escaped():
    hostile = "<script>&"
    effects = Effects({"mlp": np.array([[-0.5]])}, [hostile], [hostile], 1.0, 0.0)
    assert hostile not in effects._repr_html_() and "&lt;script&gt;&amp;" in effects._repr_html_()
    assert "-" in repr(effects).splitlines()[3]
