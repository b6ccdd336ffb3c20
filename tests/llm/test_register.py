"""A model class that lies in no file of `llm/models`: `llm.register` makes `llm.load` find it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import llm
from llm import models
from llm.errors import ConfigError
from llm.models import llama
from tests.llm import small

IDS = [3, 1, 4, 1, 5]


@dataclass(kw_only=True)
class Config(llama.Config):
    doubled: bool = False


class Mine(llama.Llama):
    model_type = "mine"

    def forward(self, ids: Any, cache: Any = None, logits_to_keep: int = 0) -> Any:
        logits = super().forward(ids, cache, logits_to_keep)
        return logits * 2.0 if self.config.doubled else logits


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    monkeypatch.setattr(models, "_REGISTERED", {})


def stored(rng, path, **changes: Any) -> tuple[Any, Any]:
    """A Llama, and the folder of its checkpoint with a changed config."""
    model = small.model(rng)
    config = model.save(path / "model") / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    return model, config.parent


def test_it_is_loaded_and_saved(rng, tmp_path):
    plain, path = stored(rng, tmp_path, model_type="mine", doubled=True)
    with pytest.raises(ConfigError, match=r"'mine' is not supported; .*llama.*, and what llm\.register adds"):
        llm.load(path)
    llm.register(Mine, Config)
    model = llm.load(path)
    assert type(model) is Mine
    assert np.array_equal(model(IDS).numpy(), 2 * plain(IDS).numpy())
    again = llm.load(model.save(tmp_path / "again"))
    assert (type(again), again.config) == (Mine, model.config)


def test_the_last_one_wins_also_over_a_family_of_limpids(rng, tmp_path):
    _, path = stored(rng, tmp_path, doubled=True)
    with pytest.raises(ConfigError, match="unknown key 'doubled'"):
        llm.load(path)
    first, second = (type(name, (Mine,), {"model_type": "llama"}) for name in ("First", "Second"))
    llm.register(first, Config)
    llm.register(second, Config)
    assert type(llm.load(path)) is second


@pytest.mark.parametrize(
    ("model", "config", "message"),
    [
        (Config, Mine, r"takes a subclass of llm\.Model and its config class, given .*Config"),
        (Mine, dict, r"the config class of Mine must be a dataclass, given <class 'dict'>"),
        (type("Nameless", (llm.Model,), {}), Config, "Nameless has no model_type: name it as config.json does"),
    ],
)
def test_classes_of_another_kind(model, config, message):
    with pytest.raises(TypeError, match=message):
        llm.register(model, config)
    assert not models._REGISTERED
