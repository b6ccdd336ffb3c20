"""transformers on torch: `python -m tests.bench.worker_torch` serves the pipe."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers

from .worker import WARM, serve, timed, tokens


class Torch:
    """A LlamaForCausalLM of random weights, called eagerly with a growing cache, or compiled with a static one."""

    def __init__(self, config: dict[str, Any], threads: int, weights: str, compiled: bool):
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.config, self.dtype, self.compiled = config, getattr(torch, weights), compiled
        self._model: Any = None
        self._forward: Any = None
        self._filled: dict[int, Any] = {}

    def facts(self) -> dict[str, Any]:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        return versions | {"capability": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}

    def measure(self, test: str, **sizes: int) -> dict[str, Any]:
        if test == "gemm":
            return {"seconds": self._gemm(**sizes)}
        if self._model is None:
            self._load()
        kinds = {"decode": self._decode, "prefill": self._prefill}
        return {"seconds": {"compiled" if self.compiled else "eager": kinds[test](**sizes)}}

    def _decode(self, context: int, steps: int) -> list[float]:
        if context not in self._filled:
            cache = self._cache(context + steps + WARM)
            self._model(self._ids(context), cache=cache, use_cache=True, logits_to_keep=1)
            self._filled[context] = cache
        cache = self._filled[context] if self.compiled else copy.deepcopy(self._filled[context])
        one = torch.tensor([[1]])
        times = timed(lambda: self._run(one, cache), WARM, steps)
        if self.compiled:  # a copy would be another object to the compiled code: take back the length instead
            for layer in cache.layers:
                layer.cumulative_length.fill_(context)
        return times

    def _prefill(self, prompt: int) -> list[float]:
        ids, cache = self._ids(prompt), self._cache(prompt)

        def run() -> None:
            nonlocal cache
            if self.compiled:
                cache.reset()
            else:
                cache = self._cache(prompt)
            self._run(ids, cache)

        return timed(run, 0, 1, 1.0)

    def _run(self, ids: Any, cache: Any) -> None:
        logits = self._forward(ids, cache=cache, use_cache=True, logits_to_keep=1).logits
        if not bool(torch.isfinite(logits[0, -1, :8]).all()):
            raise RuntimeError(f"transformers computes no logits: {logits[0, -1, :8]}")

    def _gemm(self, rows: int, inputs: int, outputs: int) -> dict[str, list[float]]:
        """Both orders in which the weight may lie."""
        x, weight = torch.randn(rows, inputs, dtype=self.dtype), torch.randn(outputs, inputs, dtype=self.dtype)
        across = weight.T.contiguous()
        return {
            "weight [outputs, inputs]": timed(lambda: torch.matmul(x, weight.T), WARM, 20, 1.0),
            "weight [inputs, outputs]": timed(lambda: torch.matmul(x, across), WARM, 20, 1.0),
        }

    def _load(self) -> None:
        """Made without memory, then filled: the library's own initialisation takes minutes."""
        known = {name: value for name, value in self.config.items() if name != "model_type"}
        config = transformers.LlamaConfig(**known)
        with torch.device("meta"):
            model: Any = transformers.LlamaForCausalLM(config)
        model = model.to(self.dtype).to_empty(device="cpu").eval()
        model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its frequencies are computed, not loaded
        model.tie_weights()
        for name, parameter in model.named_parameters():
            torch.nn.init.ones_(parameter) if "norm" in name else torch.nn.init.normal_(parameter, std=0.02)
        self._model = model
        self._forward = torch.compile(model, dynamic=False) if self.compiled else model

    def _cache(self, size: int) -> Any:
        if not self.compiled:
            return transformers.DynamicCache(config=self._model.config)
        c = self._model.config
        cache: Any = transformers.StaticCache(config=c, max_cache_len=size)
        cache.early_initialization(1, c.num_key_value_heads, c.head_dim, self.dtype, torch.device("cpu"))
        return cache

    def _ids(self, count: int) -> Any:
        return torch.tensor([tokens(count, self.config)])


if __name__ == "__main__":
    serve(Torch)
