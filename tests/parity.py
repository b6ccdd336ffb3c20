"""Parity with Hugging Face transformers on small random models: `python -m tests.parity` prints the table.

Each row: a random model with every parameter drawn (norms and biases too), saved by transformers and loaded here; a
prompt of 37 tokens, then 20 single steps. The figure is max|logit difference| / max|logit| over all of them.
"""

from __future__ import annotations

import argparse
import importlib.util
import secrets
import sys
import tempfile
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import llm

PROMPT, STEPS = 37, 20
BOUNDS = {"float32": 2e-4, "bfloat16": 1.6e-2}
CUTS = {"float32": 1e-5, "bfloat16": 8e-3}  # bfloat16: usually none; one rounding step of the largest logit at most

_SMALL = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 24.0}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def _longrope(head_dim: int) -> dict[str, Any]:
    half = head_dim // 2
    return {
        "rope_type": "longrope",
        "short_factor": [1.0 + 0.02 * i for i in range(half)],
        "long_factor": [1.0 + 0.5 * i for i in range(half)],
        "original_max_position_embeddings": 32,
    }


@dataclass
class Case:
    """One random model; `cuts` is False where the reference itself depends on how a text is cut."""

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    model_type: str = "llama"
    dtype: str = "float32"
    cuts: bool = True


def _rope(parameters: dict[str, Any]) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10000.0} | parameters}


CASES = [
    Case("llama, GQA, untied"),
    Case("llama, MHA, tied", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    Case("llama, MQA, head_dim 24", {"num_key_value_heads": 1, "head_dim": 24}),
    Case("llama, biases", {"attention_bias": True, "mlp_bias": True}),
    Case(
        "smollm2-shaped, 9 over 3 heads, tied",
        {"hidden_size": 144, "intermediate_size": 384, "num_attention_heads": 9, "num_key_value_heads": 3}
        | {"tie_word_embeddings": True}
        | _rope({"rope_type": "default", "rope_theta": 100000.0}),
    ),
    Case("llama, rope linear", _rope({"rope_type": "linear", "factor": 2.5})),
    Case("llama, rope llama3", _rope(_LLAMA3 | {"rope_theta": 500000.0})),
    Case("llama, rope yarn", _rope(_YARN)),
    Case("llama, rope yarn, attention factor", _rope(_YARN | {"attention_factor": 0.8})),
    Case(
        "llama, rope dynamic, past its length",
        {"max_position_embeddings": 32} | _rope({"rope_type": "dynamic", "factor": 4.0}),
        cuts=False,
    ),
    Case("llama, rope longrope, past its length", _rope(_longrope(16)), cuts=False),
    Case("mistral, window 8", {"sliding_window": 8}, "mistral"),
    Case("mistral, no window, MHA", {"sliding_window": None, "num_key_value_heads": 4}, "mistral"),
    Case("mistral, window 8, tied", {"sliding_window": 8, "tie_word_embeddings": True}, "mistral"),
    Case("llama, bfloat16", {"tie_word_embeddings": True}, dtype="bfloat16"),
    Case("mistral, window 8, bfloat16", {"sliding_window": 8}, "mistral", dtype="bfloat16"),
]


@dataclass
class Result:
    """What a case gave: errors relative to max|logit|; `cuts` None where it was not asked."""

    case: Case
    error: float
    cuts: float | None

    @property
    def passed(self) -> bool:
        dtype = self.case.dtype
        return self.error <= BOUNDS[dtype] and (self.cuts is None or self.cuts <= CUTS[dtype])


def run(case: Case, seed: int) -> Result:
    """Build the model of `case` from `seed` in transformers, load it here, and compare."""
    rng = np.random.default_rng(seed)
    theirs = _reference(case, seed)
    ids = rng.integers(0, theirs.config.vocab_size, PROMPT + STEPS)
    with tempfile.TemporaryDirectory() as work:
        theirs.save_pretrained(work)
        ours = llm.load(work)
        assert ours.dtype == case.dtype
        expected, actual = _theirs(theirs, ids), logits(ours, ids, [PROMPT] + [1] * STEPS)
        cuts = max(_relative(logits(ours, ids, cut), actual) for cut in _other_cuts(len(ids))) if case.cuts else None
    return Result(case, _relative(actual, expected), cuts)


def _reference(case: Case, seed: int) -> Any:
    import torch
    import transformers

    torch.manual_seed(seed)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    config = transformers.AutoConfig.for_model(case.model_type, **(_SMALL | case.config))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
            else:
                parameter.copy_(_deviation(case.dtype, name, parameter) * torch.randn_like(parameter))
    return model.to(getattr(torch, case.dtype)).eval()


def _deviation(dtype: str, name: str, parameter: Any) -> float:
    """Of the weights: large enough that every layer counts; in bfloat16 transformers' own 0.02, but for the scores.

    With all weights larger the bfloat16 reference is 1.5e-2 to 2.9e-2 away from itself in float32, and tells nothing;
    with none, attention is so even that positions do not matter.
    """
    if dtype == "bfloat16":
        return 0.1 if "q_proj" in name or "k_proj" in name else 0.02
    return 0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5


def _theirs(model: Any, ids: np.ndarray) -> np.ndarray:
    import torch

    rows = []
    with torch.no_grad():
        cache = None
        for part in np.split(ids, np.cumsum([PROMPT] + [1] * STEPS)[:-1]):
            output = model(torch.tensor(part)[None], cache=cache, use_cache=True)
            cache = output.cache
            rows.append(output.logits[0].float().numpy())
    return np.concatenate(rows)


def logits(model: Any, ids: np.ndarray, cut: list[int]) -> np.ndarray:
    """Logits [len(ids), vocabulary] in float32, computed in pieces of the sizes in `cut`."""
    cache = model.new_cache()
    pieces = np.split(ids, np.cumsum(cut)[:-1])
    return np.concatenate([model(piece, cache).numpy().astype("float32") for piece in pieces])


def _other_cuts(count: int) -> list[list[int]]:
    return [[count], [1] * count, [5, 16, 1, 20, count - 42]]


def _relative(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seed", type=int, default=None, help="repeat a run; default: a fresh one")
    chosen = parser.parse_args().seed
    if missing := [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]:
        print(f"tests.parity needs {' and '.join(missing)}: pip install -e '.[parity]'", file=sys.stderr)
        return 2
    seed = secrets.randbits(31) if chosen is None else chosen
    print(f"seed {seed}; prompt {PROMPT} tokens, then {STEPS} steps; errors relative to max|logit|")
    print(f"{'model':42} {'dtype':9} {'vs transformers':>16} {'other cuts':>11}")
    failed = 0
    for case in CASES:
        result = run(case, seed)
        failed += not result.passed
        cuts = "-" if result.cuts is None else f"{result.cuts:.2e}"
        verdict = "" if result.passed else "  FAILED"
        print(f"{case.name:42} {case.dtype:9} {result.error:16.2e} {cuts:>11}{verdict}", flush=True)
    print(f"{len(CASES) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
