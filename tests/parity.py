"""Parity with Hugging Face transformers on small random models: `python -m tests.parity` prints the table.

Each row: a random model with every parameter drawn (norms and biases too), saved by transformers and loaded here; a
prompt of 37 tokens, then 24 single steps. The figure is max|logit difference| / max|logit| over all of them. In float32
64 tokens are then generated greedily by both, and must be the same.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import re
import secrets
import sys
import tempfile
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import debug
import llm
from tests.parity_more import BASES, MORE

PROMPT, STEPS, GREEDY = 37, 24, 64
BOUNDS = {"float32": 2e-4, "bfloat16": 1.6e-2}
CUTS = {"float32": 1e-5, "bfloat16": 8e-3}  # bfloat16: usually none; one rounding step of the largest logit at most

SMALL = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": None,  # no text ends early
    "pad_token_id": None,
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
    """One random model; `cuts` is False where the reference itself depends on how a text is cut.

    `embedding`: the deviation of the embeddings in bfloat16. Where norms make queries, keys or branches large, it is
    larger too: else the reference is 1e-2 to 3e-2 away from itself in float32; where a multiplier makes embeddings
    large, it is smaller: else the branches, and so the positions, hardly matter.
    """

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    model_type: str = "llama"
    dtype: str = "float32"
    cuts: bool = True
    embedding: float = 0.02


def _rope(parameters: dict[str, Any]) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10000.0} | parameters}


_TIED = {"tie_word_embeddings": True}
_BIASED = {"attention_bias": True}
_ALTERNATING = ["full_attention", "sliding_attention", "full_attention"]
_QWEN = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
_GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 9, "sliding_window": 8}
_CAPS = {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0}
_LOOSE_CAPS = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 20.0}
_NO_CAPS = dict.fromkeys(_CAPS)
_TWO_ROPES = {
    "layer_types": _ALTERNATING,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    },
}
_GRANITE = {"embedding_multiplier": 3.0, "attention_multiplier": 0.3, "residual_multiplier": 0.4, "logits_scaling": 4.0}
_SMOL = {
    "no_rope_layers": [1, 0, 1],
    "use_sliding_window": True,
    "sliding_window": 8,
    "attention_bias": True,
    "mlp_bias": True,
    "tie_word_embeddings": False,
}


def _phi3_longrope(rotary: int, original: int) -> dict[str, Any]:
    """Phi-3 says the original length beside the rope parameters."""
    parameters = _longrope(rotary) | {"partial_rotary_factor": rotary / 16}
    del parameters["original_max_position_embeddings"]
    return _rope(parameters) | {"original_max_position_embeddings": original}


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
    Case("qwen2, no window", {"sliding_window": 8}, "qwen2"),
    Case("qwen2, window 8 from layer 1 on, tied", _QWEN | {"tie_word_embeddings": True}, "qwen2"),
    Case("qwen2, window 8 by layer types, rope yarn", _QWEN | {"layer_types": _ALTERNATING} | _rope(_YARN), "qwen2"),
    Case("qwen3, head_dim 24, tied", {"head_dim": 24, "tie_word_embeddings": True}, "qwen3"),
    Case("qwen3, window 8, biases", _QWEN | {"head_dim": 16, "attention_bias": True}, "qwen3"),
    Case("gemma, tied", {"head_dim": 24}, "gemma"),
    Case("gemma, untied, biases", {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": False}, "gemma"),
    Case("gemma2, caps, window 8", _GEMMA | _CAPS, "gemma2"),
    Case("gemma2, no caps, untied", _GEMMA | _NO_CAPS | {"tie_word_embeddings": False}, "gemma2"),
    Case("gemma2, layer types, biases", _GEMMA | _CAPS | _BIASED | {"layer_types": _ALTERNATING[::-1]}, "gemma2"),
    Case("gemma3, window 8, a pattern of 2", _GEMMA | {"sliding_window_pattern": 2}, "gemma3_text"),
    Case("gemma3, rope linear, two thetas, cap", _GEMMA | _TWO_ROPES | {"final_logit_softcapping": 2.0}, "gemma3_text"),
    Case("gemma3, biases, untied", _GEMMA | _BIASED | {"tie_word_embeddings": False}, "gemma3_text"),
    Case("phi3, MHA, window 8", {"num_key_value_heads": 4, "sliding_window": 8}, "phi3"),
    Case("phi3, GQA, three quarters rotate, tied", _rope({"partial_rotary_factor": 0.75}) | _TIED, "phi3"),
    Case("phi3, longrope, below its length", _phi3_longrope(16, 128), "phi3"),
    Case(
        "phi3, longrope, past its length, partial", _phi3_longrope(12, 32) | {"sliding_window": 8}, "phi3", cuts=False
    ),
    Case("granite, multipliers, tied", _GRANITE | _TIED, "granite"),
    Case("granite, multipliers, biases", _GRANITE | {"attention_bias": True, "mlp_bias": True}, "granite"),
    Case("smollm3, every second layer without rope", {"no_rope_layer_interval": 2}, "smollm3"),
    Case("smollm3, window 8, biases, untied", _SMOL, "smollm3"),
    Case("llama, bfloat16", {"tie_word_embeddings": True}, dtype="bfloat16"),
    Case("mistral, window 8, bfloat16", {"sliding_window": 8}, "mistral", dtype="bfloat16"),
    Case("qwen2, window 8, bfloat16", _QWEN, "qwen2", dtype="bfloat16"),
    Case("qwen3, window 8, bfloat16", _QWEN | {"head_dim": 16}, "qwen3", dtype="bfloat16", embedding=0.06),
    Case("gemma, bfloat16", {"head_dim": 16}, "gemma", dtype="bfloat16", embedding=0.0025),
    Case("gemma2, caps, window 8, bfloat16", _GEMMA | _LOOSE_CAPS, "gemma2", dtype="bfloat16", embedding=0.2),
    Case("gemma3, window 8, two thetas, bfloat16", _GEMMA | _TWO_ROPES, "gemma3_text", dtype="bfloat16", embedding=0.2),
    Case("phi3, longrope, bfloat16", _phi3_longrope(16, 128), "phi3", dtype="bfloat16"),
    Case("granite, multipliers, bfloat16", _GRANITE, "granite", dtype="bfloat16"),
    Case("smollm3, window 8, bfloat16", _SMOL, "smollm3", dtype="bfloat16"),
    *(Case(**each) for each in MORE),
]


@dataclass
class Result:
    """What a case gave: errors relative to max|logit|; `cuts` and `greedy` None where they were not asked.

    `greedy`: by how much of max|logit| the reference prefers its own token where the texts part; 0 when they do not.
    """

    case: Case
    error: float
    cuts: float | None
    greedy: float | None

    @property
    def passed(self) -> bool:
        bound = BOUNDS[self.case.dtype]
        return self.error <= bound and (self.cuts or 0) <= CUTS[self.case.dtype] and (self.greedy or 0) <= bound


def run(case: Case, seed: int) -> Result:
    """Build the model of `case` from `seed` in transformers, load it here, and compare."""
    rng = np.random.default_rng(seed)
    theirs = reference(case, seed)
    ids = rng.integers(0, theirs.config.vocab_size, PROMPT + STEPS)
    with tempfile.TemporaryDirectory() as work:
        theirs.save_pretrained(work)
        ours = llm.load(work)
        assert ours.dtype == case.dtype
        greedy = _greedy(copy.deepcopy(theirs), ours, ids[:PROMPT]) if case.dtype == "float32" else None
        expected, actual = _theirs(theirs, ids), logits(ours, ids, [PROMPT] + [1] * STEPS)
        cuts = max(_relative(logits(ours, ids, cut), actual) for cut in _other_cuts(len(ids))) if case.cuts else None
    return Result(case, _relative(actual, expected), cuts, greedy)


def where(case: Case, seed: int) -> str:
    """What `debug.doctor` finds wrong with our model of `case`, beside transformers': for a case that failed."""
    theirs = reference(case, seed)
    ids = np.random.default_rng(seed).integers(0, theirs.config.vocab_size, PROMPT)
    with tempfile.TemporaryDirectory() as work:
        theirs.save_pretrained(work)
        found = debug.doctor(llm.load(work), theirs, ids.tolist(), seconds=20)
    return " ".join(map(str, found.findings)) or "debug.doctor finds nothing wrong"


