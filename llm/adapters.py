"""LoRA adapters in PEFT's layout: applied live beside the weights, switched on and off, merged and taken out again.

y = x @ W.T + bias + x @ A.T @ B.T * scale, for some linear layers; scale is alpha / r, or alpha / sqrt(r) (rsLoRA).
Hu et al. 2021 (arXiv 2106.09685), Kalajdzievski 2023 (2312.03732).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import ops
from ops import Tensor
from ops.spec import DTYPES, FLOATS

from .errors import CheckpointError, ConfigError, UserError
from .nn import Linear, Module
from .weights import read_file

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_USED = {"r", "lora_alpha", "target_modules", "use_rslora", "rank_pattern", "alpha_pattern"}
# About training, files, or where to apply what the tensors say; and how A and B began.
_HARMLESS = """
peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode lora_dropout
fan_in_fan_out exclude_modules layers_to_transform layers_pattern megatron_core qalora_group_size loftq_config
eva_config corda_config lora_ga_config velora_config runtime_config
"""
_INERT = frozenset(_HARMLESS.split())
_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal")  # others change the weights of the model, too
_TENSOR = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])\.weight")
_COPY = re.compile(r"(?:base_model\.model\.)?(.+?)(?:\.base_layer)?\.weight")

_here: ContextVar[Mapping[Adapter, bool]] = ContextVar("limpid_adapters", default={})  # noqa: B039 - never changed


@dataclass(eq=False)
class Delta:
    """What an adapter adds to one linear layer. a: float32 [r, inputs]; b: float32 [outputs, r], times the scale."""

    adapter: Adapter
    a: Tensor
    b: Tensor

    def added(self, x: Tensor, y: Tensor) -> Tensor:
        """y [n, outputs] and, where the adapter is on, what it adds for x [n, inputs]; added in float32."""
        if not self.adapter.on or self.adapter.merged:
            return y
        wide, sum_ = (each if each.dtype == "float32" else ops.cast(each, dtype="float32") for each in (x, y))
        sum_ = sum_ + ops.linear(ops.linear(wide, self.a), self.b)
        return sum_ if y.dtype == "float32" else ops.cast(sum_, dtype=y.dtype)


@dataclass(eq=False)
class _Merged:
    """A linear layer's weight without any adapter, what stands there instead, and whose deltas are in it, in order."""

    plain: Tensor
    made: Tensor
    deltas: tuple[Delta, ...]


@dataclass(eq=False)
class Adapter:
    """A model's LoRA adapter: on when it is loaded. Several add up, in the order they were loaded."""

    path: Path
    deltas: dict[str, Delta] = field(default_factory=dict)  # by the path of the linear layer
    merged: bool = False
    _on: bool = True
    _linears: dict[str, Linear] = field(default_factory=dict)

    @property
    def on(self) -> bool:
        """Whether calls made here, in this context, take it in."""
        return _here.get().get(self, self._on)

    def enable(self) -> None:
        """On, for all calls that no `with` says otherwise of."""
        self._on = True

    def disable(self) -> None:
        """Off, likewise. Raises UserError while it is merged."""
        self._check_live("disable")
        self._on = False

    @contextlib.contextmanager
    def active(self, on: bool = True) -> Iterator[Adapter]:
        """`with adapter.active():` on for the calls made inside, in this thread or task; `active(False)` off."""
        if not on:
            self._check_live("switch off")
        token = _here.set({**_here.get(), self: on})
        try:
            yield self
        finally:
            _here.reset(token)

    def _check_live(self, what: str) -> None:
        if self.merged:
            raise UserError(f"cannot {what} {self.path.name}: it is merged into the weights; unmerge() it first")

    def merge(self) -> None:
        """Add it to the weights, in float32 rounded to their dtype: calls then cost what they did without it.

        The weights as they were are kept, for `unmerge`. Raises UserError for packed weights, and where it is merged.
        """
        self._check_live("merge")
        new = {
            path: self._with(path, (*_deltas_in(linear), self.deltas[path])) for path, linear in self._linears.items()
        }
        self._put(new)
        self.merged = True

    def unmerge(self) -> None:
        """Take it out again: the weights are what they would be had it never been merged, to the bit."""
        if not self.merged:
            raise UserError(f"{self.path.name} is not merged")
        new = {}
        for path, linear in self._linears.items():
            new[path] = self._with(path, tuple(each for each in _deltas_in(linear) if each.adapter is not self))
        self._put(new)
        self.merged = False

    def remove(self) -> None:
        """Take it off its model. Raises UserError while it is merged."""
        self._check_live("remove")
        for path, linear in self._linears.items():
            linear._deltas = tuple(each for each in linear._deltas if each is not self.deltas[path])
        self._linears, self.deltas = {}, {}

    def _with(self, path: str, deltas: tuple[Delta, ...]) -> _Merged:
        """The layer's weight with these deltas; nothing is changed yet."""
        linear = self._linears[path]
        state = linear._merged
        if state is not None and linear.weight is not state.made:
            raise UserError(f"the weight of {path} was changed after an adapter was merged into it: put it back first")
        plain = linear.weight if state is None else state.plain
        if not isinstance(plain, Tensor) or plain.dtype not in FLOATS:
            raise UserError(
                f"the weight of {path} is {plain.dtype}, into which nothing can be merged: leave the adapter live, or "
                "load the model with weights='float32', 'float16' or 'bfloat16'"
            )
        if not deltas:
            return _Merged(plain, plain, ())
        total = plain.numpy().astype("float32")
        for each in deltas:
            total += each.b.numpy() @ each.a.numpy()
        return _Merged(plain, ops.tensor(total.astype(DTYPES[plain.dtype]), device=plain.device), deltas)

    def _put(self, new: Mapping[str, _Merged]) -> None:
        for path, state in new.items():
            linear = self._linears[path]
            linear.weight, linear._merged = state.made, state if state.deltas else None

    def __repr__(self) -> str:
        state = "merged" if self.merged else "on" if self.on else "off"
        return f"Adapter({str(self.path)!r}, {len(self.deltas)} layers, {state})"


