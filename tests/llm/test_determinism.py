"""The same seed gives the same text, every time, whatever else ran before and however many threads share the work.

Threads share rows, heads, and parts of the keys whose number does not depend on them: what one output is made of is
added up in one order.
"""

import hashlib
import json
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import ops
from llm.load import build
from ops.quantize import FORMATS

from . import small

FORMS = (*ops.spec.FLOATS, *FORMATS)
# Wide enough that every kind of kernel has work for several threads, in sizes that do not divide evenly; few of them,
# since each is a kernel for every form of weights.
WIDE = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2, "head_dim": 64, "vocab_size": 515}
WIDE |= {"num_attention_heads": 6, "num_key_value_heads": 3, "max_position_embeddings": 1200}
SPLIT = 900  # tokens in the cache from which on decoding's attention is shared, and some
LENGTHS = (1, 2, 17, 65, SPLIT)


def made(form: str, seed: int) -> Any:
    """The wide model; norms and activations are float32 where matrices are packed."""
    rng = np.random.default_rng(seed)
    packed = form in FORMATS
    model = build(small.CONFIG | WIDE, "float32" if packed else form, form if packed else None)
    for name, spec in list(model.parameters()):
        values = rng.standard_normal(spec.shape) * 0.1 + (1.0 if name.endswith("norm.weight") else 0.0)
        model.set_parameter(name, ops.tensor(values.astype("float32"), spec.dtype))
    model.tokenizer = small.tokenizer()
    return model


def told(model: Any, seed: int, tokens: int = 24) -> list[list[int]]:
    """Tokens of a greedy and of a sampled text."""
    options: list[dict[str, Any]] = [{}, {"temperature": 1.1, "top_k": 50, "top_p": 0.95, "seed": seed}]
    return [model.generate(list(range(1, 40)), max_tokens=tokens, **each).tokens for each in options]


def digests(model: Any, seed: int) -> list[str]:
    """Of the bits of all logits: of prompts of all kinds of lengths, and of tokens decoded after them."""
    rng, found = np.random.default_rng(seed), []
    for length in LENGTHS:
        cache = model.new_cache()
        for ids in (rng.integers(0, 256, length), *rng.integers(0, 256, (3, 1)), rng.integers(0, 256, 5)):
            found.append(hashlib.sha256(model(ids.tolist(), cache).numpy().tobytes()).hexdigest()[:16])
    return found


def everything(seed: int) -> dict[str, Any]:
    """What a process finds, for each form of weights."""
    return {form: [digests(made(form, seed), seed), told(made(form, seed), seed)] for form in FORMS}


@pytest.fixture(scope="module")
def by_threads() -> dict[int, dict[str, Any]]:
    """What processes of one thread and of two find for the same seed."""
    seed = int(os.environ.get("LIMPID_TEST_SEED", np.random.default_rng().integers(2**31)))
    code = f"import json\nfrom tests.llm import test_determinism as t\nprint(json.dumps(t.everything({seed})))"
    started = {
        threads: subprocess.Popen(
            [sys.executable, "-c", code], env=os.environ | {"LIMPID_THREADS": str(threads)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for threads in (1, 2)
    }  # fmt: skip
    found = {}
    for threads, process in started.items():
        out, err = process.communicate()
        assert process.returncode == 0, err
        found[threads] = json.loads(out)
    print(f"LIMPID_TEST_SEED={seed}")
    return found


@pytest.mark.parametrize("form", FORMS)
def test_the_number_of_threads_changes_no_bit(by_threads, form):
    one, two = (found[form] for found in by_threads.values())
    assert len(set(one[0])) == len(LENGTHS) * 5, "the logits say something of the tokens"
    assert one[0] == two[0], "logits"
    assert one[1] == two[1], "texts"


@pytest.mark.parametrize("form", FORMS)
def test_the_same_seed_tells_the_same_text_twenty_times(form, seed):
    model = made(form, seed)
    first, logits = told(model, seed), digests(model, seed)
    assert first[0] != first[1]
    for i in range(20):
        if i % 5 == 0:  # other work in between leaves other buffers and values in the pool
            digests(model, seed + i + 1)
        assert told(model, seed) == first
    assert digests(model, seed) == logits
