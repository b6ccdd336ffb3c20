"""Models with packed weights: loaded, cached on disk, run, saved."""

import dataclasses
import json
import os
import time

import numpy as np
import pytest

import llm
import ops
from llm.errors import CheckpointError
from llm.weights import packed, read_file, write_file
from llm.weights.packed import pack_all
from ops import quantize, store
from ops.quantize import FORMATS
from tests.llm import small

SHAPES = {"first": (40, 64), "second": (7, 100)}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache" / "weights"
    monkeypatch.setattr(store, "weights", dataclasses.replace(store.weights, name=str(folder)))  # kernels stay shared
    return folder


@pytest.fixture
def packings(monkeypatch):
    """The shapes of what has been packed since."""
    done = []
    pack = quantize.pack
    monkeypatch.setattr(quantize, "pack", lambda *args: (done.append(args[0].shape), pack(*args))[1])
    return done


@pytest.fixture
def checkpoint(tmp_path, rng):
    arrays = {name: rng.standard_normal(shape).astype("float32") for name, shape in SHAPES.items()}
    write_file(tmp_path / "model.safetensors", arrays)
    return arrays, [tmp_path / "model.safetensors"]


def wanted(form="q4"):
    return {name: ops.Spec(shape, form) for name, shape in SHAPES.items()}


def test_packed_once_then_mapped(checkpoint, packings, cache):
    arrays, files = checkpoint
    first = pack_all(wanted(), arrays, files)
    assert len(packings) == 2
    again = pack_all(wanted(), arrays, files)
    assert len(packings) == 2, "the second time nothing is packed"
    for name, values in arrays.items():
        assert np.array_equal(first[name].numpy(), quantize.unpack(quantize.pack(values, "q4"), values.shape, "q4"))
        assert np.array_equal(first[name].numpy(), again[name].numpy())
    (entry,) = store.weights.entries()
    assert entry.what.startswith("q4 of ") and store.weights.clear() == 1 and not list(cache.iterdir())


def test_packing_shows_its_progress(checkpoint, monkeypatch):
    shown = []
    monkeypatch.setattr(packed, "tracked", lambda items, what, **more: (shown.append((what, more)), items)[1])
    arrays, files = checkpoint
    pack_all(wanted(), arrays, files, progress=True)
    monkeypatch.setattr(packed, "_SHOWN", 0)
    pack_all(wanted("q8"), arrays, files, progress=True)
    assert shown == [
        ("Packing weights", {"total": 2, "shown": False}),
        ("Packing weights", {"total": 2, "shown": True}),
    ]


def test_other_content_format_or_machine_is_packed_anew(checkpoint, packings):
    arrays, files = checkpoint
    pack_all(wanted(), arrays, files)
    pack_all(wanted("q8"), arrays, files)
    assert len(packings) == 4
    changed = {name: values * 2 for name, values in arrays.items()}
    write_file(files[0], changed)
    assert np.abs(pack_all(wanted(), changed, files)["first"].numpy()).max() > np.abs(arrays["first"]).max() * 1.5
    assert len(packings) == 6
    with ops.target.building_for("avx2" if ops.target.lanes() != 8 else "avx512"):
        pack_all(wanted(), changed, files)
    assert len(packings) == 8


def test_a_checkpoint_of_the_same_content_elsewhere_is_not_packed_again(checkpoint, packings, tmp_path):
    arrays, files = checkpoint
    pack_all(wanted(), arrays, files)
    twin = tmp_path / "twin.safetensors"
    twin.write_bytes(files[0].read_bytes())
    later = time.time() + 5
    os.utime(files[0], (later, later))  # touched, and not changed
    for each in ([twin], files):
        pack_all(wanted(), arrays, each)
    assert len(packings) == 2


