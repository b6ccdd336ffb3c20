"""`limpid convert`: a model from Hugging Face's layout to a GGUF file, and back, with its tokenizer and template."""

from __future__ import annotations

import dataclasses
import math
import os
import secrets
from pathlib import Path
from typing import Any

import numpy as np

from ops.progress import tracked
from ops.quantize import FORMATS

from .config import parse_config
from .errors import ConfigError, UserError
from .load import config_values, load, write_checkpoint
from .model import Model
from .models import architecture
from .quantise import STORED, checkpoint, chosen, quantised
from .rope import Rope, frequencies
from .weights.compressed import written
from .writing import check_new, new_folder

TYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "q8_0": "q8", "q4_0": "q4"}


def convert(source: str | os.PathLike[str], out: str | Path, type: str | None = None, progress: bool = True) -> Path:
    """Write the model `source`, whatever `llm.load` takes, to `out`: a GGUF file where its name ends so, else a folder.

    `type` is what matrices become: f32, f16, bf16, q8_0 or q4_0 (in a folder q8 and q4, as `limpid quantize` writes
    them); by default as they are stored, Q8_0 and Q4_0 code by code. What GGUF holds in float32, and says of the config
    in float32, is rounded to it: norms, biases, Gemma's norms plus one. The file is read back before it is written, and
    refused where the model would differ.
    Raises UserError, by name, for families, configs and tokenizers that a GGUF file cannot say, for a type that does
    not fit, and where `out` exists; then, and when interrupted, nothing is left.
    """
    if type is not None and type not in TYPES:
        raise UserError(f"type {type!r} is not supported; choose one of {', '.join(TYPES)}")
    out = check_new(out)
    floats = TYPES[type] if type is not None and TYPES[type] not in FORMATS else None
    model = load(source, dtype=floats, weights=floats, progress=progress)
    if out.suffix == ".gguf":
        _to_gguf(model, out, type, Path(source).name, progress)
        return out
    to = TYPES[type] if type else STORED
    kinds = chosen(model, to) if to in FORMATS else {}
    values, tensors = checkpoint(model, quantised(model, kinds, progress))
    with new_folder(out) as work:
        write_checkpoint(work, values, written(tensors), model.tokenizer)
    return out


def _to_gguf(model: Model, out: Path, type: str | None, name: str, progress: bool) -> None:
    # Imported here: the library they use takes 40 ms, which other commands need not pay.
    from .gguf_vocabulary import metadata
    from .weights import gguf_write as gguf
    from .weights.gguf import Container
    from .weights.gguf_model import translate

    values = config_values(model)
    title, family = gguf.family_of(model.model_type, model.config)
    title = gguf.ARCHITECTURES.get(title, title)
    kind = gguf.KINDS[type] if type else None
    weights = dict(model.parameters())
    # What is packed in another way than it is to be becomes floats first, exactly.
    kinds = {path.removesuffix(".weight"): "float32" for path, each in weights.items()
             if type in ("q8_0", "q4_0") and each.dtype in FORMATS and each.dtype != TYPES[type or ""]}  # fmt: skip
    _, tensors = checkpoint(model, quantised(model, kinds, progress))
    keys, found = gguf.keys(model.config, values, family)
    found |= gguf.pieces(family, tensors, _heads(model), kind)
    said = {"general.name": name} | {f"{title}.{key}": value for key, value in keys.items()}
    vocabulary = metadata(model.tokenizer, model.config.vocab_size) if model.tokenizer else None
    said |= vocabulary or {"tokenizer.ggml.model": "no_vocab"}
    container = Container([out], {"general.architecture": title} | said, gguf.as_read(found))
    _check_same(model, *translate(container))
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(8)}.tmp")
    try:
        gguf.write(temporary, title, said, found, lambda each, count: tracked(each, "Writing", count, progress))
        os.replace(temporary, out)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _heads(model: Model) -> dict[str, int]:
    """What the rows of attention's matrices are ordered by."""
    config = model.config
    heads = getattr(config, "num_attention_heads", None) or getattr(config, "n_head", 0)
    return {"num_attention_heads": heads, "num_key_value_heads": getattr(config, "num_key_value_heads", None) or heads}


def _check_same(model: Model, values: dict[str, Any], tensors: dict[str, Any]) -> None:
    """Raises ConfigError where the file would be read as another model than it is written from."""
    given = model.config
    back = parse_config(architecture(values["model_type"])[0], values)
    for field in dataclasses.fields(given):
        a, b = getattr(given, field.name), getattr(back, field.name, None)
        if field.name == "hidden_act" and model.model_type.startswith("gemma"):
            continue  # their configs admit only spellings of one function
        if field.name == "n_inner":  # None is four times the width
            a = a or 4 * given.n_embd
        if not _same(a, b):
            raise ConfigError(
                f"a GGUF file cannot say that {field.name} of this {model.model_type} is {a!r:.120}: it is read as "
                f"{b!r:.120}"
            )
    mine = {name: weight.shape for name, weight in model.named_tensors().items()}
    read = {name: tuple(each.shape) for name, each in model.from_checkpoint(tensors).items()}
    if differing := [name for name in {**mine, **read} if mine.get(name) != read.get(name)]:
        raise ConfigError(f"a GGUF file of this {model.model_type} would be read with other {', '.join(differing[:4])}")


def _same(a: Any, b: Any) -> bool:
    """Equal, numbers as far as a float32 says them; rotations by their frequencies."""
    if isinstance(a, Rope) and isinstance(b, Rope):
        lengths = {1, a.max_position_embeddings or 1}
        for length in lengths:
            (mine, scale), (other, factor) = frequencies(a, length), frequencies(b, length)
            if (
                mine.shape != other.shape
                or not np.allclose(mine, other, 1e-6, 0)
                or not math.isclose(scale, factor, rel_tol=1e-6)
            ):
                return False
        return True
    if isinstance(a, float) and isinstance(b, (int, float)):
        return math.isclose(a, b, rel_tol=1e-6)
    return a == b
