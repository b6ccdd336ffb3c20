"""Rotary frequencies against transformers where it is installed, and against the papers' formulae in float64."""

import importlib
import math
import random
from typing import Any

import numpy as np
import pytest

from llm.rope import Rope, RopeScaling, frequencies, parse_rope

HEAD_DIM, LENGTH = 64, 4096
SEED = random.SystemRandom().randrange(2**32)


def factors(seed: int, count: int) -> list[float]:
    return [float(value) for value in np.random.default_rng(seed).uniform(1.0, 40.0, count)]


YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 512}
LONG = {
    "rope_type": "longrope",
    "original_max_position_embeddings": 1024,
    "short_factor": factors(SEED, HEAD_DIM // 2),
    "long_factor": factors(SEED + 1, HEAD_DIM // 2),
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}
CASES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "partial": {"rope_type": "default", "partial_rotary_factor": 0.5},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.5},
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn-truncate-off": {**YARN, "truncate": False, "beta_fast": 24.0, "beta_slow": 2.0},
    "yarn-mscale": {**YARN, "mscale": 0.8, "mscale_all_dim": 0.4},
    "yarn-one-mscale": {**YARN, "mscale": 0.8},
    "yarn-attention": {**YARN, "attention_factor": 1.25},
    "yarn-ratio": {**YARN, "factor": None},
    "yarn-default-original": {"rope_type": "yarn", "factor": 4.0},
    "longrope": LONG,
    "longrope-factor": {**LONG, "factor": 2.0},
    "longrope-attention": {**LONG, "attention_factor": 1.5},
}
THETAS = (10000.0, 500000.0)


def rope(name: str, theta: float) -> Rope:
    raw = {"max_position_embeddings": LENGTH, "rope_theta": theta, "rope_scaling": dict(CASES[name])}
    return parse_rope(raw, HEAD_DIM)


def reference_config(name: str, theta: float) -> tuple[Any, Any]:
    """torch and the LlamaConfig of a case; skips where they are not installed."""
    reason = "transformers and torch are not installed (they are the extra `parity`)"
    torch = pytest.importorskip("torch", reason=reason)
    transformers = pytest.importorskip("transformers", reason=reason)
    parameters = {"rope_theta": theta, **CASES[name]}
    return torch, transformers.LlamaConfig(
        hidden_size=2 * HEAD_DIM, num_attention_heads=2, max_position_embeddings=LENGTH, rope_parameters=parameters
    )


@pytest.mark.parametrize("seq_len", [1, 1024, 1025, LENGTH, LENGTH + 1, 3 * LENGTH])
@pytest.mark.parametrize("theta", THETAS)
@pytest.mark.parametrize("name", CASES)
def test_matches_transformers(name: str, theta: float, seq_len: int) -> None:
    torch, config = reference_config(name, theta)
    functions = importlib.import_module("transformers.modeling_rope_utils").ROPE_INIT_FUNCTIONS
    # The default type is written out in each model file; Phi3's also knows the partial rotation.
    phi3 = importlib.import_module("transformers.models.phi3.modeling_phi3")
    default = phi3.Phi3RotaryEmbedding.compute_default_rope_parameters
    make = functions.get(config.rope_parameters["rope_type"], default)
    want, want_factor = make(config, device=torch.device("cpu"), seq_len=seq_len)
    got, got_factor = frequencies(rope(name, theta), seq_len)
    assert got.dtype == np.float32 and got.shape == tuple(want.shape)
    # torch's float32 power is off by a bit in the last place here and there; ours is rounded correctly.
    relative = np.abs(got.astype(np.float64) / want.numpy() - 1).max()
    assert relative < 2.4e-7, f"seed {SEED}: {np.mean(got == want.numpy()):.0%} equal"
    assert got_factor == pytest.approx(want_factor, rel=1e-12)


@pytest.mark.parametrize("seq_len", [1024, 1025, LENGTH, LENGTH + 1, 3 * LENGTH])
@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_matches_what_a_forward_of_transformers_uses(name: str, seq_len: int) -> None:
    torch, config = reference_config(name, 10000.0)
    module = importlib.import_module("transformers.models.llama.modeling_llama").LlamaRotaryEmbedding(config)
    module(torch.zeros(1, 1, 1), torch.arange(seq_len)[None])
    # A forward of transformers computes the grown theta of "dynamic" in float32.
    np.testing.assert_allclose(frequencies(rope(name, 10000.0), seq_len)[0], module.inv_freq.numpy(), rtol=1e-6)


