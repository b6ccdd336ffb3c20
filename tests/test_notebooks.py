"""The notebooks run from top to bottom in fresh kernels, without a warning, and what they show is what they say of it.

`python -m tests.test_notebooks` runs them and stores their outputs. What is stored must say the same.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
_TIMEOUT = 300  # seconds for a cell: the first run compiles
_LARGE = 400_000  # bytes of a notebook with its outputs
_STRICT = "import warnings\n\nwarnings.simplefilter('error')"


def read(path: Path) -> Any:
    return pytest.importorskip("nbformat", reason=_reason("nbformat")).read(path, 4)


def executed(notebook: Any, folder: Path) -> Any:
    """The notebook as a fresh kernel runs it, from the root of the repository."""
    nbclient = pytest.importorskip("nbclient", reason=_reason("nbclient"))
    pytest.importorskip("ipykernel", reason=_reason("ipykernel"))
    environment = os.environ | {"IPYTHONDIR": str(folder), "JUPYTER_RUNTIME_DIR": str(folder)}
    client = nbclient.NotebookClient(
        notebook, timeout=_TIMEOUT, kernel_name="python3", record_timing=False, resources={"metadata": {"path": ROOT}}
    )
    return client.execute(env=environment)


def _reason(package: str) -> str:
    return f"{package} is not installed: pip install -e '.[notebook]'"


def outputs(cell: Any) -> str:
    """What a cell shows, as text."""
    shown = cell.get("outputs", [])
    return "\n".join(each.get("text") or each.get("data", {}).get("text/plain", "") for each in shown)


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


SAYS = {"1-inspect.ipynb": inspect_says}


def test_all_notebooks_are_checked():
    assert {path.name for path in NOTEBOOKS} == {*SAYS}


@pytest.mark.parametrize("name", SAYS)
def test_what_is_stored_says_it(name):
    path = ROOT / "notebooks" / name
    notebook = read(path)
    code = [each for each in notebook.cells if each.cell_type == "code"]
    assert [each.execution_count for each in code] == [*range(1, len(code) + 1)], "run from top to bottom"
    assert path.stat().st_size < _LARGE
    assert str(ROOT) not in path.read_text("utf-8"), (
        "run `python -m tests.test_notebooks`, which leaves out this folder"
    )
    SAYS[name](by_source(notebook), notebook)


@pytest.mark.parametrize("name", SAYS)
def test_it_runs_and_says_it(name, tmp_path):
    notebook = read(ROOT / "notebooks" / name)
    for cell in notebook.cells:
        cell.update({"outputs": []} if cell.cell_type == "code" else {})
    notebook.cells.insert(0, type(notebook.cells[0])(cell_type="code", metadata={}, source=_STRICT, outputs=[]))
    executed(notebook, tmp_path)
    said = [each.text for cell in notebook.cells for each in cell.get("outputs", []) if each.get("name") == "stderr"]
    assert not said
    SAYS[name](by_source(notebook), notebook)


if __name__ == "__main__":
    import tempfile

    import nbformat

    for path in NOTEBOOKS:
        with tempfile.TemporaryDirectory() as folder:
            made = executed(read(path), Path(folder))
        made.metadata["language_info"] = {"name": "python"}
        path.write_text(nbformat.writes(made).replace(f"{ROOT}/", "") + "\n", "utf-8")
        print(path.relative_to(ROOT), f"{path.stat().st_size:,} bytes")
