import pytest

from tests import parity


@pytest.mark.parametrize("case", parity.CASES, ids=lambda case: case.name)
def test_matches_transformers(case, seed):
    pytest.importorskip("torch", reason="the parity extra is not installed: pip install -e '.[parity]'")
    pytest.importorskip("transformers", reason="the parity extra is not installed: pip install -e '.[parity]'")
    result = parity.run(case, seed % 2**31)
    assert result.passed, f"error {result.error:.2e}, other cuts {result.cuts}"
