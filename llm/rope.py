"""Rotary position embedding: what a config says about it, and the frequencies that follow.

After transformers 5's `modeling_rope_utils.py`, whose names and defaults are kept. Papers: RoPE (arXiv 2104.09864),
YaRN (2309.00071), LongRoPE (2402.13753); "llama3" is Llama 3.1's own scheme, "dynamic" is NTK-aware scaling.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from llm.errors import ConfigError

T = TypeVar("T")

ROPE_KEYS = frozenset(
    {"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "original_max_position_embeddings"}
)

# rope_type -> (required keys, optional keys)
_ORIGINAL = "original_max_position_embeddings"
_TYPES: dict[str, tuple[set[str], set[str]]] = {
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "dynamic": ({"factor"}, set()),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor"}, {_ORIGINAL}),
    "yarn": (
        {"factor"},
        {_ORIGINAL, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    ),
    "longrope": ({"short_factor", "long_factor"}, {_ORIGINAL, "attention_factor", "factor"}),
}
_ALIASES = {"su": "longrope"}
_COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


@dataclass(frozen=True)
class RopeScaling:
    """How a model reaches beyond its pretraining length. Which fields are set depends on `rope_type`."""

    rope_type: str
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Rope:
    """The rotary embedding of a model: the first `rotary_dim` of a head rotate, `scaling` None is plain RoPE."""

    theta: float
    rotary_dim: int
    max_position_embeddings: int | None = None
    scaling: RopeScaling | None = None


def parse_rope(
    raw: Mapping[str, Any],
    head_dim: int,
    *,
    layer_type: str | None = None,
    theta: float = 10000.0,
    partial_rotary_factor: float = 1.0,
) -> Rope:
    """The Rope of a config.json, from `rope_theta` and `rope_scaling`, or from transformers 5's `rope_parameters`.

    `layer_type` picks an entry where `rope_parameters` has one for each type of layer ("full_attention", ...), and
    changes nothing where it has not. `theta` and `partial_rotary_factor` stand where they are missing. As in
    transformers, a top-level `original_max_position_embeddings` comes before one inside, and a missing one is
    `max_position_embeddings`.
    Raises ConfigError for a type or a key that is not known, a required key that is missing, a value out of range.
    """
    block, nested = _block(raw, layer_type)
    rope_type = _rope_type(block)
    required, optional = _TYPES[rope_type]
    if unknown := sorted(block.keys() - required - optional - _COMMON):
        known = ", ".join(sorted((required | optional | _COMMON) - {"type"}))
        raise ConfigError(f"rope type {rope_type!r} has unknown keys {', '.join(map(repr, unknown))}; known: {known}")
    if missing := sorted(required - block.keys()):
        raise ConfigError(f"rope type {rope_type!r} lacks the keys {', '.join(map(repr, missing))}")
    theta = _number("rope_theta", _shared(raw, block, "rope_theta", theta, nested), above=1.0)
    part = _shared(raw, block, "partial_rotary_factor", partial_rotary_factor, nested)
    part = _number("partial_rotary_factor", part, above=0.0)
    rotary_dim = int(head_dim * part)
    if part > 1 or rotary_dim < 2 or rotary_dim % 2:
        raise ConfigError(
            f"partial_rotary_factor {part} of head_dim {head_dim} must be an even size in [2, {head_dim}]"
        )
    length = raw.get("max_position_embeddings")
    length = None if length is None else _length("max_position_embeddings", length)
    scaling = None if rope_type == "default" else _scaling(rope_type, block, raw, length, rotary_dim, nested)
    return Rope(theta, rotary_dim, length, scaling)


def frequencies(rope: Rope, seq_len: int) -> tuple[np.ndarray, float]:
    """(inverse frequencies: float32 [rotary_dim / 2], the factor on cos and sin) for positions below `seq_len`.

    The steps and their float32 rounding are transformers'; only the power is rounded once, from float64, so that it
    is the same on every machine. "dynamic" and "longrope" depend on `seq_len`, and on nothing that came before.
    """
    exponents = np.arange(0, rope.rotary_dim, 2, dtype=np.float32) / np.float32(rope.rotary_dim)
    s = rope.scaling
    if s is None:
        return 1.0 / _power(rope.theta, exponents), 1.0
    match s.rope_type:
        case "linear":
            return 1.0 / _power(rope.theta, exponents) / np.float32(_given(s.factor)), 1.0
        case "dynamic":
            return 1.0 / _power(_ntk_theta(rope, _given(s.factor), seq_len), exponents), 1.0
        case "llama3":
            return _llama3(s, 1.0 / _power(rope.theta, exponents)), 1.0
        case "yarn":
            return _yarn(rope, s, _power(rope.theta, exponents)), _yarn_attention_factor(rope, s)
        case "longrope":
            original = _given(s.original_max_position_embeddings)
            stretch = _given(s.long_factor if seq_len > original else s.short_factor)
            inverse = 1.0 / (np.asarray(stretch, np.float32) * _power(rope.theta, exponents))
            return inverse, _longrope_attention_factor(rope, s)
    raise ConfigError(f"unknown rope type {s.rope_type!r}; known: {', '.join(_TYPES)}")


def regime(rope: Rope, seq_len: int) -> int | None:
    """What `frequencies` depends on of a sequence of `seq_len` tokens: equal values, equal frequencies."""
    s = rope.scaling
    if s is not None and s.rope_type == "dynamic":
        return max(seq_len, _given(rope.max_position_embeddings))
    if s is not None and s.rope_type == "longrope":
        return int(seq_len > _given(s.original_max_position_embeddings))
    return None


def _block(raw: Mapping[str, Any], layer_type: str | None) -> tuple[Mapping[str, Any], bool]:
    """The rope parameters that apply, and whether they are this layer type's own."""
    old, new = raw.get("rope_scaling"), raw.get("rope_parameters")
    if old and new and old != new:
        raise ConfigError(f"rope_scaling {old!r} and rope_parameters {new!r} contradict each other: keep one")
    block = new or old or {}
    if not isinstance(block, Mapping):
        raise ConfigError(f"rope_scaling or rope_parameters must be an object, given {block!r}")
    layer_types = [key for key, value in block.items() if isinstance(value, Mapping)]
    if not layer_types:
        return block, False
    if layer_type is None or not isinstance(block.get(layer_type), Mapping):
        raise ConfigError(f"rope_parameters is given for layer types {layer_types}, not for {layer_type!r}")
    return block[layer_type], True


