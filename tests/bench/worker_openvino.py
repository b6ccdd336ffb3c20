"""OpenVINO's runtime on a model that openvino-genai made of a GGUF: `python -m tests.bench.worker_openvino`."""

from __future__ import annotations

import contextlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import openvino  # pyright: ignore[reportMissingImports]
import openvino_genai  # pyright: ignore[reportMissingImports]
from openvino import opset13  # pyright: ignore[reportMissingImports]

from . import gguf_model
from .worker import WARM, serve, timed, tokens


class OpenVINO:
    """The converted model with logits of the last token only and a float16 cache, called as openvino-genai calls it."""

    def __init__(self, config: dict[str, Any], threads: int, weights: str, folder: str):
        self.config, self.threads, self.weights, self.folder = config, threads, weights, Path(folder)
        self._compiled: Any = None
        self._filled: dict[int, tuple[Any, list[np.ndarray]]] = {}

    def facts(self) -> dict[str, Any]:
        return {name: version(name) for name in ("openvino", "openvino-genai")} | {"cache": "float16"}

    def measure(self, test: str, **sizes: int) -> dict[str, Any]:
        """As a `Side`."""
        if self._compiled is None:
            self._compiled = self._load()
        kinds = {"decode": self._decode, "prefill": self._prefill}
        return {"seconds": {"stateful": kinds[test](**sizes)}}

    def _decode(self, context: int, steps: int) -> list[float]:
        if context not in self._filled:
            request = self._compiled.create_infer_request()
            self._run(request, tokens(context, self.config), 0)
            self._filled[context] = request, [np.array(each.state.data) for each in request.query_state()]
        request, states = self._filled[context]
        for each, kept in zip(request.query_state(), states, strict=True):
            each.state = openvino.Tensor(kept)
        lengths = iter(range(context, context + WARM + steps))
        return timed(lambda: self._run(request, [1], next(lengths)), WARM, steps)

    def _prefill(self, prompt: int) -> list[float]:
        request, ids = self._compiled.create_infer_request(), tokens(prompt, self.config)

        def run() -> None:
            request.reset_state()
            self._run(request, ids, 0)

        return timed(run, 0, 1, 1.0)

    def _run(self, request: Any, ids: list[int], past: int) -> None:
        count = len(ids)
        request.infer(
            {
                "input_ids": np.array([ids], "int64"),
                "attention_mask": np.ones((1, past + count), "int64"),
                "position_ids": np.arange(past, past + count, dtype="int64")[None],
                "beam_idx": np.zeros(1, "int32"),
            }
        )
        logits = request.get_output_tensor(0).data
        if logits.shape != (1, 1, self.config["vocab_size"]) or not np.isfinite(logits[0, 0, :8]).all():
            raise RuntimeError(f"OpenVINO computes no logits: {logits.shape}, {logits[0, 0, :8]}")

    def _load(self) -> Any:
        """Its pipeline converts the file, saves the model, and may then fail to compile it; the runtime compiles it."""
        path = self.folder / f"{self.weights}.gguf"
        gguf_model.write(path, self.config, self.weights, vocabulary=True)
        with contextlib.suppress(RuntimeError):
            openvino_genai.LLMPipeline(str(path), "CPU", enable_save_ov_model=True)
        saved = self.folder / "openvino_model.xml"
        if not saved.exists():
            raise RuntimeError(f"openvino-genai converted no {path.name}; its own words are in the worker's log")
        core = openvino.Core()
        model = core.read_model(saved)
        _keep_last(model)
        settings = {"INFERENCE_NUM_THREADS": self.threads, "KV_CACHE_PRECISION": "f16", "PERFORMANCE_HINT": "LATENCY"}
        return core.compile_model(model, "CPU", settings)


def _keep_last(model: Any) -> None:
    """Slice the head's input [1, n, width] to the last token, as openvino-genai does to its own models."""
    node = model.get_results()[0].input_value(0).get_node()
    while node.get_type_name() != "MatMul":
        node = node.input_value(0).get_node()
    arguments = [opset13.constant(np.array([each], "int64")) for each in (-1, np.iinfo("int64").max, 1, 1)]
    node.input(0).replace_source_output(opset13.slice(node.input_value(0), *arguments).output(0))
    model.validate_nodes_and_infer_types()


if __name__ == "__main__":
    serve(OpenVINO)