def _deltas_in(linear: Linear) -> tuple[Delta, ...]:
    return linear._merged.deltas if linear._merged is not None else ()


def load_adapter(model: Any, path: str | os.PathLike[str]) -> Adapter:
    """Read a LoRA adapter, a folder in PEFT's layout, and put it beside the weights of `model`; it is on.

    Nothing of the weights is changed, packed ones serve as well; `model.save` writes them without it, unless merged.
    Raises ConfigError, by name, for a setting that would change the arithmetic and is not supported; CheckpointError
    for tensors that do not fit it or the model; UserError where there is no such folder.
    """
    folder = Path(path).expanduser()
    config = _config(folder)
    if not (folder / WEIGHTS).is_file():
        pickled = " (adapter_model.bin is a pickle, which can run code and is never loaded)"
        more = pickled if (folder / "adapter_model.bin").exists() else ""
        raise UserError(f"{folder} has no {WEIGHTS}{more}: save the adapter with safe_serialization=True")
    pairs = _pairs(folder, _without_copies(folder, read_file(folder / WEIGHTS), model))
    modules = dict(model.modules())
    found = {name.removeprefix(model.base) if name not in modules else name: pair for name, pair in pairs.items()}
    if len(found) < len(pairs):
        raise CheckpointError(f"{folder}: modules are there with and without {model.base!r} in front")
    _check_targets(folder, config, found, modules, model)
    adapter = Adapter(folder)
    for name, (a, b) in found.items():
        scale = _scale(folder, config, name, a.shape[0], model)
        scaled = np.ascontiguousarray(b, "float32") * np.float32(scale)
        down = ops.tensor(np.ascontiguousarray(a, "float32"), device=model.device)
        adapter.deltas[name] = Delta(adapter, down, ops.tensor(scaled, device=model.device))
        adapter._linears[name] = modules[name]
    for name, linear in adapter._linears.items():
        linear._deltas = (*linear._deltas, adapter.deltas[name])
    return adapter


def _config(folder: Path) -> dict[str, Any]:
    """The settings, all understood. Raises ConfigError or UserError."""
    file = folder / CONFIG
    try:
        raw = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} has no {CONFIG}: give the folder of an adapter in PEFT's layout") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file} cannot be read as JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{file} holds a JSON {type(raw).__name__}, expected an object")
    if raw.get("peft_type", "LORA") != "LORA":
        raise ConfigError(f"{file}: peft_type {raw['peft_type']!r:.60} is not supported, only LORA is")
    for key, value in raw.items():
        off = value is None or value is False or value in ({}, []) or (key == "bias" and value == "none")
        if key == "init_lora_weights":
            off = any(value is each or value == each for each in _BEGINNINGS if type(each) is type(value))
        if key not in _USED | _INERT and not off:
            raise ConfigError(f"{file}: {key} = {value!r:.80} is not supported, and would change the arithmetic")
    rank, alpha = raw.get("r", 8), raw.get("lora_alpha", 8)
    if type(rank) is not int or not 0 < rank < 2**20:
        raise ConfigError(f"{file}: r is {rank!r:.60}, expected a positive integer")
    for key in ("rank_pattern", "alpha_pattern"):
        given = raw.get(key) or {}
        numbers = isinstance(given, dict) and all(_number(each) for each in given.values())
        if not numbers or any(re.search(r"[^\w.\-]", each) for each in given):
            raise ConfigError(
                f"{file}: {key} is {given!r:.100}, expected names of modules, no expressions, and numbers"
            )
    if not _number(alpha) or not isinstance(raw.get("use_rslora", False), bool):
        given = f"lora_alpha is {alpha!r:.60} and use_rslora {raw.get('use_rslora')!r:.60}"
        raise ConfigError(f"{file}: {given}, expected a number and true or false")
    return raw


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _without_copies(folder: Path, tensors: Mapping[str, np.ndarray], model: Any) -> dict[str, np.ndarray]:
    """Without whole weights, which PEFT adds of an output or embedding it changes: they must be the model's own."""
    found, weights = dict(tensors), model.named_tensors()
    for name, array in tensors.items():
        match = _COPY.fullmatch(name)
        if match is None or (weight := weights.get(f"{match[1]}.weight")) is None:
            continue
        if not np.array_equal(weight.numpy().astype("float64"), array.astype("float64")):
            raise CheckpointError(
                f"{folder}: {name} is another than the {weight.dtype} weight of the model: the adapter belongs to "
                "another model, or to one of other rounding"
            )
        del found[name]
    return found


