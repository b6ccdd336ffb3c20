"""The doctor as a whole: clean models are clean, it says what it looked into, and the command."""

import subprocess
import sys

import numpy as np
import pytest

import ops
from debug.diagnosis import doctor

from .patients import patient
from .twins import twin


@pytest.mark.parametrize("options", [{"dtype": "float32"}, {"dtype": "bfloat16"}, {"packed": "q4"}, {"packed": "q8"}])
def test_clean_models(rng, options):
    model, pristine = patient(rng, **options)
    references = [pristine, "float64"] if "packed" in options else ["float64"]
    references += [twin(model)] if options.get("dtype") == "float32" else []
    for reference in references:
        found = doctor(model, reference, seconds=60 if reference == "float64" else 2)
        assert found.ok, str(found)


def test_what_was_looked_into(rng):
    model, pristine = patient(rng)
    found = doctor(model, pristine)
    assert [each.name for each in found.checks] == ["weights", "model", "cuts", "kernels", "reads"]
    told = {each.name: each.text for each in found.checks}
    assert "prompts of 1-48 tokens" in told["kernels"] and "caches of 0 to 47 tokens" in told["kernels"]
    assert "token by token" in told["cuts"] and str(found).endswith("is clean against the given weights.")


def test_the_time_is_kept(rng, monkeypatch):
    model, _ = patient(rng, max_position_embeddings=2000)
    found = doctor(model, seconds=0)
    assert found.ok and "no caches" not in str(found) and "none: no time was left" in str(found)


def test_wrong_references(rng):
    model, _ = patient(rng)
    with pytest.raises(ops.OpError, match="'hf', expected 'float64', a model or a mapping"):
        doctor(model, "hf")
    with pytest.raises(ops.OpError, match="no weight of the reference has a name of ours: it has a, b"):
        doctor(model, {"a": np.ones(2), "b": np.ones(2)})
    with pytest.raises(ops.OpError, match="ids are to be from 0 to 257"):
        doctor(model, ids=[1, 300])


def test_the_page(rng, tmp_path):
    model, pristine = patient(rng)
    model.layers[0].mlp.up_proj.weight.numpy()[5] *= -1
    text = doctor(model, pristine).save_html(tmp_path / "page.html").read_text("utf-8")
    assert "layers.0.mlp.up_proj.weight" in text and "opposite sign" in text and "http" not in text


def limpid(*arguments):
    return subprocess.run([sys.executable, "-m", "llm", "doctor", *arguments], capture_output=True, text=True)


def test_the_command(rng, tmp_path):
    model, _ = patient(rng)
    folder = model.save(tmp_path / "model")
    done = limpid(str(folder), "--seconds", "1")
    assert done.returncode == 0 and "is clean against float64" in done.stdout, done.stdout + done.stderr
    model.layers[1].mlp.up_proj.weight.numpy()[5] *= -1
    wrong = model.save(tmp_path / "wrong")
    page = tmp_path / "page.html"
    done = limpid(str(wrong), "--ref", str(folder / "model.safetensors"), "--html", str(page))
    assert done.returncode == 1 and page.exists()
    assert "The weight layers.1.mlp.up_proj.weight is wrong" in done.stdout and "llm/models/llama.py:" in done.stdout
    done = limpid(str(wrong), "--ref", "nowhere")
    assert done.returncode == 2 and "expected hf, float64, or a folder or file" in done.stderr


def test_the_command_without_transformers(rng, tmp_path, monkeypatch):
    from llm.cli import main

    model, _ = patient(rng)
    folder = model.save(tmp_path / "model")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", str(folder), "--ref", "hf"])
    assert stopped.value.code == 2
