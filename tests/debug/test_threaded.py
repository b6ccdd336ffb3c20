"""invariance between numbers of threads, which takes processes of their own."""

import numpy as np

import ops
from debug import threaded
from debug.cuts import invariance
from tests.llm import small

from .shaky import Model


def test_a_sum_that_depends_on_the_number_of_threads(rng):
    shaky = Model(shaky=True)
    found = invariance(shaky, rng.integers(0, 300, 9), chunks=(), rows=0, again=0)
    assert found.culprit is not None and found.culprit.cut == "2 threads" and len(found.changes) == 1
    assert found.culprit.address == "layers.1/add[0]" and found.culprit.bound == 0
    assert (found.culprit.token, found.culprit.index) == (7, (3,)) and found.culprit.source.startswith(
        "tests/debug/shaky"
    )
    assert found.cuts == ["2 threads against 1, in processes of their own"]


def test_a_small_model_on_two_threads(rng):
    assert invariance(small.model(rng), list(range(20)), chunks=(1,)).culprit is None


def test_what_lies_beside_what_is_written_does_not_count(rng, monkeypatch):
    """Nor does it, that a value was in one process's memory by chance before it was written there."""
    x = ops.tensor(rng.standard_normal((2, 1, 4)).astype("float32"))

    def recorded(garbage):
        record = threaded._Record()
        record.count = 2
        cache = ops.tensor(garbage.copy())
        positions = ops.tensor(np.array([1, 2], "int32"))
        with ops.intercepted(record):
            ops.scope.run(None, "", ops.cache_write, (cache, x, positions), {})
        return record.found

    by_chance = rng.standard_normal((5, 1, 4)).astype("float32")
    by_chance[2] = x.numpy()[1]
    found = {1: recorded(by_chance), 2: recorded(np.full((5, 1, 4), np.nan, "float32"))}
    monkeypatch.setattr(threaded, "_started", lambda given, number, out: (None, number, out))
    monkeypatch.setattr(threaded, "_finished", lambda process, number, out: found[number])
    assert threaded.first_difference(None, [1, 2], (1, 2)) is None
    found[2][0].values[2, 0, 3] += 1
    different = threaded.first_difference(None, [1, 2], (1, 2))
    assert different is not None and different.token(2) == 2 and different.result == "cache"
