"""Small models for the doctor, and what it says of them when something is wrong."""

from __future__ import annotations

from typing import Any

import numpy as np

import ops
from debug.diagnosis import doctor
from debug.findings import Finding
from tests.llm import small

LAYERS = 2


def patient(
    rng: np.random.Generator, dtype: str = "float32", packed: str | None = None, **changes: Any
) -> tuple[Any, dict[str, np.ndarray]]:
    """A small model, and the weights that it should have, by their names in a checkpoint; `changes` to its config."""
    model = small.model(rng, dtype, **({"num_hidden_layers": LAYERS, "max_position_embeddings": 48} | changes))
    pristine = {name: weight.numpy().copy() for name, weight in model.named_tensors().items()}
    for name, weight in list(model.parameters()):
        if packed and weight.ndim == 2:
            model.set_parameter(name, ops.tensor(weight.numpy(), packed))
    return model, pristine


def some_layer(rng: np.random.Generator) -> int:
    """One of the layers."""
    return int(rng.integers(LAYERS))


def culprit(model: Any, reference: Any = "float64", seconds: float = 60.0) -> Finding:
    """The first finding; there must be one."""
    found = doctor(model, reference, seconds=seconds)
    assert not found.ok, str(found)
    return found.findings[0]
