"""Kernels are told apart by all that they are made from, not by their file alone: none is ever mistaken for another."""

import functools
import importlib
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import ops
from ops import build
from ops.digest import _digest, source_digest

FACTORY = """
import ops
import helper
from helper import FACTOR
from tvm.script import tirx as T


def body(factor):
    def build(x, out):
        width, by = x.shape[1], factor()

        @T.prim_func(s_tir=True)
        def times(x_: T.handle, out_: T.handle):
            n = T.int64()
            X = T.match_buffer(x_, (n, width), "float32", align=4)
            Y = T.match_buffer(out_, (n, width), "float32", align=4)
            for i, k in T.grid(n, width):
                with T.sblock("times"):
                    vi, vk = T.axis.remap("SS", [i, k])
                    Y[vi, vk] = X[vi, vk] * T.float32(by)

        return times

    return build


def make(factor):
    @ops.op(symbolic={"x": "n"})
    def times(x: ops.Tensor) -> ops.Tensor:
        return ops.like(x)

    times.kernel(body(factor))
    return times


def imported():
    return FACTOR


def by_module():
    return helper.FACTOR


def called():
    return helper.factor()


def nested():
    return [helper.deep.FACTOR for _ in "a"][0]
"""
HELPER = "import deep\nfrom deep import again\nFACTOR = {0}\n\n\ndef factor():\n    return again()\n"
DEEP = "FACTOR = {0}\n\n\ndef again():\n    return FACTOR\n"


@pytest.fixture
def load(tmp_path, monkeypatch):
    """The factory as a process that has just started sees it, with this factor in the modules it imports."""
    monkeypatch.setenv("LIMPID_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.syspath_prepend(str(tmp_path))

    def loaded(factor: float = 2.0):
        for name, text in {"factory": FACTORY, "helper": HELPER, "deep": DEEP}.items():
            (tmp_path / f"{name}.py").write_text(text.replace("{0}", str(factor)))
            monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.setattr(build, "_memo", {})
        monkeypatch.setattr(build, "log", [])
        _digest.cache_clear()
        importlib.invalidate_caches()
        return importlib.import_module("factory")

    return loaded


def factor_of(op) -> float:
    return op(ops.tensor(np.ones((2, 3), "float32"))).numpy()[1, 2].item()


def test_one_factory_makes_several_kernels(load):
    factory = load()
    two, three = factory.make(lambda: 2.0), factory.make(lambda: 3.0)
    assert (factor_of(two), factor_of(three)) == (2, 3)
    two.kernel(factory.body(functools.partial(float, 7)))
    assert (factor_of(two), factor_of(three)) == (7, 3)
    assert len(build.log) == 3


@pytest.mark.parametrize("how", ["imported", "by_module", "called", "nested"])
def test_what_another_module_says_is_part_of_a_kernel(load, how):
    for factor, compiled in ((2.0, 1), (2.0, 0), (5.0, 1), (2.0, 0)):
        factory = load(factor)
        assert factor_of(factory.make(getattr(factory, how))) == factor
        assert len(build.log) == compiled, "only what has changed"


@dataclass
class Plain:
    value: float


def builder(of, default=None):
    def made(given=default):
        return of, given

    return made


def digests(*values) -> list[str]:
    """Of one builder with each of the values in it; twice, as two processes would make them."""
    made = []
    for _ in range(2):
        _digest.cache_clear()
        made.append([source_digest((builder(each),)) for each in values])
    assert made[0] == made[1]
    return made[0]


def test_values_tell_builders_apart():
    values = [
        2.0, 3.0, 3, "3", None, ops.Spec((3,), "float32"), ops.Dim("n", 2), np.dtype("float16"), np.float32(3), np.tanh,
        (2.0, 3.0), [2.0, 3.0], (2.0, (3.0,)), {"by": 2.0}, {"by": 3.0}, {"a", "b"}, {"a", "c"}, Plain(2.0), Plain(3.0),
        builder(2.0), builder(3.0), builder(2.0, 3.0), functools.partial(max, 2.0), functools.partial(max, 3.0),
        math.sin, math.cos, ops.silu, ops.tanh, Path, Plain, lambda x: x + 1, lambda x: x + 2,
    ]  # fmt: skip
    assert len({*digests(*values)}) == len(values)
    assert len({*digests(*[builder(None, each) for each in values])}) == len(values)
    same, other = (lambda x: x + 1, lambda x: x + 2)  # on one line
    assert len({*digests(same, other)}) == 2


def local():
    @dataclass
    class Local:
        value: float

    return Local


@pytest.mark.parametrize(
    "value",
    [object(), np.ones(3), Path("a"), local(), local()(2.0)],
    ids=["object", "array", "path", "local class", "local value"],
)
def test_what_cannot_be_told_is_never_the_same(value):
    _digest.cache_clear()
    assert source_digest((builder(value),)) != source_digest((builder(value),))


def test_a_value_that_holds_itself():
    loop: list = [2.0]
    loop.append(loop)
    assert len({*digests(loop, [2.0])}) == 2