def reference(case: Case, seed: int) -> Any:
    """The model of `case` in transformers, its weights drawn from `seed`."""
    import torch
    import transformers

    torch.manual_seed(seed)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    config = transformers.AutoConfig.for_model(case.model_type, **(BASES.get(case.model_type, SMALL) | case.config))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if re.search(r"(norm|norms\.\d+|ln_\w+|ln\d)\.weight$", name):
                centre = 0 if "gemma" in case.model_type else 1  # Gemma multiplies by 1 + weight
                parameter.copy_(centre + 0.2 * torch.randn_like(parameter))
            else:
                parameter.copy_(_deviation(case, name, parameter) * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.2 * torch.randn_like(buffer))
    return model.to(getattr(torch, case.dtype)).eval()


def _deviation(case: Case, name: str, parameter: Any) -> float:
    """Of the weights: large enough that every layer counts; in bfloat16 transformers' own 0.02, but for the scores, and
    for what a state takes in.

    With all weights larger the bfloat16 reference is 1.5e-2 to 2.9e-2 away from itself in float32, and tells nothing;
    with none, attention is so even that positions do not matter, and a state so small that it does not.
    """
    if case.dtype == "bfloat16":
        counts = any(each in name for each in ("q_proj", "k_proj", "qkv_proj", "in_proj", "conv1d.weight"))
        return 0.1 if counts else case.embedding if "embed" in name else 0.02
    return 0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5


