"""The bugs are what they say, and the doctor finds them. `python -m tests.bug_hunt` says it in a table."""

from __future__ import annotations

import contextlib
import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest

import ops
from ops.quantize import FORMATS
from tests.bug_hunt import factory
from tests.bug_hunt.bug import ROOT, Bug, Place
from tests.bug_hunt.bugs import BUGS
from tests.bug_hunt.effect import distance, output_at, rounding, transcript
from tests.bug_hunt.hunt import TOKENS, clean, hunt
from tests.bug_hunt.judge import judge

QUICK = ("one sign", "rope interleaved", "a row too far")
HAS_PEER = importlib.util.find_spec("transformers") and importlib.util.find_spec("torch")
by_name = pytest.mark.parametrize(
    "bug", [pytest.param(bug, id=name, marks=[pytest.mark.slow] * (name not in QUICK)) for name, bug in BUGS.items()]
)


class _Lines(ops.Interceptor):
    """Where every call is made, and at which line."""

    def __init__(self):
        self.seen: set[tuple[str, str]] = set()

    def call(self, call, launch):
        self.seen.add((call.address, call.source))
        return launch(call)


@by_name
def test_a_bug_shows_and_goes_without_a_trace(bug, rng):
    with contextlib.closing(factory.draw(rng, **bug.recipe)) as pair:
        ids = factory.prompt(rng, pair.model, TOKENS)
        bound = 10 * rounding(pair.model, ids[:40])
        right = transcript(pair.model, ids)
        with bug.plant(pair.model):
            transcript(pair.model, ids[::-1])  # other tokens: what a stale buffer holds then is theirs
            wrong = transcript(pair.model, ids)
        # Where activations are rounded to int8, the last bit of one moves the logits by 1e-2: the call itself tells.
        assert distance(wrong, right) > bound or (_is_packed(bug) and _shows_at_its_call(bug, pair.model, ids[:40]))
        np.testing.assert_array_equal(transcript(pair.model, ids), right)


def _is_packed(bug):
    return bug.recipe.get("held") in FORMATS


def _shows_at_its_call(bug, model, ids):
    address = bug.places[0].address
    right = output_at(model, ids, address)
    bound = 10 * distance(output_at(model, ids, address, numpy=True), right)
    with bug.plant(model):
        return distance(output_at(model, ids, address), right) > max(bound, 1e-4)


@by_name
def test_the_truth_is_a_call_that_the_model_makes(bug, rng, monkeypatch):
    monkeypatch.chdir(ROOT)
    lines = _Lines()
    with contextlib.closing(factory.draw(rng, **bug.recipe)) as pair:
        with bug.plant(pair.model), ops.intercepted(lines):
            transcript(pair.model, factory.prompt(rng, pair.model, TOKENS))
        parameters = dict(pair.model.parameters())
    made = {address for address, _ in lines.seen}
    for each in bug.places:
        file, line = each.source
        assert each.address in made
        own = (each.address, f"{file.relative_to(ROOT)}:{line}") in lines.seen
        assert own or len(bug.places) > 1  # the line around a call may count too, beside its own
    assert all(name in parameters or name.endswith(".bias") for name in bug.parameters)


def test_there_are_enough():
    assert len(BUGS) >= 32
    assert {bug.reference for bug in BUGS.values()} == {"hf", "float64", "weights"}


# ---- the judge


def _diagnosis(**changes):
    """Of a rope in layer 0, but for the `changes`; with ok=True, of nothing."""
    told: dict = {"address": "layers.0.self_attn/rope[0]", "op": "rope", "path": "layers.0.self_attn", "source": "?"}
    told |= {"parameter": None, "ok": False} | changes
    return SimpleNamespace(ok=told["ok"], findings=[] if told["ok"] else [SimpleNamespace(**told)])


def test_the_judge_wants_all_of_it(monkeypatch, tmp_path):
    bug = BUGS["rope theta"]
    file, line = bug.places[0].source
    right = f"{file.relative_to(ROOT)}:{line}"
    assert judge(bug, _diagnosis(source=right)).found
    assert judge(bug, _diagnosis(source=f"{file}:{line}")).found
    monkeypatch.chdir(tmp_path)
    assert judge(bug, _diagnosis(source=f"{file}:{line}")).found
    for changes in (
        {"ok": True}, {"source": f"{file}:{line + 1}"}, {"source": f"llm/models/mistral.py:{line}"}, {"op": "linear"},
        {"address": "layers.0.self_attn/rope[1]"}, {"path": "layers.0"}, {"parameter": "norm.weight"}, {"source": "?"},
    ):  # fmt: skip
        assert not judge(bug, _diagnosis(**{"source": right} | changes)).found, changes


@pytest.mark.parametrize("name", ["layers.2.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight"])
def test_the_judge_wants_the_weight(name):
    bug = BUGS["one sign"]
    place = bug.places[0]
    file, line = place.source
    told = {"address": place.address, "op": place.op, "path": place.path, "source": f"{file}:{line}"}
    assert judge(bug, _diagnosis(**told, parameter=name)).found
    assert not judge(bug, _diagnosis(**told)).found
    assert not judge(bug, _diagnosis(**told, parameter="layers.2.mlp.gate_proj.weight")).found


def test_the_judge_takes_one_place_as_a_whole():
    first, second = Place("a/add[0]", _diagnosis, "told |="), Place("b/add[0]", _diagnosis, "return ")
    bug = Bug("two", BUGS["eps"].plant, (first, second), "hf")
    file, line = second.source
    said = {"address": "b/add[0]", "op": "add", "path": "b"}
    assert judge(bug, _diagnosis(**said, source=f"{file}:{line}")).found
    assert not judge(bug, _diagnosis(**said, source=f"{file}:{first.source[1]}")).found


# ---- the hunt itself


@by_name
def test_the_doctor_finds_it(bug, seed):
    if bug.reference == "hf" and not HAS_PEER:
        pytest.skip("transformers and torch are not installed: pip install -e '.[parity]'")
    verdict = hunt(bug, seed).verdict
    assert verdict.found, f"{verdict.said}: {'; '.join(verdict.wrong)}"


@pytest.mark.slow
@pytest.mark.skipif(not HAS_PEER, reason="transformers and torch are not installed: pip install -e '.[parity]'")
def test_clean_models_are_clean(seed):
    assert [each for each in clean(seed, 60.0) if not each.verdict.found] == []