def test_shards_have_the_names_that_the_index_gives(tmp_path, rng, packings):
    folder = small.model(rng).save(tmp_path / "plain")
    tensors = read_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [*tensors]
    places = {name: f"weights-{i % 2}.safetensors" for i, name in enumerate(names)}
    for place in set(places.values()):
        write_file(folder / place, {name: tensors[name] for name in names if places[name] == place})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    llm.load(folder, weights="q4")
    before = len(packings)
    llm.load(folder, weights="q4")
    assert before and len(packings) == before
    write_file(
        folder / "weights-1.safetensors", {n: tensors[n] * 2 for n in names if places[n] == "weights-1.safetensors"}
    )
    llm.load(folder, weights="q4")
    assert len(packings) == 2 * before, "other content"


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:-1], lambda b: b"\xff" * 16 + b[16:]])
def test_a_damaged_file_is_made_again(checkpoint, packings, cache, damage):
    arrays, files = checkpoint
    first = pack_all(wanted(), arrays, files)
    (path,) = cache.glob("*.safetensors")
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(damage(content))
    again = pack_all(wanted(), arrays, files)
    assert len(packings) == 4
    assert all(np.array_equal(first[name].numpy(), again[name].numpy()) for name in SHAPES)
    assert next(cache.glob("*.safetensors")).read_bytes() == content


@pytest.mark.parametrize("why", ["off", "full", "read-only"])
def test_without_a_cache_it_is_packed_in_memory(checkpoint, packings, monkeypatch, cache, why):
    def fails(*_):
        raise OSError(28, "No space left on device")

    if why == "off":
        monkeypatch.setenv("LIMPID_CACHE", "off")
    if why == "full":
        monkeypatch.setattr("llm.weights.packed.write_file", fails)
    if why == "read-only":
        cache.parent.mkdir()
        cache.write_text("a file where a folder should be")
    arrays, files = checkpoint
    for _ in range(2):
        assert pack_all(wanted(), arrays, files)["first"].shape == (40, 64)
    assert len(packings) == 4
    assert why != "full" or not list(cache.glob("*.safetensors"))


def test_a_value_that_does_not_fit_names_its_weight(checkpoint, cache):
    arrays, files = checkpoint
    arrays["second"][3, 4] = np.nan
    with pytest.raises(CheckpointError, match=r"second: a weight of magnitude nan does not fit the float16 scales"):
        pack_all(wanted(), arrays, files)
    assert not list(cache.glob("*.safetensors"))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("tied", [False, True])
def test_a_model(tmp_path, rng, form, tied):
    plain = small.model(rng, tie_word_embeddings=tied)
    folder = plain.save(tmp_path / "plain")
    model = llm.load(folder, weights=form)
    assert model.dtype == "float32" and model.new_cache().dtype == "float16"
    kinds = {name: weight.dtype for name, weight in model.parameters()}
    assert {kind for name, kind in kinds.items() if not name.endswith("norm.weight")} == {form}
    assert {kind for name, kind in kinds.items() if name.endswith("norm.weight")} == {"float32"}
    # With the reference in the kernel's place only activations that lie between two codes may round otherwise.
    ids = rng.integers(0, 256, 20).tolist()
    given = model(ids).numpy().copy()
    with ops.linear.use(ops.linear.reference):
        expected = model(ids).numpy()
    assert np.sqrt(np.mean((given - expected) ** 2) / np.mean(expected**2)) < 0.03
    # Saved, its values are floats, which pack to what they were.
    again = llm.load(model.save(tmp_path / "saved"), weights=form)
    for name, weight in model.parameters():
        assert np.array_equal(weight.numpy(), model_weight(again, name)), name
    text = model.generate("Hi", max_tokens=20)
    assert text == again.generate("Hi", max_tokens=20)


def model_weight(model, name):
    return np.asarray(dict(model.parameters())[name].numpy())


def test_float_weights_under_other_activations(tmp_path, rng):
    folder = small.model(rng).save(tmp_path / "plain")
    model = llm.load(folder, dtype="float32", weights="bfloat16")
    kinds = {weight.dtype for name, weight in model.parameters() if not name.endswith("norm.weight")}
    assert kinds == {"bfloat16"} and model.dtype == "float32"
    assert model([1, 2, 3]).dtype == "float32"


def test_unknown_weights_are_refused(tmp_path):
    with pytest.raises(llm.UserError, match="weights 'q3' are not supported; choose one of q4, q8, float32"):
        llm.load("tiny", weights="q3")
