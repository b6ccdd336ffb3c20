"""Activation patching: which layer and position carries an answer. After Vig et al. 2020 and Meng et al. 2022.

effects = debug.activation_patching(model, "... to Tom. The ball now belongs to", "... to Ben. ...", (" Tom", " Ben"))
effects["residual"]                            # effect[layer, position]: 0 as corrupted, 1 the clean answer restored
effects.plot()
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import ops
from ops import OpError, SelectorError, Tensor
from ops.progress import tracked

from . import heatmap
from .patches import patch
from .trace import Recording, trace

# Where a layer's number stands in the path is a `*`; the names are TransformerLens's resid_post, attn_out, mlp_out.
PLACES = {"residual": "layers.*", "attention": "layers.*.self_attn", "mlp": "layers.*.mlp"}

Metric = Callable[[np.ndarray], float] | Sequence[Any]


@dataclass(frozen=True, repr=False)
class Effects:
    """What one clean activation in the corrupted run does to the metric, by kind of place, layer and position.

    `effects["residual"]` is [layers, positions]: (patched - corrupted) / (clean - corrupted), NaN where a layer has no
    such place. `clean` and `corrupted` are the metric of the two prompts, `tokens` and `clean_tokens` their tokens.
    """

    matrices: dict[str, np.ndarray]
    tokens: list[str]
    clean_tokens: list[str]
    clean: float
    corrupted: float

    def __getitem__(self, kind: str) -> np.ndarray:
        if kind not in self.matrices:
            raise KeyError(f"no {kind!r} among the kinds {', '.join(self.matrices)}")
        return self.matrices[kind]

    @property
    def labels(self) -> list[str]:
        """The token at each position; where the prompts differ, the clean one and the corrupted one."""
        pairs = zip(map(_shown, self.clean_tokens), map(_shown, self.tokens), strict=True)
        return [token if clean == token else f"{clean} → {token}" for clean, token in pairs]

    @property
    def caption(self) -> str:
        return f"1: the clean answer restored (metric {self.clean:.4g}); 0: as corrupted (metric {self.corrupted:.4g})"

    def plot(self, path: str | Path | None = None) -> Any:
        """The picture, for a notebook; written to `path` too, as .svg or .html, where one is given."""
        from IPython.display import HTML

        if path is not None:
            heatmap.write(Path(path), self.matrices, self.labels, self.caption)
        return HTML(self._repr_html_())

    def _repr_html_(self) -> str:
        return heatmap.html(self.matrices, self.labels, self.caption)

    def __repr__(self) -> str:
        return heatmap.text(self.matrices, self.labels, self.caption)


def run_with_cache(model: Any, ids: Any, where: Any = None) -> tuple[Tensor, Recording]:
    """`model(ids)` and what it computed on the way: the logits, and a recording with the outputs of calls and modules.

    `where` narrows the calls, as in `trace`; `recording["layers.3"].output` is the residual stream after layer 3.
    """
    with trace(where, keep="outputs", statistics=False) as recording:
        logits = model(ids)
    return logits, recording


def activation_patching(model: Any, clean: Any, corrupted: Any, metric: Metric, where: Any = None) -> Effects:
    """Run `corrupted` with one activation at a time, of one place and position, replaced by that of the `clean` run.

    Prompts are token ids, or texts for the model's tokenizer, of the same number of tokens. `metric` is a pair of
    tokens, ids or texts, whose logits after the last position are subtracted (the clean answer first), or a function of
    the logits, float [n, vocabulary], that gives a number.

    `where` are kinds of places: "residual" (after each layer), "attention" and "mlp" (their outputs), all three when
    None; or paths with a `*` in the layer's place, `layers.*.input_layernorm`, `layers.*.self_attn/attention[0]`; or a
    dict of such paths by a name. Raises OpError where the prompts do not align or the metric does not tell them apart.
    """
    clean_ids, corrupted_ids = _ids(model, clean), _ids(model, corrupted)
    tokens, clean_tokens = _tokens(model, corrupted_ids), _tokens(model, clean_ids)
    if len(clean_ids) != len(corrupted_ids):
        raise OpError(
            f"the clean prompt has {len(clean_ids)} tokens, {clean_tokens}, the corrupted one {len(corrupted_ids)}, "
            f"{tokens}; they must align token by token"
        )
    measure = _measure(model, metric)
    clean_logits, kept = run_with_cache(model, clean_ids)
    corrupted_logits, replaced = run_with_cache(model, corrupted_ids)
    best, worst = measure(clean_logits), measure(corrupted_logits)
    if not abs(best - worst) > 0:  # a NaN is not
        raise OpError(
            f"the metric is {best:.6g} for the clean prompt, {worst:.6g} for the corrupted one: nothing to restore"
        )
    places = {kind: _places(kept, glob) for kind, glob in _kinds(where).items()}
    matrices = {kind: np.full((max(found) + 1, len(tokens)), np.nan) for kind, found in places.items()}
    cells = [(kind, layer, path) for kind, found in places.items() for layer, path in found.items()]
    runs = [(*cell, position) for cell in cells for position in range(len(tokens))]
    for kind, layer, path, position in tracked(runs, "Patching"):
        value, before = _output(kept, path, len(tokens)), _output(replaced, path, len(tokens))
        effect = 0.0  # exactly, where both runs have the same bits there
        if value[position].tobytes() != before[position].tobytes():
            with patch(path, output=kept[path].output, rows=[position]):
                effect = (measure(model(corrupted_ids)) - worst) / (best - worst)
        matrices[kind][layer, position] = effect
    return Effects(matrices, tokens, clean_tokens, best, worst)


def _shown(token: str) -> str:
    """A token without the space before it; one that is all space, or does not print, is spelt."""
    stripped = token.strip()
    return stripped if stripped and stripped.isprintable() else repr(token)


def _ids(model: Any, prompt: Any) -> list[int]:
    if isinstance(prompt, str):
        prompt = _tokenizer(model).encode(prompt)
    return [int(each) for each in np.asarray(prompt).reshape(-1)]


def _tokenizer(model: Any) -> Any:
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise OpError("this model has no tokenizer: give token ids in place of text")
    return tokenizer


def _tokens(model: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token, or its id where the model has no tokenizer."""
    tokenizer = getattr(model, "tokenizer", None)
    return [str(each) if tokenizer is None else tokenizer.decode([each], skip_special=False) for each in ids]