def _steps_as_it_reads(model: Any) -> bool:
    """Whether the reference's single steps are those of its forward: Mamba 2's forget the limits of its time steps."""
    return list(getattr(model.config, "time_step_limit", (0, np.inf))) == [0, np.inf]


def _theirs(model: Any, ids: np.ndarray) -> np.ndarray:
    import torch

    rows = []
    with torch.no_grad():
        if not _steps_as_it_reads(model):
            return model(torch.tensor(ids)[None], use_cache=False).logits[0].float().numpy()
        kept = "state" if model.config.model_type == "rwkv" else "cache"
        held: dict[str, Any] = {kept: None}
        for part in np.split(ids, np.cumsum([PROMPT] + [1] * STEPS)[:-1]):
            output = model(torch.tensor(part)[None], **held, use_cache=True)
            held = {kept: output[kept]}
            rows.append(output.logits[0].float().numpy())
    return np.concatenate(rows)


def _greedy(theirs: Any, ours: Any, prompt: np.ndarray) -> float:
    """Both write `GREEDY` tokens; how much better the reference finds its token where ours first is another."""
    import torch

    wanted = theirs.generate(
        torch.tensor(prompt)[None],
        max_new_tokens=GREEDY, do_sample=False, output_logits=True, return_dict_in_generate=True,
        use_cache=_steps_as_it_reads(theirs),
    )  # fmt: skip
    cache, given = ours.new_cache(), prompt
    for token, scores in zip(wanted.sequences[0, len(prompt) :].tolist(), wanted.logits, strict=True):
        best = int(ours(given, cache).numpy()[-1].argmax())
        if best != token:
            return float((scores[0, token] - scores[0, best]) / scores.abs().max())
        given = np.array([token])
    return 0.0


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
    parser.add_argument("--only", metavar="TEXT", default="", help="the cases whose name or model_type contains it")
    options = parser.parse_args()
    chosen, cases = options.seed, [each for each in CASES if options.only in f"{each.name}\n{each.model_type}"]
    if not cases:
        parser.error(f"no case has {options.only!r} in its name or model_type")
    if missing := [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]:
        print(f"tests.parity needs {' and '.join(missing)}: pip install -e '.[parity]'", file=sys.stderr)
        return 2
    seed = secrets.randbits(31) if chosen is None else chosen
    print(
        f"seed {seed}; prompt {PROMPT} tokens, {STEPS} steps, {GREEDY} tokens greedily; errors relative to max|logit|"
    )
    print(f"{'model':42} {'dtype':9} {'vs transformers':>16} {'other cuts':>11} {'greedy':>9}")
    failed = 0
    for case in cases:
        result = run(case, seed)
        failed += not result.passed
        cuts = "-" if result.cuts is None else f"{result.cuts:.2e}"
        greedy = "-" if result.greedy is None else f"{result.greedy:.2e}" if result.greedy else "same"
        verdict = "" if result.passed else "  FAILED"
        print(f"{case.name:42} {case.dtype:9} {result.error:16.2e} {cuts:>11} {greedy:>9}{verdict}", flush=True)
        if not result.passed:
            print(f"  {where(case, seed)}", flush=True)
    print(f"{len(cases) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
