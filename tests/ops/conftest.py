import pytest

import ops

from .harness import random


@pytest.fixture
def x(rng) -> ops.Tensor:
    return ops.tensor(random(rng, (3, 8), "float32"))
