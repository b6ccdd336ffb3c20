"""A random model of each family whose layout is not Llama's, made by transformers with most of it switched on."""

from __future__ import annotations

import os
import secrets
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import parity

# One draw for all tests of a run, that models are made once; LIMPID_TEST_SEED repeats one.
SEED = int(os.environ.get("LIMPID_TEST_SEED", secrets.randbits(32))) % 2**31

# The case of a family in which most is switched on.
FULL = {
    "gpt2": "gpt2, scaled by layer, upcast, untied",
    "gpt_neox": "gpt_neox, no attention biases, all rotates, yarn",
    "phi": "phi, norms of queries and keys, a quarter rotates",
    "stablelm": "stablelm, parallel, biases, head norms, tied",
    "starcoder2": "starcoder2, gelu, window 8, head_dim 24",
    "olmo": "olmo, clipped, GQA, biases, tied, yarn",
    "olmo2": "olmo2, biases, tied, MHA, yarn",
    "mixtral": "mixtral, window 8, one expert, head_dim 24, tied",
    "qwen3_moe": "qwen3_moe, normalised, every second, window 8",
    "gpt_oss": "gpt_oss, yarn, window 8, sinks",
    "deepseek_v2": "deepseek_v2, groups, yarn with mscale, tied",
    "deepseek_v3": "deepseek_v3, groups, yarn with mscale",
    "rwkv": "rwkv, halved every 2 layers",
    "mamba2": "mamba2, two groups, biases, limited steps, tied",
}


KINDS = ("gpt2", "mixtral", "mamba2")  # one of each kind, which the suite has; the marker has all
CASES = [pytest.param(each, marks=() if each in KINDS else pytest.mark.families) for each in FULL]


def needs_the_extra() -> None:
    print(f"LIMPID_TEST_SEED={SEED}")
    for name in ("torch", "transformers"):
        pytest.importorskip(name, reason="the parity extra is not installed: pip install -e '.[parity]'")


@cache
def made(family: str, seed: int) -> tuple[Any, np.ndarray]:
    """transformers' model of the family's full case, and the ids to try it with."""
    case = next(each for each in parity.CASES if each.name == FULL[family])
    theirs = parity.reference(case, seed)
    return theirs, np.random.default_rng(seed).integers(0, theirs.config.vocab_size, parity.PROMPT + parity.STEPS)


def stored(theirs: Any, path: Path) -> Path:
    theirs.save_pretrained(path)
    return path


@cache
def expected(family: str, seed: int) -> np.ndarray:
    """Its logits."""
    return parity._theirs(*made(family, seed))


def error(ours: Any, ids: np.ndarray, wanted: np.ndarray, steps: int = parity.STEPS) -> float:
    """Of logits over the prompt and some single steps."""
    count = parity.PROMPT + steps
    return parity._relative(parity.logits(ours, ids[:count], [parity.PROMPT] + [1] * steps), wanted[:count])
