"""bisect: the culprit within ceil(log2 n) + 1 runs, a set of several, and runs that contradict themselves."""

import math
from contextlib import contextmanager

import numpy as np
import pytest

import ops
from debug.bisection import BisectError, bisect
from tests.llm import small


class Changes:
    """Changes that only note that they are on; `fails(on)` says when the run goes wrong."""

    def __init__(self, count, fails):
        self.on: set[int] = set()
        self.fails = fails
        self.named = {f"c{i}": (lambda i=i: self.on.add(i), lambda i=i: self.on.remove(i)) for i in range(count)}

    def run(self):
        return not self.fails(self.on)

    def bisect(self, **options):
        found = bisect(self.run, self.named, **options)
        assert not self.on, "all is undone"
        return found


def test_a_single_culprit_within_the_bound():
    for count in range(2, 40):
        for culprit in range(count):
            found = Changes(count, lambda on, c=culprit: c in on).bisect()
            assert found.guilty == (f"c{culprit}",)
            assert len(found.runs) <= math.ceil(math.log2(count)) + 1
            assert any(run.changes == found.guilty and not run.good for run in found.runs), "seen to fail alone"
            assert any(run.good for run in found.runs), "and a set without it to pass"
            assert len({run.changes for run in found.runs}) == len(found.runs)
    found = Changes(1, lambda on: bool(on)).bisect()
    assert found.guilty == ("c0",) and [run.changes for run in found.runs] == [("c0",), ()]


@pytest.mark.parametrize("count", [1, 2, 5, 16])
def test_no_culprit_or_a_run_that_always_fails(count):
    with pytest.raises(BisectError, match=f"passes with all {count} changes together; none is guilty"):
        Changes(count, lambda on: False).bisect()
    with pytest.raises(BisectError, match=f"fails without any of the {count} changes"):
        Changes(count, lambda on: True).bisect()


def test_several_that_fail_only_together(rng):
    for size in (2, 3, 5):
        for _ in range(20):
            count = int(rng.integers(size, 24))
            needed = {*rng.choice(count, size, replace=False).tolist()}
            found = Changes(count, lambda on, needed=needed: needed <= on).bisect()
            assert {*found.guilty} == {f"c{i}" for i in needed} and not found.notes
            assert len({run.changes for run in found.runs}) == len(found.runs), "no set is run twice"


def test_of_two_culprits_one_is_found(rng):
    for _ in range(20):
        count = int(rng.integers(2, 24))
        both = {*rng.choice(count, 2, replace=False).tolist()}
        found = Changes(count, lambda on, both=both: bool(both & on)).bisect()
        assert len(found.guilty) == 1 and int(found.guilty[0][1:]) in both
        assert len(found.runs) <= math.ceil(math.log2(count)) + 1


def test_changes_that_hide_one_another():
    found = Changes(8, lambda on: {1, 2} <= on and 7 not in on).bisect()
    assert found.guilty == ("c1", "c2")
    assert any("fails, but not together with" in note and "c7" in note for note in found.notes)


def test_runs_that_differ_are_told():
    flips = iter([False, True] * 50)
    with pytest.raises(BisectError, match="not deterministic: with c0, c1 it has passed and failed"):
        bisect(lambda: next(flips), Changes(4, lambda on: False).named, repeat=2)
    # c0 to c3 fail once, and no more when more is done: a part that fails in a whole that passes is run again.
    seen = []

    def run():
        seen.append({*changes.on})
        return not (changes.on == {0, 1} and seen.count({0, 1}) == 1)

    changes = Changes(4, lambda on: False)
    with pytest.raises(BisectError, match="not deterministic: with c0, c1 it has passed and failed; fix its seed"):
        bisect(run, changes.named)


def test_kinds_of_changes(rng):
    state = []

    class Manager:
        def __enter__(self):
            state.append("manager")

        def __exit__(self, *_):
            state.remove("manager")

    class Handle:
        def __init__(self):
            state.append("handle")

        def remove(self):
            state.remove("handle")

    @contextmanager
    def made():
        state.append("made")
        yield
        state.remove("made")

    kinds = [Manager(), (lambda: state.append("pair"), lambda: state.remove("pair")), Handle, made]
    for i, culprit in enumerate(("manager", "pair", "handle", "made")):
        found = bisect(lambda culprit=culprit: culprit not in state, kinds)
        assert found.guilty == (str(i),) and not state
    with pytest.raises(ops.OpError, match="change 0 can be made only once; pass a function that makes it: lambda"):
        bisect(lambda: True, [made()])
    use = ops.copy.use(lambda x: x)
    with pytest.raises(ops.OpError, match="change a can be made only once"):
        bisect(lambda: True, {"a": use})
    use.remove()
    with pytest.raises(ops.OpError, match="change 0 is 3, expected a context manager, a pair"):
        bisect(lambda: True, [3])
    with pytest.raises(ops.OpError, match="change 0 gave None, expected a handle with remove"):
        bisect(lambda: True, [lambda: None])
    with pytest.raises(ops.OpError, match="there are no changes"):
        bisect(lambda: True, [])


def test_what_run_gives_and_raises():
    changes = Changes(3, lambda on: False)

    def run():
        if 1 in changes.on:
            raise ValueError("the scale is wrong")
        return np.bool_(True)  # what a comparison of arrays gives

    found = bisect(run, changes.named)
    assert found.guilty == ("c1",) and "ValueError: the scale is wrong" in repr(found)
    assert repr(found).startswith("guilty: c1, of 3 changes, found in ")
    with pytest.raises(ops.OpError, match="gave None, expected True when it passes, False when it fails"):
        bisect(lambda: None, changes.named)  # type: ignore[arg-type, return-value]
    with pytest.raises(ZeroDivisionError):  # a change that cannot be made is no verdict
        bisect(lambda: True, [lambda: 1 / 0, lambda: 1 / 0])
    with pytest.raises(KeyboardInterrupt):
        bisect(lambda: (_ for _ in ()).throw(KeyboardInterrupt()), changes.named)


def test_a_swapped_kernel_of_a_model(rng):
    model, ids = small.model(rng), list(range(10))
    wanted = model(ids).numpy().copy()
    guilty = int(rng.integers(len(model.layers)))

    def kernel(i):
        def silu_mul(x, y):
            result = np.array(ops.silu_mul.reference(x, y))
            return result * (1.01 if i == guilty else 1)

        return lambda: ops.silu_mul.use(silu_mul, where=f"layers.{i}")

    def run():
        return np.allclose(model(ids).numpy(), wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())

    found = bisect(run, {f"layer {i}": kernel(i) for i in range(len(model.layers))})
    assert found.guilty == (f"layer {guilty}",) and not ops.silu_mul._uses