def _pairs(folder: Path, tensors: Mapping[str, np.ndarray]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A and B by the checkpoint's names of the modules."""
    parts: dict[str, dict[str, np.ndarray]] = {}
    unknown = []
    for name, array in tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is None or array.ndim != 2 or array.dtype.name not in (*FLOATS, "float64"):
            unknown.append(f"{name[:100]} {array.dtype}{list(array.shape)}")
        elif match[2] in parts.setdefault(match[1], {}):
            raise CheckpointError(f"{folder}: {match[1]} is there twice, with and without base_model.model in front")
        else:
            parts[match[1]][match[2]] = array
    if unknown:
        more = f" and {len(unknown) - 4} more" * (len(unknown) > 4)
        raise CheckpointError(
            f"{folder}: tensors that are no LoRA matrices of linear layers: {', '.join(unknown[:4])}{more}"
        )
    if halves := [name for name, each in parts.items() if each.keys() != {"A", "B"}]:
        raise CheckpointError(f"{folder}: {', '.join(halves[:4])} has only one of lora_A and lora_B")
    if not parts:
        raise CheckpointError(f"{folder}: {WEIGHTS} holds no tensors")
    return {name: (each["A"], each["B"]) for name, each in parts.items()}


def _check_targets(folder: Path, config: Mapping[str, Any], found: Mapping[str, tuple[np.ndarray, np.ndarray]],
                   modules: Mapping[str, Module], model: Any) -> None:  # fmt: skip
    """The tensors belong to linear layers of the model, have their sizes, and are all that the settings name."""
    problems = []
    for name, (a, b) in found.items():
        linear = modules.get(name)
        if not isinstance(linear, Linear):
            kind = (
                "no module of it" if linear is None else f"a {type(linear).__name__}, only linear layers are supported"
            )
            tied = ", whose output is the embedding's table" if name in model.heads and linear is None else ""
            problems.append(f"{name} is {kind}{tied}")
        elif (b.shape[0], a.shape[1]) != linear.weight.shape or a.shape[0] != b.shape[1]:
            problems.append(f"{name} is {list(linear.weight.shape)}, lora_A {list(a.shape)}, lora_B {list(b.shape)}")
        elif a.shape[0] != (rank := _of(config, "rank_pattern", name, model, config.get("r", 8))):
            problems.append(f"lora_A of {name} is {list(a.shape)}, and the settings give rank {rank}")
    targets = config.get("target_modules")
    chosen = config.get("exclude_modules") or config.get("layers_to_transform") is not None
    if isinstance(targets, list) and not chosen:
        meant = [name for name, each in modules.items() if isinstance(each, Linear) and _named(name, targets, model)]
        problems += [f"{name} is among target_modules and not in {WEIGHTS}" for name in meant if name not in found]
        problems += [f"{name} is not among target_modules" for name in found if not _named(name, targets, model)]
    if problems:
        more = f"; and {len(problems) - 6} more" * (len(problems) > 6)
        raise CheckpointError(f"{folder} does not fit {type(model).__name__}: {'; '.join(problems[:6])}{more}")


def _named(name: str, listed: Any, model: Any) -> bool:
    """Whether one of the names is the module's, in full or the end of it."""
    full = name if name.split(".")[0] in model.heads else model.base + name
    return any(isinstance(each, str) and (full == each or full.endswith(f".{each}")) for each in listed)


def _of(config: Mapping[str, Any], key: str, name: str, model: Any, default: Any) -> Any:
    """The module's entry of a pattern: the first that names it."""
    given = config.get(key) or {}
    return next((value for each, value in given.items() if _named(name, [each], model)), default)


def _scale(folder: Path, config: Mapping[str, Any], name: str, rank: int, model: Any) -> float:
    alpha = _of(config, "alpha_pattern", name, model, config.get("lora_alpha", 8))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
