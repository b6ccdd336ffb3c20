import sys

import numpy as np
import pytest

import ops
from tests import parity
from tests.parity_more import MORE

OTHERS = {each["name"] for each in MORE}  # tests/llm/test_left_out.py leaves parts of them out
# Of each family one, with what it has in float32, of each kind of family always; `python -m tests.parity` has all.
FIRST = [*{case.model_type: case for case in reversed(parity.CASES) if case.dtype == "float32"}.values()]
KINDS = ("llama", "gpt2", "mixtral", "mamba2")
CASES = [
    pytest.param(each, id=each.name, marks=() if each.model_type in KINDS else pytest.mark.families) for each in FIRST
]
HALF = [case for case in parity.CASES if case.dtype == "bfloat16" and case.name not in OTHERS]


def needs_the_extra():
    for name in ("torch", "transformers"):
        pytest.importorskip(name, reason="the parity extra is not installed: pip install -e '.[parity]'")


@pytest.mark.parametrize("case", CASES)
def test_matches_transformers(case, seed):
    needs_the_extra()
    result = parity.run(case, seed % 2**31)
    assert result.passed, f"error {result.error:.2e}, other cuts {result.cuts}: {parity.where(case, seed % 2**31)}"


@pytest.mark.families
@pytest.mark.parametrize("case", [parity.CASES[0], *HALF], ids=lambda case: case.name)
@pytest.mark.parametrize("left_out", ["rope", "mlp"])
def test_a_part_that_is_left_out_is_seen(case, left_out, seed):
    needs_the_extra()
    gated = ops.gelu_mul if "gemma" in case.model_type else ops.silu_mul
    op, without = {
        "rope": (ops.rope, lambda x, positions, frequencies, **_: x),
        "mlp": (gated, lambda gate, up, **_: np.zeros_like(gate)),
    }[left_out]
    with op.use(without):
        assert parity.run(case, seed % 2**31).error > 2 * parity.BOUNDS[case.dtype]


def test_without_the_extra_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["parity"])
    monkeypatch.setattr(parity.importlib.util, "find_spec", lambda name: None)
    assert parity.main() == 2
    assert capsys.readouterr().err == "tests.parity needs torch and transformers: pip install -e '.[parity]'\n"


def test_a_failed_case_says_what_is_wrong(seed):
    needs_the_extra()
    with ops.rope.use(lambda x, positions, frequencies, **_: x, where="layers.1"):
        said = parity.where(parity.CASES[0], seed % 2**31)
    assert said.startswith("layers.1.self_attn/rope[0] is wrong, called at llm/models/llama.py:")


def test_some_cases_and_what_is_said_of_them(monkeypatch, capsys):
    needs_the_extra()
    chosen = [case for case in parity.CASES if case.model_type == "olmo2"]
    monkeypatch.setattr(
        parity, "run", lambda case, seed: parity.Result(case, float(case.dtype == "float32"), None, None)
    )
    monkeypatch.setattr(parity, "where", lambda case, seed: f"{case.name}: here")
    monkeypatch.setattr(sys, "argv", ["parity", "--only", "olmo2"])
    assert parity.main() == 1
    said = capsys.readouterr().out
    assert all(f"  {case.name}: here\n" in said for case in chosen if case.dtype == "float32")
    assert said.count("FAILED") == said.count(": here") == len(chosen) - 1 == 2
    assert said.endswith("\n1 passed, 2 failed\n")
    monkeypatch.setattr(sys, "argv", ["parity", "--only", "olmo7"])
    with pytest.raises(SystemExit, match="2"):
        parity.main()
    assert "no case has 'olmo7' in its name or model_type" in capsys.readouterr().err
