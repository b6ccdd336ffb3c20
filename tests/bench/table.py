"""The rows of the comparison: which work, in which formats, against whom, and how much faster it should be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

LLAMA, EAGER, COMPILED, OPENVINO = "llama.cpp", "torch", "torch.compile", "openvino"
OURS: dict[str, dict[str, str]] = {  # a packed weight computes in float32, its cache as wide as llama.cpp's
    "q4": {"weights": "q4", "dtype": "float32", "cache": "float16"},
    "q8": {"weights": "q8", "dtype": "float32", "cache": "float16"},
    **{each: {"weights": each, "dtype": each, "cache": each} for each in ("float16", "bfloat16", "float32")},
}
SHORT = {"f16": "float16", "bf16": "bfloat16", "fp32": "float32"}
BITS = {"q4": 4.5, "q8": 8.5, "float16": 16, "bfloat16": 16, "float32": 32}
STEPS, PROMPT, LONG = 24, 512, 1024
TESTS: dict[str, dict[str, Any]] = {
    "decode": {"test": "decode", "context": 1, "steps": STEPS},
    "decode-1024": {"test": "decode", "context": LONG, "steps": STEPS},
    "prefill": {"test": "prefill", "prompt": PROMPT},
    "gemm": {"test": "gemm", "rows": 512, "inputs": 2048, "outputs": 2048},
}
WORDS = {
    "decode": "decode {}, empty cache",
    "decode-1024": "decode {}, 1024 cached tokens",
    "prefill": "prefill 512, {}",
    "gemm": "GEMM 512x2048x2048, {}",
}


@dataclass(frozen=True)
class Row:
    """`kind` is a key of TESTS; `ours` and `theirs` are formats; `wanted` is the ratio aimed at, None for none."""

    kind: str
    ours: str
    peer: str
    theirs: str
    wanted: float | None = None

    @property
    def name(self) -> str:
        """What --only selects by: decode-q4, prefill-bf16-compile, decode-q4-bf16."""
        kind, _, cached = self.kind.partition("-")
        other = short(self.theirs) if self.theirs != self.ours else ""
        how = {COMPILED: "compile", OPENVINO: "openvino"}.get(self.peer, "")
        return "-".join(filter(None, (kind, short(self.ours), cached, other, how)))

    @property
    def work(self) -> str:
        return WORDS[self.kind].format(short(self.ours))

    @property
    def against(self) -> str:
        """The peer with the format it uses."""
        return f"{self.peer} {short(self.theirs)}"

    @property
    def test(self) -> dict[str, Any]:
        """What a worker is asked."""
        return TESTS[self.kind]

    @property
    def amount(self) -> tuple[float, str]:
        """How much one run does, and its unit."""
        if self.kind == "gemm":
            return 2 * 512 * 2048 * 2048 / 1e9, "GFLOP/s"
        return (PROMPT if self.kind == "prefill" else 1), "tok/s"


def matrices(config: dict[str, Any]) -> tuple[int, int]:
    """How many weights the matrices of all layers have, and how many the embedding, which is the head as well."""
    width, heads = config["hidden_size"], config["num_attention_heads"] + config["num_key_value_heads"]
    attention = 2 * width * heads * (width // config["num_attention_heads"])
    layer = attention + 3 * width * config["intermediate_size"]
    return config["num_hidden_layers"] * layer, config["vocab_size"] * width


def short(weights: str) -> str:
    """The format as the table says it."""
    return next((name for name, long in SHORT.items() if long == weights), weights)


def _rows() -> list[Row]:
    kinds = ("decode", "decode-1024", "prefill")
    wanted = {
        ("q4", LLAMA): (1.6, 2.0, 2.2),
        ("q8", LLAMA): (1.3, None, None),
        ("float16", LLAMA): (1.1, None, None),
        ("bfloat16", EAGER): (1.3, None, 1.0),
        ("float32", EAGER): (None, None, 1.0),
        ("bfloat16", COMPILED): (None, None, None),
        ("float32", COMPILED): (None, None, None),
        ("q4", OPENVINO): (None, None, None),
    }
    rows = [
        Row(kind, weights, peer, weights, aim)
        for (weights, peer), aims in wanted.items()
        for kind, aim in zip(kinds, aims, strict=True)
    ]
    rows.append(Row("decode", "q4", EAGER, "bfloat16", 4.0))
    rows.append(Row("gemm", "float32", EAGER, "float32", 1.0))
    return rows


ROWS = _rows()
