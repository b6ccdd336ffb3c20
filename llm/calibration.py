"""What quantising does to each layer, on the inputs that a text gives it; and to the text's likelihood."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import ops
from ops import Tensor
from ops.progress import tracked

from .errors import UserError
from .model import Model
from .weights.compressed import Words

TEXT = """Once upon a time there was a little girl who lived at the edge of a forest. Every morning she took a basket
and walked to the village to buy bread. One day, on her way home, she met an old man who asked her for something to eat.

The speed of light in a vacuum is 299,792,458 metres per second. In 1905 Albert Einstein showed that it does not depend
on the motion of the source, and that E = m * c**2.

def mean(values):
    return sum(values) / len(values) if values else 0.0
"""
MOST_TOKENS = 2048  # of the text, which are looked at
_CHUNK = 512


class _Sums:
    """Squares of a layer's outputs and of how far packing puts them off, added up over calls."""

    def __init__(self) -> None:
        self.error = self.square = self.worst = self.largest = 0.0

    def add(self, given: np.ndarray, wanted: np.ndarray) -> None:
        given, wanted = given.astype("float64"), wanted.astype("float64")
        off = given - wanted
        self.error, self.square = self.error + float((off**2).sum()), self.square + float((wanted**2).sum())
        self.worst = max(self.worst, float(np.abs(off).max(initial=0)))
        self.largest = max(self.largest, float(np.abs(wanted).max(initial=0)))


class _Beside(ops.Interceptor):
    """Runs each call that takes a weight once more with the packed one, on the same inputs. Changes nothing."""

    def __init__(self, model: Model, packed: Mapping[str, Tensor]):
        paths = {id(weight): path for path, weight in model.parameters()}
        self.packed = {key: (path, packed[path]) for key, path in paths.items() if path in packed}
        self.sums = {path: _Sums() for path in packed}

    def call(self, call: ops.Call, launch: Any) -> Any:
        output = launch(call)
        for i, each in enumerate(call.args):
            if id(each) in self.packed:
                path, other = self.packed[id(each)]
                again = call.op(*call.args[:i], other, *call.args[i + 1 :], **call.constants)
                self.sums[path].add(again.numpy(), output.numpy())
        return output


class _Instead(ops.Interceptor):
    """Puts the packed weight in the place of the given one."""

    def __init__(self, beside: _Beside):
        self.packed = beside.packed

    def call(self, call: ops.Call, launch: Any) -> Any:
        if any(id(each) in self.packed for each in call.args):
            call = call.replace(tuple(self.packed.get(id(each), (None, each))[1] for each in call.args))
        return launch(call)


def report(model: Model, made: Mapping[str, Any], text: str, progress: bool = True) -> dict[str, Any]:
    """What the weights `made` (by path, `Words` or float arrays) do to the model's layers on `text`, worst first.

    For each matrix that changed: `error` is |y' - y| / |y|, root mean squares over all outputs y on the inputs that the
    unchanged model gives it, y' being those of the new weight; `worst` is max |y' - y| / max |y|. Nothing inherited
    from earlier layers is in them. `loss` is the mean -log p of the text's tokens, in nats, before and after all.
    Raises UserError for a model without a tokenizer, and for a text of fewer than two tokens.
    """
    if model.tokenizer is None:
        raise UserError(
            "this model has no tokenizer to read the calibration text with: put its tokenizer.json beside it"
        )
    ids = model.tokenizer.encode(text)[:MOST_TOKENS]
    if len(ids) < 2:
        raise UserError(f"the calibration text has {len(ids)} tokens, expected two or more: give a longer one")
    size = min(model.context, _CHUNK)
    chunks = [ids[start : start + size] for start in range(0, len(ids), size)]
    weights = dict(model.parameters())
    matrices = {path: each for path, each in made.items() if each.ndim == 2}
    new = {path: _tensor(each) for path, each in matrices.items() if _changed(each, weights[path])}
    # What a model with packed weights has when it is loaded.
    cache_dtype = "float16" if any(isinstance(each, Words) for each in made.values()) else None
    beside, losses = _Beside(model, new), {"before": 0.0, "after": 0.0}
    for chunk in tracked(chunks, "Measuring layers", shown=progress):
        with ops.intercepted(beside):
            losses["before"] += _loss(model, chunk)
        with ops.intercepted(_Instead(beside)):
            losses["after"] += _loss(model, chunk, cache_dtype)
    count = sum(len(chunk) - 1 for chunk in chunks)
    layers = [_row(path, beside.sums[path], new[path], weights[path]) for path in new]
    return {
        "model": model.model_type,
        "tokens": len(ids),
        "loss": {name: value / count for name, value in losses.items()},
        "layers": sorted(layers, key=lambda row: (row["error"] is not None, -(row["error"] or 0.0))),
    }


def _changed(made: Any, weight: Any) -> bool:
    return made.form != weight.dtype if isinstance(made, Words) else made.dtype.name != weight.numpy().dtype.name


def _tensor(made: Any) -> Tensor:
    if not isinstance(made, Words):
        return ops.tensor(np.ascontiguousarray(made))
    assert made.form is not None
    spec = ops.Spec(made.shape, made.form)
    return ops.tensor_from_packed(made.pack(made.form, ops.memory.huge(spec.nbytes)), spec)


def _loss(model: Model, ids: list[int], cache_dtype: str | None = None) -> float:
    """The sum of -log p of all tokens but the first."""
    logits = model(ids, model.new_cache(cache_dtype)).numpy()[:-1].astype("float64")
    logits -= logits.max(-1, keepdims=True)
    chosen = np.take_along_axis(logits, np.asarray(ids[1:])[:, None], -1)[:, 0]
    return float((np.log(np.exp(logits).sum(-1)) - chosen).sum())


def _row(path: str, sums: _Sums, made: Tensor, weight: Any) -> dict[str, Any]:
    """A layer's line; its errors are None where they are no numbers, or the text did not reach it."""
    error = math.sqrt(sums.error / sums.square) if sums.square > 0 else None
    worst = sums.worst / sums.largest if sums.largest > 0 else None
    error, worst = (each if each is not None and math.isfinite(each) else None for each in (error, worst))
    return {
        "layer": path.removesuffix(".weight"), "from": weight.dtype, "to": made.dtype, "bytes": made.nbytes,
        "error": error, "worst": worst,
    }  # fmt: skip


def save(found: Mapping[str, Any], folder: Path) -> None:
    (folder / "report.json").write_text(json.dumps(found, indent=2, allow_nan=False) + "\n", "utf-8")


def show(found: Mapping[str, Any], rows: int = 20) -> None:
    """The layers that suffer most, as a table, and what became of the whole."""
    from rich.console import Console
    from rich.table import Table

    from .tree import size

    console, layers = Console(highlight=False, markup=False), found["layers"]
    table = Table(box=None, pad_edge=False)
    for name in ("layer", "to", "error", "worst", "bytes"):
        table.add_column(name, justify="left" if name in ("layer", "to") else "right", overflow="fold")
    for row in layers[:rows]:
        errors = ["not reached" if row[each] is None else f"{row[each]:.2%}" for each in ("error", "worst")]
        table.add_row(row["layer"], row["to"], *errors, size(row["bytes"]))
    console.print(table)
    if len(layers) > rows:
        console.print(f"and {len(layers) - rows} layers with smaller errors, in report.json")
    before, after = found["loss"]["before"], found["loss"]["after"]
    console.print(f"-log p of the text's {found['tokens']} tokens: {before:.4f} before, {after:.4f} after")
