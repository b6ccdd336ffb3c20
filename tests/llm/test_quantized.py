"""Checkpoints that other libraries quantised, packed here by their documented layouts, read as the plain numbers."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest

import llm
from llm.errors import CheckpointError, ConfigError
from llm.load import config_values
from llm.weights import read_file, write_file
from llm.weights.quantized import unquantized
from tests.llm import small

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
MODULE = "model.layers.0.mlp.up_proj"


def read(settings, tensors, **raw):
    """The weight of a checkpoint with one module, and what it lazily is."""
    config, found = unquantized({"quantization_config": settings, "model_type": "llama", **raw}, tensors)
    assert "quantization_config" not in config and [*found] == [f"{MODULE}.weight"]
    lazy = found[f"{MODULE}.weight"]
    return np.asarray(lazy), lazy


def words(codes, bits, axis):
    """Codes put into int32 words along an axis, the first in the lowest bits."""
    codes = np.moveaxis(codes.astype("uint64"), axis, -1)
    count = 32 // bits
    pad = -codes.shape[-1] % count
    codes = np.concatenate((codes, np.zeros((*codes.shape[:-1], pad), "uint64")), -1)
    packed = np.zeros((*codes.shape[:-1], codes.shape[-1] // count), "uint64")
    for i in range(count):
        packed |= codes[..., i::count] << np.uint64(bits * i)
    return np.ascontiguousarray(np.moveaxis(packed, -1, axis)).astype("uint32").view("int32")


def each(rows, inputs, value):
    """[rows, inputs] of value(row, input): one element after another, as the formula says it."""
    return np.array([[value(row, i) for i in range(inputs)] for row in range(rows)])


def scales_of(rng, shape, dtype: np.dtype = np.dtype("float16")):  # noqa: B008
    return rng.uniform(0.001, 0.02, shape).astype(dtype)


@pytest.mark.parametrize("group", [32, 64, -1])
@pytest.mark.parametrize("symmetric", [False, True])
def test_awq(rng, group, symmetric):
    inputs, outputs = 64, 24
    size = inputs if group == -1 else group
    codes = rng.integers(0, 16, (inputs, outputs))
    zeros = np.full((inputs // size, outputs), 8) if symmetric else rng.integers(0, 16, (inputs // size, outputs))
    scales = scales_of(rng, (inputs // size, outputs))
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # which column stands at place i of a word

    def packed(values):
        return words(values.reshape(len(values), -1, 8)[..., order].reshape(values.shape), 4, 1)

    tensors = {f"{MODULE}.qweight": packed(codes), f"{MODULE}.qzeros": packed(zeros), f"{MODULE}.scales": scales}
    settings = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    given, lazy = read(settings, tensors)
    wanted = each(
        outputs, inputs, lambda o, i: np.float16(int(codes[i, o]) - int(zeros[i // size, o])) * scales[i // size, o]
    )
    assert given.dtype == np.float16 and np.array_equal(given, wanted)
    assert lazy.form == ("q4" if symmetric else None)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_gptq(rng, bits, act_order, symmetric, version):
    inputs, outputs, size = 64, 16, 32
    codes = rng.integers(0, 2**bits, (inputs, outputs))
    middle = np.full((2, outputs), 2 ** (bits - 1)) if symmetric else rng.integers(0, 2**bits, (2, outputs))
    scales = scales_of(rng, (2, outputs))
    index = rng.permutation(inputs) // size if act_order else np.arange(inputs) // size
    tensors = {
        f"{MODULE}.qweight": words(codes, bits, 0),
        f"{MODULE}.qzeros": words((middle - (version == "gptq")) % 2**bits, bits, 1),
        f"{MODULE}.scales": scales,
        f"{MODULE}.g_idx": index.astype("int32"),
    }
    settings = {"quant_method": "gptq", "bits": bits, "group_size": size, "desc_act": act_order, "sym": symmetric}
    given, lazy = read({**settings, "checkpoint_format": version, "damp_percent": 0.1}, tensors)
    wanted = each(
        outputs, inputs, lambda o, i: scales[index[i], o] * np.float16(int(codes[i, o]) - int(middle[index[i], o]))
    )
    assert given.dtype == np.float16 and np.array_equal(given, wanted)
    assert lazy.form == (f"q{bits}" if symmetric and not act_order else None)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [np.dtype("float16"), BFLOAT16])
def test_mlx(rng, bits, dtype):
    outputs, inputs, size = 8, 64, 32
    codes = rng.integers(0, 2**bits, (outputs, inputs))
    scales, biases = scales_of(rng, (outputs, 2), dtype), (rng.standard_normal((outputs, 2)) * 0.1).astype(dtype)
    tensors = {
        f"{MODULE}.weight": words(codes, bits, 1).view("uint32"),
        f"{MODULE}.scales": scales,
        f"{MODULE}.biases": biases,
    }
    plain = {"group_size": 64, "bits": 2}  # the module has settings of its own
    given, lazy = read({**plain, MODULE: {"group_size": size, "bits": bits}}, tensors)
    wanted = each(
        outputs,
        inputs,
        lambda o, i: (
            np.float32(codes[o, i]) * np.float32(scales[o, i // size]) + np.float32(biases[o, i // size])
        ).astype(dtype),
    )
    assert given.dtype == dtype and np.array_equal(given, wanted) and lazy.form is None
    middle = {**tensors, f"{MODULE}.biases": (-(2 ** (bits - 1)) * scales.astype("float32")).astype(dtype)}
    given, lazy = read({"group_size": size, "bits": bits}, middle)
    assert lazy.form == f"q{bits}"
    assert np.array_equal(
        given, ((codes - 2 ** (bits - 1)) * scales.astype("float32")[:, np.arange(inputs) // size]).astype(dtype)
    )


def compressed(form, **weights):
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"} | weights
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        "ignore": ["lm_head"],
    }


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [32, None])
def test_compressed_tensors_packed(rng, bits, symmetric, group):
    outputs, inputs, middle = 12, 96, 2 ** (bits - 1)
    size = group or inputs
    values = rng.integers(-middle, middle, (outputs, inputs))
    scales = scales_of(rng, (outputs, inputs // size), BFLOAT16)
    zeros = np.zeros_like(scales, "int64") if symmetric else rng.integers(-middle, middle, scales.shape)
    tensors = {
        f"{MODULE}.weight_packed": words(values + middle, bits, 1),
        f"{MODULE}.weight_scale": scales,
        f"{MODULE}.weight_shape": np.array([outputs, inputs], "int64"),
    }
    if not symmetric:
        tensors[f"{MODULE}.weight_zero_point"] = words(zeros + middle, bits, 0)
    settings = compressed("pack-quantized", num_bits=bits, strategy="group" if group else "channel", group_size=group)
    given, lazy = read(settings, tensors)
    wanted = each(
        outputs, inputs, lambda o, i: BFLOAT16.type(values[o, i] - zeros[o, i // size]) * scales[o, i // size]
    )
    assert given.dtype == BFLOAT16 and np.array_equal(given, wanted)
    assert lazy.form == (f"q{bits}" if symmetric else None)


@pytest.mark.parametrize("by", ["tensor", "channel"])
def test_compressed_tensors_of_eight_bits(rng, by):
    shape = (6, 40)
    scales = scales_of(rng, (1,) if by == "tensor" else (6, 1), BFLOAT16)
    whole = rng.integers(-128, 128, shape, "int8")
    small_floats = rng.standard_normal(shape).astype(ml_dtypes.float8_e4m3fn)
    for form, weight, kind in (("int-quantized", whole, "int"), ("float-quantized", small_floats, "float")):
        tensors = {f"{MODULE}.weight": weight, f"{MODULE}.weight_scale": scales, f"{MODULE}.input_scale": scales[:1]}
        given, _ = read(compressed(form, type=kind, strategy=by), tensors)
        assert np.array_equal(given, weight.astype(BFLOAT16) * np.broadcast_to(scales.reshape(-1, 1), (6, 40)))


@pytest.mark.parametrize("shape", [(256, 128), (130, 300)])
def test_fp8_by_blocks(rng, shape):
    weight = rng.standard_normal(shape).astype(ml_dtypes.float8_e4m3fn)
    scale = rng.uniform(0.01, 0.02, (-(-shape[0] // 128), -(-shape[1] // 128))).astype("float32")
    tensors = {f"{MODULE}.weight": weight, f"{MODULE}.weight_scale_inv": scale}
    settings = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    given, _ = read(settings, tensors)
    wanted = each(shape[0], shape[1], lambda o, i: np.float32(weight[o, i]) * scale[o // 128, i // 128]).astype(
        BFLOAT16
    )
    assert given.dtype == BFLOAT16 and np.array_equal(given, wanted)
    half, _ = read(settings, tensors, torch_dtype="float16")
    assert half.dtype == np.float16


@pytest.mark.parametrize("shape", [(), (1,), (6,), (6, 1)])
def test_fp8_by_tensor_or_row(rng, shape):
    weight = rng.standard_normal((6, 40)).astype(ml_dtypes.float8_e4m3fn)
    scale = np.asarray(rng.uniform(0.01, 0.02, shape), "float32")
    given, _ = read({"quant_method": "fp8"}, {f"{MODULE}.weight": weight, f"{MODULE}.weight_scale": scale})
    assert np.array_equal(given, (weight.astype("float32") * scale.reshape(-1, 1)).astype(BFLOAT16))


@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_of_four_bits(rng, nested):
    shape, table = (24, 40), np.sort(rng.uniform(-1, 1, 16)).astype("float32")
    codes, blocks = rng.integers(0, 16, 24 * 40), 24 * 40 // 64
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [*shape]}
    tensors = {f"{MODULE}.weight": ((codes[::2] << 4) | codes[1::2]).astype("uint8")[:, None]}
    largest = rng.uniform(0.1, 1, blocks).astype("float32")
    tensors[f"{MODULE}.weight.absmax"] = largest
    tensors[f"{MODULE}.weight.quant_map"] = table
    if nested:
        inner, outer = rng.uniform(-1, 1, 256).astype("float32"), rng.uniform(1, 2, 1).astype("float32")
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.25}
        numbers = rng.integers(0, 256, blocks, "uint8")
        largest = np.array([inner[number] * outer[0] + np.float32(0.25) for number in numbers], "float32")
        tensors[f"{MODULE}.weight.absmax"] = numbers
        tensors |= {f"{MODULE}.weight.nested_absmax": outer, f"{MODULE}.weight.nested_quant_map": inner}
    tensors[f"{MODULE}.weight.quant_state.bitsandbytes__nf4"] = np.frombuffer(json.dumps(state).encode(), "uint8")
    given, _ = read({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, tensors)
    wanted = np.array([table[code] * largest[i // 64] for i, code in enumerate(codes)]).astype(BFLOAT16).reshape(shape)
    assert np.array_equal(given, wanted)


def test_bitsandbytes_of_eight_bits(rng):
    weight, largest = rng.integers(-127, 128, (6, 40), "int8"), rng.uniform(0.1, 1, 6).astype("float32")
    tensors = {f"{MODULE}.weight": weight, f"{MODULE}.SCB": largest, f"{MODULE}.weight_format": np.array(0, "uint8")}
    given, _ = read({"quant_method": "bitsandbytes", "load_in_8bit": True}, tensors)
    assert np.abs(given.astype("float64") - weight * largest[:, None].astype("float64") / 127).max() < 1e-3


def quantised(rng, model, path, group=32):
    """A directory whose matrices are GPTQ's, symmetric, and what they stand for, float16."""
    model.save(path)
    tensors, plain = {}, {}
    for name, array in read_file(path / "model.safetensors").items():
        if not name.endswith("proj.weight"):
            tensors[name] = array.astype("float16")
            plain[name] = tensors[name]
            continue
        codes = rng.integers(0, 16, array.shape[::-1])
        scales = rng.uniform(0.01, 0.05, (array.shape[1] // 16, array.shape[0])).astype("float16")
        index = np.arange(array.shape[1]) // 16
        stem = name.removesuffix("weight")
        tensors |= {
            f"{stem}qweight": words(codes, 4, 0),
            f"{stem}qzeros": words(np.full(scales.shape, 7), 4, 1),
            f"{stem}scales": scales,
        }
        plain[name] = np.ascontiguousarray(((codes - 8).astype("float16") * scales[index]).T)
    (path / "model.safetensors").unlink()
    write_file(path / "model.safetensors", tensors)
    values = config_values(model) | {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 16}}
    (path / "config.json").write_text(json.dumps(values))
    return plain


def test_a_model_that_was_quantised(rng, tmp_path):
    model = small.model(rng)
    plain = quantised(rng, model, tmp_path / "q")
    loaded = llm.load(tmp_path / "q", dtype="float32")
    for name, weight in loaded.parameters():
        full = name if name.startswith("lm_head") else f"model.{name}"
        assert np.array_equal(weight.numpy(), plain[full].astype("float32")), name
    assert isinstance(loaded.generate("Hi", max_tokens=4), str)


def test_a_symmetric_one_stays_packed(rng, tmp_path):
    model = small.model(rng, hidden_size=64, intermediate_size=96)
    model.save(tmp_path / "q")
    tensors, codes_of, scales_of_ = {}, {}, {}
    for name, array in read_file(tmp_path / "q" / "model.safetensors").items():
        if not name.endswith("proj.weight"):
            tensors[name] = array
            continue
        codes = rng.integers(0, 16, array.shape[::-1])
        scales = rng.uniform(0.01, 0.05, (array.shape[1] // 32, array.shape[0])).astype("float16")
        stem = name.removesuffix("weight")
        tensors |= {
            f"{stem}qweight": words(codes, 4, 0),
            f"{stem}qzeros": words(np.full(scales.shape, 7), 4, 1),
            f"{stem}scales": scales,
        }
        codes_of[name.removeprefix("model.")], scales_of_[name.removeprefix("model.")] = codes, scales
    (tmp_path / "q" / "model.safetensors").unlink()
    write_file(tmp_path / "q" / "model.safetensors", tensors)
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}
    (tmp_path / "q" / "config.json").write_text(json.dumps(config_values(model) | {"quantization_config": settings}))
    loaded = llm.load(tmp_path / "q")
    assert {w.dtype for n, w in loaded.parameters() if n.endswith("proj.weight")} == {"q4"}
    for name, weight in loaded.parameters():
        if name in codes_of:
            scales = np.repeat(scales_of_[name].astype("float32"), 32, 0)
            assert np.array_equal(weight.numpy(), ((codes_of[name] - 8) * scales).T.astype("float32"))
    assert isinstance(loaded.generate("Hi", max_tokens=4), str)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"quant_method": "hqq"}, r"quant_method 'hqq' is not supported; supported are awq, gptq, mlx, compressed"),
        ({"quant_method": None}, "quant_method None is not supported"),
        ({"quant_method": ["awq"]}, "is not supported"),
        ("awq", "quantization_config is 'awq', expected an object"),
        ({"quant_method": "awq", "bits": 3}, "awq: bits is 3, only 4 is supported"),
        ({"quant_method": "awq", "version": "gemv"}, "awq: version is 'gemv', only 'gemm', 'GEMM' are supported"),
        ({"quant_method": "gptq", "bits": 3}, "gptq: bits is 3, only 4, 8, 2 are supported"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
        ({"bits": 4, "group_size": 32, "mode": "mxfp4"}, "mlx: mode is 'mxfp4'"),
        ({"quant_method": "compressed-tensors"}, "config_groups is missing"),
        (compressed("marlin-24"), "format 'marlin-24' is not supported; supported are pack-quantized"),
        (compressed("int-quantized") | {"kv_cache_scheme": {}}, "kv_cache_scheme is {}, only None is supported"),
        (compressed("int-quantized") | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse weights"),
        (compressed("int-quantized", num_bits=4), "num_bits is 4, only 8 is supported"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fp8: fmt is 'e5m2'"),
        ({"quant_method": "fp8", "weight_block_size": "x"}, "weight_block_size is 'x', expected two sizes"),
    ],
)
def test_what_is_refused_by_name(settings, reason):
    with pytest.raises(ConfigError, match=reason):
        unquantized({"quantization_config": settings}, {})


def test_tensors_that_do_not_fit(rng):
    good = {
        f"{MODULE}.qweight": np.zeros((8, 16), "int32"),
        f"{MODULE}.qzeros": np.zeros((2, 2), "int32"),
        f"{MODULE}.scales": np.ones((2, 16), "float16"),
    }
    settings = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32}}
    assert np.asarray(unquantized(settings, good)[1][f"{MODULE}.weight"]).shape == (16, 64)
    with pytest.raises(CheckpointError, match=r"is there without model.layers.0.mlp.up_proj.scales"):
        unquantized(settings, {k: v for k, v in good.items() if not k.endswith("scales")})
    for part, wrong in (
        ("scales", np.ones((3, 16), "float16")),
        ("qzeros", np.zeros((2, 3), "int32")),
        ("qweight", np.zeros(8, "int32")),
        ("g_idx", np.full(64, 2, "int32")),
        ("g_idx", np.full(63, 1, "int32")),
    ):
        with pytest.raises(CheckpointError, match=r"gptq: the tensors of model.layers.0.mlp.up_proj .* do not fit"):
            unquantized(settings, {**good, f"{MODULE}.{part}": wrong})
    assert unquantized({"a": 1}, good) == ({"a": 1}, good)
