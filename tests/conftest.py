import os
import secrets

import numpy as np
import pytest


@pytest.fixture
def seed() -> int:
    """A fresh seed every run, shown when a test fails; LIMPID_TEST_SEED repeats one."""
    chosen = int(os.environ.get("LIMPID_TEST_SEED", secrets.randbits(32)))
    print(f"LIMPID_TEST_SEED={chosen}")
    return chosen


@pytest.fixture
def rng(seed) -> np.random.Generator:
    return np.random.default_rng(seed)
