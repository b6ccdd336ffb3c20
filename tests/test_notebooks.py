"""The notebooks run from top to bottom in fresh kernels, without a warning, and what they show is what they say of it.

`python -m tests.test_notebooks` runs them and stores their outputs. What is stored must say the same.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
_TIMEOUT = 300  # seconds for a cell: the first run compiles
_LARGE = 400_000  # bytes of a notebook with its outputs
_STRICT = "import warnings\n\nwarnings.simplefilter('error')", "warnings.resetwarnings()"  # before and after


def read(path: Path) -> Any:
    return nbformat.read(path, 4)


def executed(notebook: Any, folder: Path) -> Any:
    """The notebook as a fresh kernel runs it, from the root of the repository."""
    environment = os.environ | {"IPYTHONDIR": str(folder), "JUPYTER_RUNTIME_DIR": str(folder)}
    client = NotebookClient(
        notebook, timeout=_TIMEOUT, kernel_name="python3", record_timing=False, coalesce_streams=True,
        extra_arguments=["--log-level=ERROR"], resources={"metadata": {"path": ROOT}},
    )  # fmt: skip
    return client.execute(env=environment)


def outputs(cell: Any) -> str:
    """What a cell shows, as text."""
    shown = cell.get("outputs", [])
    return "".join(each.get("text") or each.get("data", {}).get("text/plain", "") + "\n" for each in shown)


def by_source(notebook: Any) -> Callable[[str], str]:
    """What the first code cell that contains a text shows."""
    return lambda text: outputs(
        next(each for each in notebook.cells if each.cell_type == "code" and text in each.source)
    )


def inspect_says(shown: Callable[[str], str], notebook: Any) -> None:
    """Notebook 1: the answer is at the name early on, and at the last position in the end."""
    assert "layers.0-3: 4 x Block" in shown('llm.load("tiny")')
    assert shown("np.argsort").splitlines()[0].startswith("' Tom'")
    assert re.search(
        r"layers\.0\.self_attn/attention\[0\].*llm/models/llama\.py:\d+", shown('debug.trace("layers.0.*")')
    )
    looks = [[float(p) for p in re.findall(r"head \d (\d\.\d\d)", line)] for line in shown("steps()").splitlines()]
    assert [len(heads) for heads in looks] == [4] * 4 and max(max(heads) for heads in looks) > 0.5
    guesses = re.findall(r"^'(.*?)'", shown("register_forward_hook"), re.MULTILINE)
    assert len(guesses) == 4 and guesses[-1] == " Tom" and guesses[0] != " Tom"
    whole, *without = (float(line.split()[-1]) for line in shown("debug.ablate()").splitlines())
    assert len(without) == 8 and min(without) < whole / 2
    apart = [line.partition(" at ")[2].split(", ") for line in shown("run_with_cache").splitlines()]
    assert len(apart) == 4 and all(names[0] == "Tom" and len(names) == 7 for names in apart)
    found = re.findall(r"after layer (\d): position +(\d+) (.*?) +restores (\d+)%", shown('effects["residual"]'))
    assert [(int(layer), int(position)) for layer, position, *_ in found] == [(0, 7), (1, 7), (2, 13), (3, 13)]
    assert found[0][2] == "Tom → Ben" and int(found[0][3]) > 80
    assert found[3][2] == "to" and found[3][3] == "100"
    assert "to the last position in layer 2 most" in shown('effects["residual"]')
    picture = next(each for each in notebook.cells if "activation_patching(" in each.source).outputs[0].data
    assert picture["text/html"].count("<rect") == 3 * 4 * 14


def break_says(shown: Callable[[str], str], notebook: Any) -> None:
    """Notebook 2: each planted bug is named, and gone in the end."""
    assert shown('dtype="float32"').strip() == "Tom"
    planted = shown("attention_before, where=")
    assert [line.split()[-1] for line in planted.splitlines()] == ["Mia", "Ivy", "Max"], "the giver, not the receiver"
    checked = shown("print(c.summary)")
    culprit = r"culprit: layers\.0\.self_attn/attention\[0\]@\d+ +llm/models/llama\.py:(\d+) +kernel attention_before"
    line = re.match(culprit, checked)
    assert line
    own = [float(error) for error in re.findall(r"introduced (\S+)", checked.partition("\n\n")[2])]
    assert sum(error > 1e-3 for error in own) == 1, "one call introduces an error, the others inherit it"
    stopped = re.sub(r"\x1b\[[\d;]*m", "", shown("debug.stop("))
    assert re.search(rf"> \S*llm/models/llama\.py\({line[1]}\)forward\(\)", stopped), "the model's own line"
    assert re.search(rf"-+> {line[1]} .*ops\.attention\(", stopped)
    assert stopped.strip().endswith("Tom"), "edited at the prompt, the run gives the right answer"
    assert " ".join(shown("use.remove()").split()) == "71 calls checked, none wrong Tom"
    assert shown("np.isnan(logits)").startswith("71%"), "of the fifth token and those after it"
    source = next(each.source for each in notebook.cells if "gate_proj.weight.numpy()[" in each.source)
    [row] = re.findall(r"numpy\(\)\[(\d+)\] \*=", source)
    born = shown("as hunt:")
    assert re.match(r"an infinity born in layers\.2\.mlp/silu_mul\[0\]@\d+", born) and f", {row}] = inf" in born
    assert "parts from the reference, Llama float16, at layers.2.mlp.gate_proj/linear[0] " in shown("debug.compare(")
    named = re.sub(r"\s+", " ", shown("debug.doctor("))
    assert "weight layers.2.mlp.gate_proj.weight is wrong" in named and f"all in row {row}" in named
    assert " ".join(shown("print(hunt)").split()) == "no NaN and no infinity was born in 71 calls Tom"


def swap_says(shown: Callable[[str], str], notebook: Any) -> None:
    """Notebook 3: kernels in the model leave the text as it was; what is wrong is refused, and said where."""
    assert shown("def my_norm").startswith("True")
    assert re.search(r"my_norm +rms_norm +c +'layers\.0-3\.\*' +in use +192 ", shown("def my_norm"))
    assert re.search(r"forgetful is wrong on an edge case: .*allowed 1e-05\n +x\[\d+\]: ", shown("def forgetful"))
    beyond, endless, null = re.findall(r"careless on an edge case, .*\): (.*)", shown("def careless"))
    assert re.match(r"the kernel wrote out\[\d+\], past its end \(\d+ elements?\), at Cell In\[\d+\]:\d+", beyond)
    assert "did not end within 2 s" in endless and "null pointer (SIGSEGV)" in null
    line = r"Cell In\[\d+\]:\d+"
    race = rf"race on shared memory part\[32\] .*: read {line}, write {line}; a __syncthreads\(\) is missing"
    assert re.search(race, shown('TREE.replace("BARRIER", "")'))
    both = shown("TREE = right")
    assert both.startswith("True") and re.search(r"tree_norm .*cuda emulated(?s:.*)\nmy_norm ", both)
    raced = re.findall(r"^(\w+) .* right$", shown("debug.race("), re.MULTILINE)
    assert {"own", "my_norm", "tree_norm", "reference"} <= {*raced}
    cell = next(each for each in notebook.cells if each.source.startswith("%%kernel")).outputs[0].data
    assert "silu_mul_cell" in cell["text/plain"] and "<svg" in cell["text/html"]
    assert "void rms_norm_c(const float* x, const float* weight, float* out) {" in shown("eject(")
    assert shown("restore()").startswith("True")


def new_model_says(shown: Callable[[str], str], notebook: Any) -> None:
    """Notebook 4: the planted mistake is named, by its call and its line; without it logits and text are the same."""
    listed = shown("hf.save_pretrained")
    assert '"model_type": "cohere"' in listed and re.search(r"layers\.0\.input_layernorm\.weight +\[64\]", listed)
    assert "lm_head" not in listed, "tied"
    assert "layers.0-2: 3 x Block" in shown("llm.register(")
    assert float(shown("def error")) > 0.1
    compared = next(each for each in notebook.cells if each.source.startswith("debug.compare(")).outputs[0].data
    parts = r"Cohere float32 parts from .* CohereForCausalLM of transformers, at layers\.0\.self_attn/rope\[0\] "
    place = re.search(rf"{parts}\(Cell In\[(\d+)\]:(\d+)\)", compared["text/plain"])
    assert place
    code = [each.source for each in notebook.cells if each.cell_type == "code"]
    assert "rotate(self.q_proj(x)" in code[int(place[1]) - 1].splitlines()[int(place[2]) - 1]
    heat = re.findall(r"<title>layers\.\d, position (\d+): (\S+)</title>", compared["text/html"])
    assert len(heat) == 3 * 37 and all((float(error) < 1e-5) == (position == "0") for position, error in heat)
    mended = shown("rotary.interleaved = True")
    assert "agree: no call introduces an error above 1e-05" in mended and float(mended.split()[-1]) <= 2e-4
    text, same = shown("hf.generate(").splitlines()
    assert len(re.findall(r"\d+", text)) == 20 and same == "True"


SAYS = {
    "1-inspect.ipynb": inspect_says,
    "2-break.ipynb": break_says,
    "3-swap.ipynb": swap_says,
    "4-new-model.ipynb": new_model_says,
}
NEEDS = {"4-new-model.ipynb": ("torch", "transformers")}


def test_all_notebooks_are_checked():
    assert {path.name for path in NOTEBOOKS} == {*SAYS}


@pytest.mark.parametrize("name", SAYS)
def test_what_is_stored_says_it(name):
    path = ROOT / "notebooks" / name
    notebook = read(path)
    code = [each for each in notebook.cells if each.cell_type == "code"]
    assert [each.execution_count for each in code] == [*range(1, len(code) + 1)], "run from top to bottom"
    assert all(sum("text/html" in shown.get("data", {}) for shown in each.outputs) <= 1 for each in code), "once"
    assert path.stat().st_size < _LARGE
    assert str(ROOT) not in path.read_text("utf-8"), (
        "run `python -m tests.test_notebooks`, which leaves out this folder"
    )
    SAYS[name](by_source(notebook), notebook)


@pytest.mark.parametrize("name", SAYS)
def test_it_runs_and_says_it(name, tmp_path):
    for needed in NEEDS.get(name, ()):
        pytest.importorskip(needed, reason="the parity extra is not installed: pip install -e '.[parity]'")
    notebook = read(ROOT / "notebooks" / name)
    for cell in notebook.cells:
        cell.update({"outputs": []} if cell.cell_type == "code" else {})
    before, after = ({"cell_type": "code", "metadata": {}, "source": source, "outputs": []} for source in _STRICT)
    notebook.cells = [type(notebook)(before), *notebook.cells, type(notebook)(after)]
    executed(notebook, tmp_path)
    said = [each.text for cell in notebook.cells for each in cell.get("outputs", []) if each.get("name") == "stderr"]
    assert not said
    SAYS[name](by_source(notebook), notebook)


if __name__ == "__main__":
    import tempfile

    for path in NOTEBOOKS:
        with tempfile.TemporaryDirectory() as folder:
            made = executed(read(path), Path(folder))
        made.metadata["language_info"] = {"name": "python"}
        path.write_text(nbformat.writes(made).replace(f"{ROOT}/", "") + "\n", "utf-8")
        print(path.relative_to(ROOT), f"{path.stat().st_size:,} bytes")