def _rope_type(block: Mapping[str, Any]) -> str:
    given = [block[key] for key in ("rope_type", "type") if block.get(key) is not None]
    names = {_ALIASES.get(name, name) if isinstance(name, str) else repr(name) for name in given} or {"default"}
    if len(names) > 1:
        raise ConfigError(f"rope_type {given[0]!r} and type {given[1]!r} contradict each other: keep one")
    name = names.pop()
    if name not in _TYPES:
        raise ConfigError(f"unknown rope type {name!r}; known: {', '.join([*_TYPES, *_ALIASES])}")
    return name


def _shared(raw: Mapping[str, Any], block: Mapping[str, Any], key: str, default: float, nested: bool) -> Any:
    """A value that may stand inside the rope parameters or beside them; a layer type's own comes first."""
    inside, beside = block.get(key), raw.get(key)
    if inside is not None and beside is not None and inside != beside and not nested:
        raise ConfigError(f"{key} is {inside!r} in the rope parameters and {beside!r} beside them: keep one")
    return next((value for value in (inside, beside) if value is not None), default)


def _scaling(
    rope_type: str, block: Mapping[str, Any], raw: Mapping[str, Any], length: int | None, rotary_dim: int, nested: bool
) -> RopeScaling:
    values: dict[str, Any] = {}
    required, optional = _TYPES[rope_type]
    for key in required | optional - {_ORIGINAL}:
        value = block.get(key)
        if value is None and (key in optional or rope_type == "yarn"):  # a null factor: the ratio of the lengths
            continue
        if key in ("short_factor", "long_factor"):
            values[key] = _factors(key, value, rotary_dim // 2)
        elif key == "truncate":
            values[key] = _flag(key, value)
        else:
            # Zero means "not given" for the optional ones of yarn, as in transformers.
            values[key] = _number(key, value, above=0.0, or_equal=key in optional and key != "factor")
    if _ORIGINAL in optional:
        beside = None if nested else raw.get(_ORIGINAL)
        original = next((v for v in (beside, block.get(_ORIGINAL), length) if v is not None), None)
        if original is None:
            raise ConfigError(f"rope type {rope_type!r} needs {_ORIGINAL} or max_position_embeddings")
        values[_ORIGINAL] = _length(_ORIGINAL, original)
    scaling = RopeScaling(rope_type, **values)
    _consistent(scaling, length, rotary_dim)
    return scaling


def _consistent(s: RopeScaling, length: int | None, rotary_dim: int) -> None:
    """What one value demands of another."""
    if s.rope_type == "dynamic" and (length is None or rotary_dim == 2):
        raise ConfigError("rope type 'dynamic' needs max_position_embeddings and a rotary size above 2")
    if s.rope_type in ("yarn", "longrope") and s.factor is None and length is None:
        raise ConfigError(f"rope type {s.rope_type!r} without a factor needs max_position_embeddings")
    if s.rope_type == "llama3" and _given(s.low_freq_factor) >= _given(s.high_freq_factor):
        raise ConfigError(
            f"rope: low_freq_factor {s.low_freq_factor} must be below high_freq_factor {s.high_freq_factor}"
        )
    if s.rope_type == "yarn" and (s.beta_slow or 1) > (s.beta_fast or 32):
        raise ConfigError(f"rope: beta_slow {s.beta_slow or 1} exceeds beta_fast {s.beta_fast or 32}")


def _ntk_theta(rope: Rope, factor: float, seq_len: int) -> float:
    length = _given(rope.max_position_embeddings)
    grown = factor * max(seq_len, length) / length - (factor - 1)
    return rope.theta * grown ** (rope.rotary_dim / (rope.rotary_dim - 2))


def _llama3(s: RopeScaling, inverse: np.ndarray) -> np.ndarray:
    """Long wavelengths are stretched by `factor`, short ones kept, those between interpolated."""
    factor, low, high = _given(s.factor), _given(s.low_freq_factor), _given(s.high_freq_factor)
    original = _given(s.original_max_position_embeddings)
    wavelength = (2 * math.pi) / inverse
    smooth = (original / wavelength - low) / (high - low)
    between = (1 - smooth) * inverse / factor + smooth * inverse
    stretched = np.where(wavelength > original / low, inverse / factor, between)
    return np.where(wavelength < original / high, inverse, stretched)


def _yarn(rope: Rope, s: RopeScaling, powers: np.ndarray) -> np.ndarray:
    """Frequencies that turn often within the original length are kept, rare ones stretched, a ramp lies between."""
    original = _given(s.original_max_position_embeddings)

    def dim_of(turns: float) -> float:
        return rope.rotary_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    first, last = dim_of(s.beta_fast or 32), dim_of(s.beta_slow or 1)
    if s.truncate is not False:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rope.rotary_dim - 1)
    last += 0.001 if first == last else 0.0  # no division by zero
    ramp = (np.arange(rope.rotary_dim // 2, dtype=np.float32) - np.float32(first)) / np.float32(last - first)
    kept = 1 - np.clip(ramp, 0, 1)
    return 1.0 / (np.float32(_factor(rope, s)) * powers) * (1 - kept) + 1.0 / powers * kept


def _yarn_attention_factor(rope: Rope, s: RopeScaling) -> float:
    if s.attention_factor is not None:
        return s.attention_factor

    def mscale(weight: float) -> float:
        factor = _factor(rope, s)
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    return mscale(s.mscale) / mscale(s.mscale_all_dim) if s.mscale and s.mscale_all_dim else mscale(1)


def _longrope_attention_factor(rope: Rope, s: RopeScaling) -> float:
    if s.attention_factor is not None:
        return s.attention_factor
    factor = _factor(rope, s)
    return math.sqrt(1 + math.log(factor) / math.log(_given(s.original_max_position_embeddings))) if factor > 1 else 1.0


def _factor(rope: Rope, s: RopeScaling) -> float:
    """The given factor, else how much longer the context is than the original."""
    if s.factor is not None:
        return s.factor
    return _given(rope.max_position_embeddings) / _given(s.original_max_position_embeddings)


def _power(base: float, exponents: np.ndarray) -> np.ndarray:
    """base ** exponents, float32; the base is rounded to float32 first, as torch does."""
    return np.power(np.float64(np.float32(base)), exponents.astype(np.float64)).astype(np.float32)


def _given(value: T | None) -> T:
    if value is None:
        raise ConfigError("a rope scaling lacks a value that its type requires: build it with parse_rope")
    return value


def _number(key: str, value: Any, *, above: float, or_equal: bool = False) -> float:
    # Below what float32 holds; false for infinity and NaN, which JSON readers let through.
    number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30
    if number and (value > above or (or_equal and value == above)):
        return float(value)
    raise ConfigError(f"rope's {key} is {value!r}, expected a number {'from' if or_equal else 'above'} {above:g}")


def _length(key: str, value: Any) -> int:
    if type(value) is int and 1 < value < 2**31:
        return value
    raise ConfigError(f"{key} is {value!r}, expected an integer in (1, 2**31)")


def _flag(key: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise ConfigError(f"rope's {key} is {value!r}, expected true or false")


def _factors(key: str, value: Any, count: int) -> tuple[float, ...]:
    if not isinstance(value, list | tuple) or len(value) != count:
        given = f"{len(value)} values" if isinstance(value, list | tuple) else repr(value)
        raise ConfigError(f"rope's {key} has {given}, expected a list of {count} numbers (half the rotary size)")
    return tuple(_number(f"{key}[{index}]", item, above=0.0) for index, item in enumerate(value))