def plain(theta: float, dim: int = HEAD_DIM) -> np.ndarray:
    return theta ** -(np.arange(0, dim, 2) / dim)


def close(got: np.ndarray, want: np.ndarray) -> None:
    np.testing.assert_allclose(got, want, rtol=2e-6, err_msg=f"seed {SEED}")


@pytest.mark.parametrize("theta", THETAS)
def test_plain_partial_and_linear(theta: float) -> None:
    close(frequencies(rope("default", theta), 9)[0], plain(theta))
    close(frequencies(rope("partial", theta), 9)[0], plain(theta, HEAD_DIM // 2))
    close(frequencies(rope("linear", theta), 9)[0], plain(theta) / 3)
    assert frequencies(rope("linear", theta), 9)[1] == 1.0


@pytest.mark.parametrize("seq_len", [1, LENGTH, 2 * LENGTH, 5 * LENGTH])
def test_dynamic_grows_only_past_the_context(seq_len: int) -> None:
    grown = max(1.0, 2.5 * seq_len / LENGTH - 1.5)
    want = plain(10000.0 * grown ** (HEAD_DIM / (HEAD_DIM - 2)))
    close(frequencies(rope("dynamic", 10000.0), seq_len)[0], want)


@pytest.mark.parametrize("theta", THETAS)
def test_llama3_keeps_stretches_and_interpolates(theta: float) -> None:
    want = []
    for f in plain(theta):
        turns = 1024 * f / (2 * math.pi)  # within the original context
        blend = min(max((turns - 1) / (4 - 1), 0), 1)
        want.append(f / 8 * (1 - blend) + f * blend)
    close(frequencies(rope("llama3", theta), 9)[0], np.array(want))


def test_yarn_ramp_and_attention_factor() -> None:
    f = plain(10000.0)

    def dim_of(turns: float) -> float:
        return HEAD_DIM * math.log(512 / (turns * 2 * math.pi)) / (2 * math.log(10000.0))

    low, high = max(math.floor(dim_of(32)), 0), math.ceil(dim_of(1))
    ramp = np.clip((np.arange(HEAD_DIM // 2) - low) / (high - low), 0, 1)
    got, factor = frequencies(rope("yarn", 10000.0), 9)
    close(got, f / 8 * ramp + f * (1 - ramp))
    assert factor == pytest.approx(0.1 * math.log(8) + 1)
    m, m_all = 0.1 * 0.8 * math.log(8) + 1, 0.1 * 0.4 * math.log(8) + 1
    assert frequencies(rope("yarn-mscale", 10000.0), 9)[1] == pytest.approx(m / m_all)
    assert frequencies(rope("yarn-one-mscale", 10000.0), 9)[1] == factor
    assert frequencies(rope("yarn-attention", 10000.0), 9)[1] == 1.25
    assert np.array_equal(frequencies(rope("yarn-ratio", 10000.0), 9)[0], got)  # 4096 / 512 is 8 as well


@pytest.mark.parametrize(("seq_len", "key"), [(1, "short_factor"), (1024, "short_factor"), (1025, "long_factor")])
def test_longrope_chooses_by_length(seq_len: int, key: str) -> None:
    got, factor = frequencies(rope("longrope", 10000.0), seq_len)
    close(got, plain(10000.0) / np.array(LONG[key]))
    assert factor == pytest.approx(math.sqrt(1 + math.log(4) / math.log(1024)))
    assert frequencies(rope("longrope-factor", 10000.0), seq_len)[1] == pytest.approx(math.sqrt(1.1))
    assert frequencies(rope("longrope-attention", 10000.0), seq_len)[1] == 1.5


def test_an_incomplete_scaling_is_refused() -> None:
    with pytest.raises(ValueError, match="parse_rope"):
        frequencies(Rope(10000.0, 64, 128, RopeScaling("linear")), 9)
    with pytest.raises(ValueError, match="unknown rope type 'magic'"):
        frequencies(Rope(10000.0, 64, 128, RopeScaling("magic")), 9)
