"""Races on a model's own inputs, and kernels reloaded at the prompt."""

import importlib.util
import re

import pytest

import debug
import ops

from .test_rewind import Case, same
from .typed import typed


@pytest.fixture(autouse=True)
def restored():
    yield
    ops.restore()


def test_a_race_for_each_kind_of_call(rng):
    case = Case(rng, "decode")
    wanted = case.run()
    with debug.race("layers.0-1.mlp/silu_mul, /argmax", seconds=0.01) as race:
        again = case.run()
    assert same(again, wanted)
    assert len(race) == 1 and race.hits == 2, "the layers' calls are of one kind"
    (only,) = race
    assert only.call.address == "layers.0.mlp/silu_mul[0]" and {"own", "reference"} <= {e.name for e in only.contenders}
    assert race[only.call.full_address] is only
    assert (
        re.search(r"layers\.0\.mlp/silu_mul\[0\]@\d+: silu_mul\(gate=float32", repr(race))
        and "silu_mul" in race._repr_html_()
    )
    with pytest.raises(ops.SelectorError, match="layers"), debug.race("layers.77"):
        case.run()


FILE = """
import ops

@ops.silu_mul.swap("python", where="layers.1-2", edge_cases=False)
def edited(gate, up):
    return ops.silu_mul.reference(gate, up) * {}
"""


def test_reload_at_the_prompt(rng, monkeypatch, tmp_path):
    case = Case(rng, "decode")
    file = tmp_path / "kernels.py"
    file.write_text(FILE.format("1"))
    spec = importlib.util.spec_from_file_location("kernels", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    wanted = case.run()
    monkeypatch.setattr("llm.models.llama.file", file, raising=False)
    new = FILE.format("(1 + 0)")
    session = typed(monkeypatch, "reload", f"file.write_text({new!r})", "reload", "rerun", "c")
    with debug.stop("layers.1.mlp/silu_mul[0]"):
        again = case.run()
    assert same(again, wanted)
    assert not session.left
    first, second, rest = session.said.split("(Pdb) ")[1:4]
    assert first.strip() == "no swap's text has changed" and "reloaded" not in second
    assert rest.startswith("reloaded <swap edited (python) of silu_mul where 'layers.1-2'")
