"""`limpid quantize`: a model's matrices packed once, in Hugging Face's layout, and what that does to each layer."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from ops import DTypeError, Tensor, select, target
from ops.errors import SelectorError
from ops.progress import tracked
from ops.quantize import FORMATS
from ops.spec import DTYPES, FLOATS

from .errors import UserError
from .experts import ExpertLinear
from .load import check_expressible, config_values, write_checkpoint
from .model import Model
from .nn import Embedding, Linear
from .weights.compressed import Words, packed, settings, written
from .writing import check_new, new_folder

STORED = "stored"
_KINDS = (*FORMATS, *FLOATS, STORED)


class Choice(NamedTuple):
    """A selector of modules, and what their weights become: q4, q8, a float type, or "stored"."""

    pattern: str
    kind: str


def choice(text: str) -> Choice:
    """`layers.0-3=q8`, or `lm_head` alone, which stays as it is stored. Raises UserError."""
    pattern, _, kind = text.partition("=")
    kind = kind or STORED
    try:
        select.path_pattern(pattern)
    except SelectorError as error:
        raise UserError(f"--keep {text!r}: {error}") from None
    if not pattern or kind not in _KINDS:
        raise UserError(f"--keep {text!r} is not understood: expected a path and one of {', '.join(_KINDS)}, as in "
                        "'layers.0.*=q8'")  # fmt: skip
    return Choice(pattern, kind)


def chosen(model: Model, kind: str, keep: Iterable[Choice] = ()) -> dict[str, str]:
    """What becomes of each matrix, by its path: of linear layers `kind`, unless a choice says otherwise, the last one.

    Tables of embeddings, and what the model's file keeps whole, are only packed where a choice names them.
    Raises UserError for a choice that means no matrix.
    """
    if kind not in _KINDS:
        raise UserError(f"{kind!r} is no format to quantise to; choose one of {', '.join(_KINDS[:-1])}")
    modules = {
        path: module for path, module in model.modules() if isinstance(module, (Linear, ExpertLinear, Embedding))
    }
    linear = {path for path, module in modules.items() if not isinstance(module, Embedding)}
    whole = model.kept or ("\0",)
    packs = {path for path in linear if not f"{path}.weight".endswith(whole)}
    found = {path: STORED if kind in FORMATS and path not in packs else kind for path in modules}
    for each in keep:
        pattern = select.path_pattern(each.pattern)
        meant = [path for path in found if pattern.fullmatch(path)]
        if not meant:
            near = difflib.get_close_matches(each.pattern, found, 3, 0.4)
            raise UserError(
                f"--keep {each.pattern!r} means no matrix of this model; there are {', '.join(near or [*found][:3])}"
            )
        found |= dict.fromkeys(meant, each.kind)
    return {path: each for path, each in found.items() if modules[path].weight.ndim == 2}


def quantised(model: Model, kinds: Mapping[str, str], progress: bool = True, rest: str = STORED) -> dict[str, Any]:
    """The weights by path, each in the format that `kinds` has for its module, else `rest`: `Words`, or float arrays.

    Raises UserError for a weight that its format cannot hold.
    """
    weights = dict(model.parameters())

    def make(path: str) -> Any:
        weight = weights[path]
        assert isinstance(weight, Tensor)
        kind = kinds.get(path.removesuffix(".weight"), rest) if path.endswith(".weight") else rest
        if kind == STORED and weight.dtype in FORMATS:
            kind = weight.dtype
        if kind in FORMATS:
            try:
                return packed(weight, kind)
            except DTypeError as error:
                raise UserError(f"{path}: {error}; leave it out by --keep {path.removesuffix('.weight')}") from None
        return weight.numpy() if kind == STORED else weight.numpy().astype(DTYPES[kind])

    model.named_tensors()  # all are loaded, or it is an error
    with ThreadPoolExecutor(target.threads()) as pool:
        done = tracked(pool.map(make, weights), "Quantising", total=len(weights), shown=progress)
        return dict(zip(weights, done, strict=True))


def checkpoint(model: Model, made: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json's values, and the tensors by a checkpoint's names, of `made`: weights as `quantised` gives them.

    Raises UserError where the family's checkpoint lays a packed matrix out in a way that no packed layout says.
    """
    values = config_values(model)
    check_expressible(model, values)
    names = dict(zip(dict(model.parameters()), model.named_tensors(), strict=True))
    tensors = dict(model.to_checkpoint({names[path]: each for path, each in made.items()}))
    wanted = sum(each.size for each in made.values() if isinstance(each, Words))
    if sum(each.size for each in tensors.values() if isinstance(each, Words)) != wanted:
        there = {id(each) for each in tensors.values()}
        lost = [path for path, each in made.items() if isinstance(each, Words) and id(each) not in there]
        raise UserError(
            f"a checkpoint of {model.model_type} holds {', '.join(lost[:3])}{' and others' * (len(lost) > 3)} turned, "
            "or mixed with others, which no packed layout says: keep them, as in --keep '*'"
        )
    linears = {path for path, module in model.modules() if isinstance(module, Linear)}
    said = settings(tensors, {names[f"{path}.weight"].removesuffix(".weight") for path in linears})
    return values if said is None else values | {"quantization_config": said}, tensors


def quantise(
    model: Model, to: str, out: str | Path, keep: Sequence[str] = (), text: str | None = None, progress: bool = True
) -> dict[str, Any]:
    """Write `model` with its linear layers as `to` (q4, q8) into the new folder `out`; give the report.

    A float type is that of all weights. `keep`: choices for some, such as "layers.0.*=q8", or "lm_head", which stays
    as it is. `llm.load(out)` needs no flag: packed matrices are held to the bit, floats in the type of most.
    The report, also `report.json` there, has what packing does to each layer's output on `text`, by default a short
    one: see `llm.calibration.report`.
    Raises UserError for what is not understood, and where `out` exists; then, and when interrupted, nothing is left.
    """
    from .calibration import TEXT, report, save

    out = check_new(out)
    kinds = chosen(model, to, [choice(each) for each in keep])
    made = quantised(model, kinds, progress, to if to in FLOATS else STORED)
    values, tensors = checkpoint(model, made)
    values |= {"dtype": to} if to in FLOATS else {}
    found = report(model, made, TEXT if text is None else text, progress) | {"to": to, "keep": [*keep]}
    with new_folder(out) as work:
        write_checkpoint(work, values, written(tensors), model.tokenizer)
        found["bytes"] = sum(each.stat().st_size for each in work.glob("*.safetensors"))
        save(found, work)
    return found
