"""Parts that several families share to the letter; what differs in one operation is written out in their files."""

from __future__ import annotations

from typing import Literal

import numpy as np

import ops
from ops import Tensor
from ops.spec import DTYPES

from .nn import Embedding, Linear, Module

Activation = Literal["silu", "gelu_pytorch_tanh"]

Nonlinearity = Literal["gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "relu", "silu"]


def activate(x: Tensor, name: Nonlinearity) -> Tensor:
    """HF's activation of that name. All spellings of gelu but the first are its approximation by tanh."""
    match name:
        case "gelu":
            return ops.gelu(x)
        case "relu":
            return ops.relu(x)
        case "silu":
            return ops.silu(x)
    return ops.gelu(x, approximate="tanh")


class MLP(Module):
    """The gated feed-forward layer: down(activation(gate(x)) * up(x)). Shazeer 2020.

    `activation` by HF's name: "silu" (SwiGLU) or "gelu_pytorch_tanh" (GeGLU with gelu's approximation by tanh).
    """

    def __init__(self, width: int, hidden: int, dtype: str, bias: bool = False, activation: Activation = "silu"):
        self.gate_proj = Linear(width, hidden, bias, dtype)
        self.up_proj = Linear(width, hidden, bias, dtype)
        self.down_proj = Linear(hidden, width, bias, dtype)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        mixed = ops.silu_mul(gate, up) if self.activation == "silu" else ops.gelu_mul(gate, up, approximate="tanh")
        return self.down_proj(mixed)


class ScaledEmbedding(Embedding):
    """Gemma's: rows of weight times sqrt(width), a factor that is rounded to the model's dtype first."""

    def __init__(self, vocabulary: int, width: int, dtype: str = "float32"):
        super().__init__(vocabulary, width, dtype)
        self.scale = float(np.asarray(width**0.5, "float32").astype(DTYPES[dtype]))

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.scale