def _measure(model: Any, metric: Metric) -> Callable[[Tensor], float]:
    """The metric as a function of the model's logits."""
    if callable(metric):
        return lambda logits: float(metric(logits.numpy().astype("float32")))
    if isinstance(metric, str) or len(metric) != 2:
        raise OpError(f"a metric is a function of the logits, or two tokens, (answer, other); given {metric!r}")
    answer, other = (_token(model, each) for each in metric)
    return lambda logits: float(logits.numpy()[-1, answer]) - float(logits.numpy()[-1, other])


def _token(model: Any, token: Any) -> int:
    if not isinstance(token, str):
        return int(token)
    ids = _tokenizer(model).encode(token, bos=False)
    if len(ids) != 1:
        raise OpError(f"{token!r} is {len(ids)} tokens, {_tokens(model, ids)}; a metric compares single tokens")
    return ids[0]


def _kinds(where: Any) -> dict[str, str]:
    """Globs by the name of their kind."""
    if where is None:
        return PLACES
    if isinstance(where, Mapping):
        return dict(where)
    named = [where] if isinstance(where, str) else list(where)
    return {each: PLACES.get(each, each) for each in named}


def _places(kept: Recording, glob: str) -> dict[int, str]:
    """The addresses that the glob means, by layer."""
    if glob.count("*") != 1:
        raise OpError(f"{glob!r} has {glob.count('*')} `*`, expected one, in the layer's place: 'layers.*.mlp'")
    pattern = re.compile(re.escape(glob).replace(r"\*", r"(\d+)"))
    addresses = [each.address for each in kept] if "/" in glob else [each.path for each in kept.modules]
    found = {int(match[1]): address for address in addresses if (match := pattern.fullmatch(address))}
    if not found:
        near = ", ".join(ops.Selector(glob).nearest(addresses)) or "nothing alike"
        raise SelectorError(f"{glob!r} means no place in this model; there is {near}")
    return dict(sorted(found.items()))


def _output(recording: Recording, path: str, tokens: int) -> np.ndarray:
    output = recording[path].output
    if not output.shape or output.shape[0] != tokens:
        raise OpError(f"{path} gives {output.spec}, expected a row for each of the {tokens} tokens")
    return output.numpy()
