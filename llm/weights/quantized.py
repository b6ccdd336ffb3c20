"""Checkpoints in safetensors that another library quantised: what their tensors stand for, under the plain names.

One entry of `METHODS` for each `quant_method`. Which matrices are quantised, their tensors say. Weights are made when
they are read; what activations the library would have rounded is not repeated here: they stay as they are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from llm.errors import CheckpointError, ConfigError
from llm.weights.codes import Codes, unpacked
from llm.weights.lazy import Lazy

Tensors = dict[str, Any]
_KEYS = ("quantization_config", "quantization", "compression_config")
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where the codes of eight neighbouring outputs stand in a word
_FLOATS = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype("float16"), "float32": np.dtype("float32")}


def unquantized(raw: Mapping[str, Any], tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    """(config.json's values, tensors) of a checkpoint as if it had never been quantised; both as given where it is not.

    Raises ConfigError for a method, or a setting of one, that is not supported, by name; CheckpointError for tensors
    that contradict each other.
    """
    settings = next((raw[key] for key in _KEYS if raw.get(key) is not None), None)
    if settings is None:
        return dict(raw), tensors
    if not isinstance(settings, Mapping):
        raise ConfigError(f"quantization_config is {settings!r:.60}, expected an object")
    method = settings.get("quant_method", "mlx" if {"bits", "group_size"} <= settings.keys() else None)
    if method == "mxfp4":  # the model's own format: its file reads it
        return dict(raw), tensors
    if not isinstance(method, str) or method not in METHODS:
        known = ", ".join(METHODS)
        raise ConfigError(
            f"quant_method {method!r:.60} is not supported; supported are {known}: use another checkpoint"
        )
    config = {key: value for key, value in raw.items() if key not in _KEYS}
    dtype = _FLOATS.get(raw.get("torch_dtype") or raw.get("dtype") or "", _FLOATS["bfloat16"])
    return config, METHODS[method](settings, tensors, dtype)


def _only(settings: Mapping[str, Any], method: str, **expected: tuple[Any, ...]) -> None:
    """Raises ConfigError where a setting is none of those that are supported; one that is missing is the first."""
    for key, values in expected.items():
        value = settings.get(key, values[0])
        if not any(value == each and type(value) is type(each) for each in values):
            shown = ", ".join(map(repr, values))
            raise ConfigError(
                f"{method}: {key} is {value!r:.60}, only {shown} {'is' if len(values) == 1 else 'are'} supported"
            )


def _replaced(tensors: Tensors, ending: str, parts: tuple[str, ...], make: Callable[..., Any], method: str) -> Tensors:
    """`tensors` with one `weight` in place of each module's `ending` and `parts`, the optional ones marked by `?`.

    It is what `make(module, *arrays)` gives, None for those that are not there.
    """
    found = dict(tensors)
    for name in [each for each in tensors if each.endswith(f".{ending}")]:
        module = name.removesuffix(ending)
        given = [found.pop(name)]
        for part in parts:
            if part.endswith("?"):
                given.append(found.pop(module + part[:-1], None))
            elif module + part in found:
                given.append(found.pop(module + part))
            else:
                raise CheckpointError(f"{method}: {name} is there without {module}{part}; the checkpoint is incomplete")
        try:
            found[module + "weight"] = make(module[:-1], *given)
        except (ValueError, IndexError, TypeError, OverflowError, AttributeError) as error:
            shapes = ", ".join(f"{a.dtype}{list(a.shape)}" for a in given if a is not None)
            raise CheckpointError(f"{method}: the tensors of {module[:-1]} ({shapes}) do not fit: {error}") from None
    return found


def _fits(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)


def _index(inputs: int, groups: int, size: int) -> np.ndarray:
    """Which group each input belongs to, of groups of `size`; -1 is all inputs."""
    size = inputs if size == -1 else size
    _fits(size > 0 and groups == -(-inputs // size), f"{groups} groups of {size} for {inputs} inputs")
    return np.arange(inputs) // size


def _awq(settings: Mapping[str, Any], tensors: Tensors, dtype: Any) -> Tensors:
    """AutoAWQ's GEMM layout: qweight [inputs, outputs / 8], qzeros [groups, outputs / 8], scales [groups, outputs]."""
    bits = settings.get("bits", settings.get("w_bit", 4))
    _only({**settings, "bits": bits}, "awq", bits=(4,), version=("gemm", "GEMM"), zero_point=(True, False))

    def make(_: str, weight: np.ndarray, scales: np.ndarray, zeros: np.ndarray) -> Codes:
        _fits(weight.ndim == 2 and weight.shape[1] * 8 == scales.shape[1] == zeros.shape[1] * 8, "outputs differ")
        groups, size = scales.shape[0], settings.get("group_size", settings.get("q_group_size", 128))
        index = _index(weight.shape[0], groups, size)
        _fits(zeros.shape[0] == groups, "zeros and scales differ")
        middle = unpacked(zeros, 4, _AWQ_ORDER).T
        return Codes(lambda: unpacked(weight, 4, _AWQ_ORDER).T, np.ascontiguousarray(scales.T), middle, index, 4)

    return _replaced(tensors, "qweight", ("scales", "qzeros"), make, "awq")


def _gptq(settings: Mapping[str, Any], tensors: Tensors, dtype: Any) -> Tensors:
    """AutoGPTQ's: qweight [inputs * bits / 32, outputs], qzeros [groups, outputs * bits / 32], scales, g_idx [inputs].

    A zero is stored less one, but in version 2.
    """
    form = settings.get("checkpoint_format", "gptq")
    _only(
        {**settings, "checkpoint_format": form}, "gptq", bits=(4, 8, 2), checkpoint_format=("gptq", "gptq_v2"),
        desc_act=(False, True), sym=(True, False),
    )  # fmt: skip
    bits = settings.get("bits", 4)

    def make(_: str, weight: np.ndarray, scales: np.ndarray, zeros: np.ndarray, given: np.ndarray | None) -> Codes:
        inputs, outputs = weight.shape[0] * 32 // bits, weight.shape[1]
        _fits(scales.shape[1] == outputs == zeros.shape[1] * 32 // bits, "outputs differ")
        _fits(zeros.shape[0] == scales.shape[0], "zeros and scales differ")
        size = settings.get("group_size", 128)
        index = _index(inputs, len(scales), size) if given is None else given.astype("int64")
        _fits(index.shape == (inputs,) and index.min() >= 0 and index.max() < len(scales), "g_idx is out of range")
        middle = (unpacked(zeros, bits) + (form == "gptq")) & np.uint8(2**bits - 1)
        rows, middle = np.ascontiguousarray(scales.T), np.ascontiguousarray(middle.T)
        return Codes(lambda: unpacked(np.ascontiguousarray(weight.T), bits), rows, middle, index, bits)

    return _replaced(tensors, "qweight", ("scales", "qzeros", "g_idx?"), make, "gptq")


def _mlx(settings: Mapping[str, Any], tensors: Tensors, dtype: Any) -> Tensors:
    """MLX's affine: weight uint32 [outputs, inputs * bits / 32], scales and biases [outputs, groups].

    value = scale * code + bias, rounded once. A layer may have settings of its own, under its name.
    """
    _only(settings, "mlx", mode=("affine",))

    def make(name: str, scales: np.ndarray, weight: np.ndarray, biases: np.ndarray) -> Lazy:
        own = settings.get(name)
        own = own if isinstance(own, Mapping) else settings
        _only(own, "mlx", bits=(4, 8, 2), mode=("affine",))
        bits = own.get("bits", 4)
        _fits(weight.ndim == 2 and scales.shape == biases.shape and weight.dtype == np.uint32, "shapes differ")
        inputs = weight.shape[1] * 32 // bits
        index = _index(inputs, scales.shape[1], own.get("group_size", 64))
        middle = 2 ** (bits - 1)
        if np.array_equal(biases.astype("float64"), -middle * scales.astype("float64")):
            return Codes(lambda: unpacked(weight, bits), scales, middle, index, bits)

        def values() -> np.ndarray:
            steps = unpacked(weight, bits).astype("float32") * scales.astype("float32")[:, index]
            return (steps + biases.astype("float32")[:, index]).astype(scales.dtype)

        return Lazy((weight.shape[0], inputs), values, scales.dtype)

    return _replaced(tensors, "scales", ("weight", "biases"), make, "mlx")


def _fp8(settings: Mapping[str, Any], tensors: Tensors, dtype: Any) -> Tensors:
    """e4m3 weights by a scale of a block (`weight_scale_inv`), of a row or of the whole; `weight_scale` otherwise."""
    block = settings.get("weight_block_size") or [128, 128]
    if not (isinstance(block, list) and len(block) == 2 and all(type(each) is int and each > 0 for each in block)):
        raise ConfigError(f"fp8: weight_block_size is {block!r:.60}, expected two sizes")
    _only(settings, "fp8", fmt=("e4m3",))

    def make(_: str, scale: np.ndarray, weight: np.ndarray) -> Lazy:
        return _scaled(weight, scale, block, dtype)

    for ending in ("weight_scale_inv", "weight_scale"):
        tensors = _replaced(tensors, ending, ("weight",), make, "fp8")
    return {name: array for name, array in tensors.items() if not name.endswith((".input_scale", ".activation_scale"))}


def _scaled(
    weight: np.ndarray, scale: np.ndarray, block: list[int], dtype: Any, zero: np.ndarray | None = None
) -> Lazy:
    """weight * scale, multiplied in float32 and rounded to `dtype`: a scale of all, of a row, or of a block."""
    _fits(weight.ndim == 2 and weight.dtype.itemsize == 1, f"the weight is {weight.dtype}")
    scale = scale.reshape(1, 1) if scale.size == 1 else scale.reshape(-1, 1) if scale.ndim == 1 else scale
    rows, columns = weight.shape
    if scale.shape not in ((1, 1), (rows, 1)):
        blocks = (-(-rows // block[0]), -(-columns // block[1]))
        _fits(scale.shape == blocks, f"scales are {list(scale.shape)}, expected {list(blocks)}")

    def values() -> np.ndarray:
        wide = scale.astype("float32")
        if scale.shape not in ((1, 1), (rows, 1)):
            wide = np.repeat(np.repeat(wide, block[0], 0)[:rows], block[1], 1)[:, :columns]
        steps = weight.astype("float32") - (0 if zero is None else zero.astype("float32").reshape(scale.shape))
        return (steps * wide).astype(dtype)

    return Lazy(weight.shape, values, dtype)


def _bitsandbytes(settings: Mapping[str, Any], tensors: Tensors, dtype: Any) -> Tensors:
    """4 bits: two codes a byte, the first one high, of a table, times a block's largest magnitude. 8 bits: by rows."""
    found = dict(tensors)
    for name in [each for each in tensors if ".quant_state.bitsandbytes__" in each]:
        weight = name.split(".quant_state.")[0]
        parts = {
            key: found.pop(f"{weight}.{key}", None)
            for key in ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
        }
        try:
            state = json.loads(bytes(found.pop(name)).decode())
            found[weight] = _table(found[weight], state, **parts)
        except (KeyError, ValueError, TypeError, IndexError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"bitsandbytes: the tensors of {weight} do not fit: {str(error)[:100]}") from None
    for name in [each for each in found if each.endswith(".SCB")]:
        weight = name.removesuffix("SCB") + "weight"
        found.pop(f"{weight}_format", None)
        scale = found.pop(name).astype("float32") * np.float32(1 / 127)
        found[weight] = _scaled(found[weight], scale, [1, 1], _FLOATS["float16"])
    return found


def _table(
    weight: np.ndarray, state: Mapping[str, Any], absmax: Any, quant_map: Any, nested_absmax: Any, nested_quant_map: Any
) -> Lazy:
    shape, size, dtype = tuple(state["shape"]), state["blocksize"], _FLOATS[state["dtype"]]
    _fits(all(type(each) is int and each > 0 for each in (*shape, size)), "the shape is no list of sizes")
    count = int(np.prod(shape, dtype=object))
    _fits(len(shape) == 2 and weight.size == -(-count // 2) and len(quant_map) == 16, "the sizes differ")
    _fits(absmax.size == -(-count // size), f"{absmax.size} blocks, expected {-(-count // size)}")

    def values() -> np.ndarray:
        largest = absmax.astype("float32")
        if nested_absmax is not None:
            outer = np.repeat(nested_absmax, state["nested_blocksize"])[: absmax.size]
            largest = nested_quant_map[absmax] * outer + np.float32(state["nested_offset"])
        codes = np.stack((weight.reshape(-1) >> 4, weight.reshape(-1) & 15), 1).reshape(-1)[:count]
        return (quant_map[codes] * np.repeat(largest, size)[:count]).astype(dtype).reshape(shape)

    return Lazy(shape, values, dtype)


def _compressed(settings: Mapping[str, Any], tensors: Tensors, dtype: Any) -> Tensors:
    """compressed-tensors: the settings of the weights are those of the only group of modules."""
    groups = settings.get("config_groups")
    if not isinstance(groups, Mapping) or not all(isinstance(each, Mapping) for each in groups.values()):
        raise ConfigError("compressed-tensors: config_groups is missing")
    _only(settings, "compressed-tensors", quantization_status=("compressed", "frozen"), kv_cache_scheme=(None,))
    kinds, form = [each.get("weights") for each in groups.values()], settings.get("format")
    if not kinds or not all(isinstance(each, Mapping) for each in kinds):
        raise ConfigError("compressed-tensors: a group of modules does not say how its weights are held")
    for each in kinds:
        _only(each, "compressed-tensors", type=("int", "float"), strategy=("group", "channel", "tensor", "block"))
    if form != "pack-quantized" and any(each != kinds[0] for each in kinds):
        raise ConfigError("compressed-tensors: groups of modules with differing weights are not supported")
    weights = kinds[0]
    if (
        isinstance(settings.get("sparsity_config"), Mapping)
        and settings["sparsity_config"].get("format", "dense") != "dense"
    ):
        raise ConfigError("compressed-tensors: sparse weights are not supported")
    tensors = {
        n: a for n, a in tensors.items() if not n.endswith((".input_scale", ".input_zero_point", ".input_global_scale"))
    }
    if form == "pack-quantized":
        parts = ("weight_scale", "weight_shape", "weight_zero_point?", "weight_g_idx?")
        return _replaced(tensors, "weight_packed", parts, partial(_packed, _by_name(groups)), "compressed-tensors")
    if form not in ("int-quantized", "float-quantized", "naive-quantized"):
        raise ConfigError(
            f"compressed-tensors: format {form!r:.60} is not supported; supported are pack-quantized, int-quantized, "
            "float-quantized and naive-quantized"
        )
    _only(weights, "compressed-tensors", num_bits=(8,))

    def make(_: str, scale: np.ndarray, weight: np.ndarray, zero: np.ndarray | None) -> Lazy:
        size = weights.get("group_size") or 0
        block = weights.get("block_structure") or ([1, size] if size > 0 else [1, weight.shape[1]])
        return _scaled(weight, scale, block, scale.dtype, zero)

    return _replaced(tensors, "weight_scale", ("weight", "weight_zero_point?"), make, "compressed-tensors")


def _by_name(groups: Mapping[str, Mapping[str, Any]]) -> Callable[[str], Mapping[str, Any]]:
    """The settings of a module's weights: of the group that names it, else of those that go by a class of modules."""
    targets: list[tuple[Mapping[str, Any], Any]] = [(each["weights"], each.get("targets")) for each in groups.values()]
    if not all(isinstance(listed, list) for _, listed in targets):
        raise ConfigError("compressed-tensors: a group of modules has no list of targets")
    named = {each: weights for weights, listed in targets for each in listed if isinstance(each, str)}
    general = [weights for weights, listed in targets if "Linear" in listed]
    alone = targets[0][0] if all(weights == targets[0][0] for weights, _ in targets) else None

    def weights_of(module: str) -> Mapping[str, Any]:
        if alone is not None:
            return alone
        if module in named:
            return named[module]
        if len(general) != 1:
            raise ConfigError(f"compressed-tensors: which group {module} belongs to is not said by its name or class")
        return general[0]

    return weights_of


def _packed(
    weights_of: Callable[[str], Mapping[str, Any]],
    module: str,
    weight: np.ndarray,
    scales: np.ndarray,
    shape: Any,
    zeros: Any,
    given: Any,
) -> Codes:
    """Signed codes plus 8 or 128, eight or four in a word along the inputs; zeros likewise, along the outputs."""
    settings = weights_of(module)
    _only(settings, "compressed-tensors", num_bits=(4, 8))
    bits, (rows, inputs) = settings.get("num_bits", 4), (int(each) for each in shape)
    _fits(weight.shape == (rows, -(-inputs * bits // 32)) and len(scales) == rows, f"the shape is {[rows, inputs]}")
    size = settings.get("group_size") or -1
    index = _index(inputs, scales.shape[1], size) if given is None or (given == -1).all() else given.astype("int64")
    _fits(index.shape == (inputs,) and index.min() >= 0 and index.max() < scales.shape[1], "g_idx is out of range")
    middle: Any = 2 ** (bits - 1)
    if zeros is not None:
        middle = unpacked(np.ascontiguousarray(zeros.T), bits).T[:rows]
        _fits(middle.shape == scales.shape, "zeros and scales differ")
    return Codes(lambda: unpacked(weight, bits)[:, :inputs], scales, middle, index, bits)


METHODS: dict[str, Callable[[Mapping[str, Any], Tensors, Any], Tensors]] = {
    "awq": _awq,
    "gptq": _gptq,
    "mlx": _mlx,
    "compressed-tensors": _compressed,
    "bitsandbytes": _bitsandbytes,
    "fp8": _fp8,
    "fbgemm_fp8": _fp8,
}
