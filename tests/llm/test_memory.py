"""What memory a model takes once it runs."""

import subprocess
import sys

import pytest

import ops

from .test_determinism import FORMS, made


def allocations() -> int:
    return ops.memory.statistics()["allocations"]


@pytest.mark.parametrize("form", FORMS)
def test_a_warm_decode_step_allocates_nothing(form, seed):
    model = made(form, seed)
    cache = model.new_cache()
    model(list(range(70)), cache, logits_to_keep=1)  # the cache grows with the next token, and then not for long
    for token in range(3):
        model([token], cache, logits_to_keep=1)
    capacity, before = cache.capacity, allocations()
    for token in range(30):
        model([token], cache, logits_to_keep=1)
        assert allocations() == before, f"in step {token}"
    assert (cache.capacity, len(cache)) == (capacity, 103)


def test_a_step_that_keeps_its_logits_takes_memory_for_them(seed):
    """The counter counts."""
    model = made("float32", seed)
    cache = model.new_cache()
    model(list(range(70)), cache, logits_to_keep=1)
    for token in range(3):
        model([token], cache, logits_to_keep=1)
    before, kept = allocations(), [model([token], cache, logits_to_keep=1) for token in range(10)]
    assert len(kept) - 1 <= allocations() - before <= len(kept)  # one buffer may wait in the pool


def test_peak_memory_sees_what_was_there_for_a_moment():
    code = """
import ops
from llm.info import peak_memory

before = peak_memory()
block = ops.zeros((256 * 2**20,), "uint8")
del block
ops.memory.clear()
print(peak_memory() - before)
"""
    grown = int(subprocess.check_output([sys.executable, "-c", code]))
    assert 200 * 2**20 < grown < 400 * 2**20
