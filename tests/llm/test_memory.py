"""What memory a model takes once it runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import ops

from .test_determinism import FORMS, made

_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_HUGE_PAGES = _SETTING.read_text() if _SETTING.exists() else "[never]"


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


@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "top_k": 40, "logprobs": 3}, {"repetition_penalty": 1.2}])
def test_a_warm_generation_allocates_nothing(options, seed):
    model = made("q4", seed)
    model.tokenizer.eos_ids = frozenset()  # it does not end early
    prompt = list(range(70))
    model.generate(prompt, max_tokens=3, **options)
    stream, counts = model.stream(prompt, max_tokens=40, **options), []
    for _ in stream:
        counts.append(allocations())
    assert len(stream.tokens) > 20 and len({*counts[2:]}) == 1


def test_a_step_that_keeps_its_logits_takes_memory_for_them(seed):
    """The counter counts."""
    model = made("float32", seed)
    cache = model.new_cache()
    model(list(range(70)), cache, logits_to_keep=1)
    for token in range(3):
        model([token], cache, logits_to_keep=1)
    model([3], cache, logits_to_keep=1).spec.free.clear()  # what waits in the pool
    before, kept = allocations(), [model([token], cache, logits_to_keep=1) for token in range(10)]
    assert len(kept) - 1 <= allocations() - before <= len(kept)  # the last one went back to the pool


@pytest.mark.skipif("[never]" in _HUGE_PAGES, reason="this system gives no pages of 2 MiB")
def test_packed_weights_lie_in_large_pages():
    memory = ops.memory.huge(32 * 2**20)
    memory[:] = 1
    with open("/proc/self/smaps") as file:
        maps = file.read().split("VmFlags")
    address = memory.ctypes.data
    here = next(each for each in maps if _covers(each.splitlines(), address))
    assert int(re.findall(r"AnonHugePages: +(\d+) kB", here)[0]) >= 16 * 1024


def _covers(lines: list[str], address: int) -> bool:
    """Whether a block of smaps is of the mapping that holds the address."""
    found = next((re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line) for line in lines if re.match(r"[0-9a-f]+-", line)), None)
    return found is not None and int(found[1], 16) <= address < int(found[2], 16)


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
