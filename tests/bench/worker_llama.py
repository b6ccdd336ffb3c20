"""llama.cpp, through llama-cpp-python's C API: `python -m tests.bench.worker_llama` serves the pipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import llama_cpp  # pyright: ignore[reportMissingImports]
import numpy as np

from . import gguf_model
from .worker import WARM, serve, timed, tokens

_VARIANTS = {"flash attention": 1, "no flash attention": 0}
_BATCH = 512


class Llama:
    """A pure GGUF of random weights. Every test runs with flash attention and without: the reader takes the better.

    The file is read, not mapped (which measured faster), and removed once it is read.
    """

    def __init__(self, config: dict[str, Any], threads: int, weights: str, folder: str):
        self.config, self.threads, self.weights, self.folder = config, threads, weights, Path(folder)
        self._model: Any = None
        self._contexts: dict[tuple[str, int], Any] = {}

    def facts(self) -> dict[str, Any]:
        system = llama_cpp.llama_print_system_info().decode()
        return {"llama-cpp-python": llama_cpp.__version__, "system": system, "batch": _BATCH, "cache": "float16"}

    def measure(self, test: str, **sizes: int) -> dict[str, Any]:
        kinds = {"decode": self._decode, "prefill": self._prefill}
        return {"seconds": {variant: kinds[test](variant, **sizes) for variant in _VARIANTS}}

    def _decode(self, variant: str, context: int, steps: int) -> list[float]:
        state = self._context(variant, context + steps + WARM)
        if self._length(state) < context:
            self._run(state, tokens(context, self.config))
        times = timed(lambda: self._run(state, [1]), WARM, steps)
        self._check(state)
        llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(state), 0, context, -1)
        return times

    def _prefill(self, variant: str, prompt: int) -> list[float]:
        state, ids = self._context(variant, prompt), tokens(prompt, self.config)

        def run() -> None:
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(state), True)
            self._run(state, ids)

        times = timed(run, 0, 1, 1.0)
        self._check(state)
        return times

    def _run(self, state: Any, ids: list[int]) -> None:
        for start in range(0, len(ids), _BATCH):
            part = ids[start : start + _BATCH]
            array = (llama_cpp.llama_token * len(part))(*part)  # the batch points into it
            if status := llama_cpp.llama_decode(state, llama_cpp.llama_batch_get_one(array, len(part))):
                raise RuntimeError(f"llama_decode of {len(part)} tokens gave {status}")
        llama_cpp.llama_synchronize(state)

    def _check(self, state: Any) -> None:
        """The last logits are numbers, and not all the same."""
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(state, -1), (self.config["vocab_size"],))
        if not np.isfinite(logits).all() or np.ptp(logits) == 0:
            raise RuntimeError(f"llama.cpp computes no logits: {logits[:4]}")

    def _length(self, state: Any) -> int:
        return llama_cpp.llama_memory_seq_pos_max(llama_cpp.llama_get_memory(state), 0) + 1

    def _context(self, variant: str, size: int) -> Any:
        """A context that holds at least `size` tokens, made once."""
        if self._model is None:
            self._model = self._load()
        if (variant, size) not in self._contexts:
            parameters = llama_cpp.llama_context_default_params()
            parameters.n_ctx, parameters.n_batch, parameters.n_ubatch = size, _BATCH, _BATCH
            parameters.n_threads = parameters.n_threads_batch = self.threads
            parameters.flash_attn_type = _VARIANTS[variant]
            self._contexts[variant, size] = llama_cpp.llama_init_from_model(self._model, parameters)
            if not self._contexts[variant, size]:
                raise RuntimeError(f"llama.cpp makes no context of {size} tokens with {variant}")
        return self._contexts[variant, size]

    def _load(self) -> Any:
        llama_cpp.llama_backend_init()
        parameters = llama_cpp.llama_model_default_params()
        parameters.use_mmap = False
        path = self.folder / f"{self.weights}.gguf"
        try:
            gguf_model.write(path, self.config, self.weights)
            model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        finally:
            path.unlink(missing_ok=True)
        if not model:
            raise RuntimeError(f"llama.cpp does not load {path.name}; its own words are in the worker's log")
        return model


if __name__ == "__main__":
    serve(Llama)
