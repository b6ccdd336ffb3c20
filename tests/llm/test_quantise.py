"""Quantised checkpoints: read back to the bit, as another tool's layout; what each layer loses; nothing left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llm
import ops
from llm import quantise as module
from llm.calibration import report
from llm.errors import ConfigError, UserError
from llm.quantise import quantise
from llm.weights import read_file
from ops import quantize

from . import small
from .test_families import drawn, named, raw

TEXT = "Some text, to measure on: 1, 2, 3."


def packed_bytes(model: Any) -> dict[str, bytes]:
    """What the weights are, to the bit."""
    return {
        name: np.from_dlpack(weight.buffer.data).tobytes()
        if weight.dtype in quantize.KNOWN
        else weight.numpy().tobytes()
        for name, weight in model.parameters()
    }


@pytest.mark.parametrize("to", ["q4", "q8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_what_loading_packs(rng, tmp_path, to, dtype):
    model = small.model(rng, dtype)
    source = model.save(tmp_path / "source")
    found = quantise(model, to, tmp_path / "out", ["embed_tokens=" + to], TEXT, progress=False)
    given, wanted = llm.load(tmp_path / "out"), llm.load(source, weights=to, dtype=dtype)
    assert given.dtype == dtype and given.cache_dtype == wanted.cache_dtype == "float16"
    assert packed_bytes(given) == packed_bytes(wanted)
    assert given.generate("a", max_tokens=12) == wanted.generate("a", max_tokens=12)
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == found
    assert len(found["layers"]) == 3 * 7 + 2


def test_choices_by_selector(rng, tmp_path):
    keep = ["layers.0=q8", "layers.0.mlp.up_proj", "layers.1-2.*.o_proj=float16", "lm_head=q8"]
    quantise(small.model(rng), "q4", tmp_path / "out", keep, TEXT, progress=False)
    held = {name: weight.dtype for name, weight in llm.load(tmp_path / "out").parameters()}
    assert held["layers.0.self_attn.q_proj.weight"] == held["lm_head.weight"] == "q8"
    assert held["layers.0.mlp.up_proj.weight"] == held["embed_tokens.weight"] == "float32"
    assert held["layers.2.mlp.up_proj.weight"] == "q4"
    stored = read_file(tmp_path / "out" / "model.safetensors")
    assert stored["model.layers.1.self_attn.o_proj.weight"].dtype == np.float16
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert "model.layers.0.mlp.up_proj" in said["ignore"] and len(said["config_groups"]) == 2


def test_a_float_type_is_that_of_all(rng, tmp_path):
    model = small.model(rng)
    source = model.save(tmp_path / "source")
    found = quantise(model, "bfloat16", tmp_path / "out", text=TEXT, progress=False)
    given, wanted = llm.load(tmp_path / "out"), llm.load(source, dtype="bfloat16")
    assert packed_bytes(given) == packed_bytes(wanted) and given.dtype == "bfloat16"
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert said["dtype"] == "bfloat16" and "quantization_config" not in said
    assert 0 < found["layers"][0]["error"] < 0.01


def test_errors_are_those_of_the_outputs(rng, tmp_path):
    """Against the definition: y of the float and of the packed weight, on the inputs of the unchanged model."""
    model = small.model(rng)
    found = quantise(model, "q4", tmp_path / "out", ["lm_head"], TEXT, progress=False)
    inputs: dict[str, np.ndarray] = {}
    for path, each in model.modules():
        if isinstance(each, llm.Linear):
            each.register_forward_pre_hook(lambda _, args, path=path: inputs.update({path: args[0].numpy().copy()}))
    model(model.tokenizer.encode(TEXT))
    weights = dict(model.parameters())
    rows = {row["layer"]: row for row in found["layers"]}
    assert rows.keys() == {path for path in inputs if path != "lm_head"}
    for path, row in rows.items():
        weight = weights[f"{path}.weight"].numpy()
        values = quantize.unpack(quantize.pack(weight, "q4"), weight.shape, "q4")
        wanted = inputs[path].astype("float64") @ weight.T.astype("float64")
        off = quantize.round_activations(inputs[path], quantize.KNOWN["q4"]) @ np.asarray(values, "float64").T - wanted
        assert row["error"] == pytest.approx(np.sqrt((off**2).sum() / (wanted**2).sum()), rel=1e-3)
        assert row["worst"] == pytest.approx(np.abs(off).max() / np.abs(wanted).max(), rel=1e-3)
    errors = [row["error"] for row in found["layers"]]
    assert errors == sorted(errors, reverse=True) and errors[-1] > 0.001


def test_the_loss_is_that_of_the_text(rng, tmp_path):
    model = small.model(rng)
    found = quantise(model, "q8", tmp_path / "out", text=TEXT, progress=False)

    def loss(of):
        ids = of.tokenizer.encode(TEXT)
        logits = of(ids).numpy().astype("float64")
        logp = (
            logits
            - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
            - logits.max(-1, keepdims=True)
        )
        return -np.mean([logp[i, token] for i, token in enumerate(ids[1:])])

    assert found["loss"]["before"] == pytest.approx(loss(model), rel=1e-5)
    assert found["loss"]["after"] == pytest.approx(loss(llm.load(tmp_path / "out")), rel=1e-5)


def test_a_packed_model_stays_as_it_is(rng, tmp_path):
    small.model(rng).save(tmp_path / "source")
    model = llm.load(tmp_path / "source", weights="q4")
    found = quantise(model, "q4", tmp_path / "out", text=TEXT, progress=False)
    assert found["layers"] == [] and packed_bytes(llm.load(tmp_path / "out")) == packed_bytes(model)


def test_experts_are_packed_one_by_one(rng, tmp_path):
    model = drawn(rng, raw(named("mixtral"), vocab_size=258))
    model.tokenizer = small.tokenizer()
    source = model.save(tmp_path / "source")
    quantise(model, "q4", tmp_path / "out", text="abc", progress=False)
    given, wanted = llm.load(tmp_path / "out"), llm.load(source, weights="q4")
    given, wanted = packed_bytes(given), packed_bytes(wanted)
    assert [name for name in given if given[name] != wanted[name]] == ["embed_tokens.weight"]


def test_turned_matrices_are_refused(rng, tmp_path):
    model = drawn(rng, raw(named("gpt2, tied"), vocab_size=258))
    model.tokenizer = small.tokenizer()
    with pytest.raises(UserError, match=r"gpt2 holds h\.0\.attn\.c_attn\.weight.*turned.*--keep"):
        quantise(model, "q4", tmp_path / "out", text="ab", progress=False)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("to", "keep", "message"),
    [
        ("q3", [], "'q3' is no format"),
        ("q4k", [], "'q4k' is no format"),
        ("q4", ["layers.9=q8"], r"means no matrix of this model; there are layers\."),
        ("q4", ["lm_head=q5"], "expected a path and one of q4, q8"),
        ("q4", ["=q8"], "is not understood"),
        ("q4", ["layers.3-1"], "the range 3-1 is empty"),
    ],
)
def test_what_is_not_understood_is_said(rng, tmp_path, to, keep, message):
    with pytest.raises(UserError, match=message):
        quantise(small.model(rng), to, tmp_path / "out", keep, TEXT, progress=False)
    assert [*tmp_path.iterdir()] == []


def test_texts_that_measure_nothing(rng, tmp_path):
    model = small.model(rng)
    with pytest.raises(UserError, match="1 tokens, expected two"):
        quantise(model, "q4", tmp_path / "out", text="", progress=False)
    model.tokenizer = None
    with pytest.raises(UserError, match="no tokenizer"):
        quantise(model, "q4", tmp_path / "out", text=TEXT, progress=False)


def test_weights_that_do_not_fit_are_named(rng, tmp_path):
    model = small.model(rng)
    model.layers[1].mlp.up_proj.weight = ops.tensor(np.full((48, 32), 1e7, "float32"))
    with pytest.raises(
        UserError, match=r"layers\.1\.mlp\.up_proj\.weight.*does not fit.*--keep layers\.1\.mlp\.up_proj"
    ):
        quantise(model, "q4", tmp_path / "out", text=TEXT, progress=False)


def test_a_nan_is_no_error_of_zero(rng):
    model = small.model(rng)
    model.layers[1].mlp.up_proj.weight = ops.tensor(np.full((48, 32), 1e30, "float32"))
    made = module.quantised(model, {"layers.2.mlp.up_proj": "q4"}, progress=False)
    assert report(model, made, TEXT, progress=False)["layers"][0]["error"] is None


@pytest.mark.parametrize("what", ["folder", "empty", "file", "link"])
def test_what_is_there_stays(rng, tmp_path, what):
    out = tmp_path / "out"
    if what == "file":
        out.write_text("mine")
    elif what == "link":
        out.symlink_to(tmp_path / "nowhere")
    else:
        out.mkdir()
    with pytest.raises(UserError, match="exists"):
        quantise(small.model(rng), "q4", out, text=TEXT, progress=False)
    assert [*tmp_path.iterdir()] == [out]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("no space")])
def test_interrupted_writing_leaves_nothing(rng, tmp_path, monkeypatch, error):
    model = small.model(rng)

    def broken(*_: Any) -> None:
        raise error

    monkeypatch.setattr("llm.calibration.save", broken)
    with pytest.raises((KeyboardInterrupt, OSError)):
        quantise(model, "q4", tmp_path / "deep" / "out", text=TEXT, progress=False)
    assert [*(tmp_path / "deep").iterdir()] == []


def test_hostile_settings(rng, tmp_path):
    quantise(small.model(rng), "q4", tmp_path / "out", ["layers.0=q8"], TEXT, progress=False)
    file = tmp_path / "out" / "config.json"
    good = json.loads(file.read_text())

    def refused(change: Any, error: type[Exception], match: str) -> None:
        raw = json.loads(json.dumps(good))
        change(raw["quantization_config"]["config_groups"])
        file.write_text(json.dumps(raw))
        with pytest.raises(error, match=match):
            llm.load(tmp_path / "out")

    refused(lambda groups: groups["group_1"].update(targets=["Linear"]), UserError, "which group .* belongs to")
    refused(lambda groups: groups["group_1"].update(targets=3), ConfigError, "no list of targets")
    refused(
        lambda groups: groups["group_1"].update(targets=[["Linear"], {}]), UserError, "do not fit|wrong shape|shape"
    )
    refused(lambda groups: groups["group_1"].pop("weights"), ConfigError, "does not say how")
    refused(lambda groups: groups["group_1"]["weights"].update(num_bits=4), UserError, "shape")


def test_command(limpid, rng, tmp_path):
    source = str(small.model(rng).save(tmp_path / "source"))
    (tmp_path / "text.txt").write_text(TEXT)
    out = str(tmp_path / "out")
    options = ("-o", out, "--keep", "layers.0.*=q8", "--text", str(tmp_path / "text.txt"), "--rows", "3")
    code, said, errors = limpid("quantize", source, "--to", "q4", *options)
    assert (code, errors) == (0, "") and "and 19 layers with smaller errors" in said and "35 tokens" in said
    assert f"wrote {out}" in said.replace("\n", "")
    wanted = llm.load(out).generate("a", max_tokens=4)
    assert limpid("generate", "a", "-m", out, "-n", "4")[:2] == (0, f"a{wanted}\n")
    code, said, errors = limpid("quantize", source, "-o", out)
    assert (code, said) == (2, "") and "exists" in errors and errors.count("\n") == 1
    code, _, errors = limpid("quantize", source, "-o", out + "2", "--text", str(tmp_path / "none"))
    assert code == 2 and "cannot be read" in errors and not Path(out + "2").exists()


def test_transformers_reads_it(rng, tmp_path):
    """The very weights, unpacked by compressed-tensors' own code."""
    pytest.importorskip("compressed_tensors", reason="not installed: pip install -e '.[parity]'")
    import torch
    from compressed_tensors.compressors.pack_quantized.helpers import (  # pyright: ignore[reportMissingImports]
        unpack_from_int32,
    )

    model = small.model(rng)
    quantise(model, "q4", tmp_path / "out", ["layers.0=q8"], TEXT, progress=False)
    given = llm.load(tmp_path / "out")
    stored = {name: torch.from_numpy(each) for name, each in read_file(tmp_path / "out" / "model.safetensors").items()}
    for bits, name in ((8, "layers.0.mlp.down_proj"), (4, "layers.1.mlp.down_proj")):
        words, scales, shape = (stored[f"model.{name}.weight_{each}"] for each in ("packed", "scale", "shape"))
        codes = unpack_from_int32(words, bits, torch.Size(shape.tolist())).numpy().astype("float32")
        wide = np.repeat(scales.numpy().astype("float32"), 32, 1)[:, : codes.shape[1]]
        assert np.array_equal(codes * wide, dict(given.parameters())[f"{name}.weight"].numpy())
