"""Other kernels in the place of an op's own: from Python, from TIR, or the op's own steps."""

import threading

import numpy as np
import pytest
from tvm.script import tirx as T

import ops
from ops import Call, Kernel
from ops import scope as scopes

from .harness import random
from .toys import Model, Recorder, toy_add_to, toy_double, toy_quadruple


def test_a_kernel_in_use(x, rng):
    def triple(x):
        return 3 * x

    model = Model()
    with toy_double.use(triple) as use:
        np.testing.assert_array_equal(toy_double(x).numpy(), 3 * x.numpy())
        assert use.hits == 1 and repr(use) == "<toy_double by <kernel triple (python)> where every call, 1 hits>"
    np.testing.assert_array_equal(toy_double(x).numpy(), 2 * x.numpy())
    first = toy_double.use(triple, where="layers.0")
    last = toy_double.use(lambda x: 5 * x, where="layers.0-1/toy_double[1]")
    seen = Recorder()
    with ops.intercepted(seen):
        model(x)
    factors = [(out.numpy() / call.args[0].numpy()).mean() for call, out in zip(seen.calls, seen.outputs, strict=True)
               if call.op is toy_double]  # fmt: skip
    np.testing.assert_allclose(factors, [3, 5, 2, 5], rtol=1e-6)
    assert (first.hits, last.hits) == (1, 2), "the last one in use wins"
    last.remove()
    last.remove()
    model(x)
    assert (first.hits, last.hits) == (3, 2)
    first.remove()
    model(x)
    assert first.hits == 3 and not toy_double._uses


def test_a_primfunc_in_use(x):
    @T.prim_func(s_tir=True)
    def sevenfold(x_: T.handle, out_: T.handle):
        n = T.int64()
        X = T.match_buffer(x_, (n, 8), "float32", align=4)
        Y = T.match_buffer(out_, (n, 8), "float32", align=4)
        for i, k in T.grid(n, 8):
            with T.sblock("sevenfold"):
                vi, vk = T.axis.remap("SS", [i, k])
                Y[vi, vk] = X[vi, vk] * T.float32(7)

    with toy_double.use(sevenfold, where="/toy_double rows=3") as use:
        np.testing.assert_allclose(toy_double(x).numpy(), 7 * x.numpy(), rtol=1e-6)
        np.testing.assert_array_equal(toy_double(x[:2]).numpy(), 2 * x.numpy()[:2])
        assert use.hits == 1 and use.kernel.origin == "tvm"
    with toy_double.use(sevenfold), pytest.raises(ops.KernelError, match=r"toy_double\(float32\[3, 9\]\): .*"):
        toy_double(ops.zeros((3, 9)))

    @T.prim_func(s_tir=True)
    def aligned(x_: T.handle, out_: T.handle):
        X = T.match_buffer(x_, (3, 8), "float32")
        Y = T.match_buffer(out_, (3, 8), "float32")
        Y[0, 0] = X[0, 0]

    with pytest.raises(ops.KernelError, match="toy_double: X assumes 64-byte alignment; pass align="):
        toy_double.use(aligned)


def test_a_kernel_object_in_use(x):
    launched = []

    def launch(call: Call, outputs: tuple[ops.Tensor, ...]) -> None:
        launched.append(call.address)
        outputs[0].numpy()[...] = 11

    with toy_double.use(Kernel("eleven", "mine", launch)) as use:
        assert (toy_double(x).numpy() == 11).all()
    assert len(launched) == 1 and use.kernel.name == "eleven"


def test_a_python_kernel_that_writes(rng):
    def add_twice(total, x, position):
        assert not total.flags.writeable and not x.flags.writeable
        total = total.copy()
        total[position] += 2 * x
        return total

    total, values = ops.zeros((3, 4)), random(rng, (4,), "float32")
    with toy_add_to.use(add_twice):
        assert toy_add_to(total, ops.tensor(values), 1) is None
    np.testing.assert_array_equal(total.numpy()[1], 2 * values)

    def in_place(total, x, position):
        total[position] += x

    with toy_add_to.use(in_place), pytest.raises(ops.KernelError, match="read-only"):
        toy_add_to(total, ops.tensor(values), 1)
    np.testing.assert_array_equal(total.numpy()[1], 2 * values)


@pytest.mark.parametrize(
    "function, message",
    [
        (lambda x: x[:1], r"gave the shape \(1, 8\), toy_double gives float32\[3, 8\]"),
        (lambda x: (x, x), r"gave 2 arrays, toy_double has 1 to fill"),
        (lambda x: None, r"gave 0 arrays"),
        (lambda x: x.astype("complex64"), r"Cannot cast array data from dtype\('complex64'\)"),
        (lambda x, y: x, r"missing 1 required positional argument: 'y'"),
    ],
)
def test_a_python_kernel_that_gives_the_wrong_thing(x, function, message):
    with toy_double.use(function) as use, pytest.raises(ops.KernelError, match=message):
        toy_double(x)
    assert use.hits == 1


def test_what_use_does_not_take():
    with pytest.raises(ops.OpError, match=r"toy_double.use takes a Kernel, a PrimFunc or a function, not int"):
        toy_double.use(3)
    with pytest.raises(ops.SelectorError, match="is not understood"):
        toy_double.use(lambda x: x, where="layers[0]")
    assert not toy_double._uses


def test_a_kernel_that_calls_its_own_op_ends(x):
    def recursive(values):
        return toy_double(ops.tensor(values)).numpy()

    with toy_double.use(recursive), pytest.raises(ops.KernelError, match="recursion"):
        toy_double(x)
    np.testing.assert_array_equal(toy_double(x).numpy(), 2 * x.numpy())


def test_uses_from_many_threads(x):
    def work():
        for _ in range(200):
            use = toy_double.use(lambda x: 2 * x, where="nowhere")
            toy_double(x)
            use.remove()
        always.append(toy_double.use(lambda x: 2 * x, where="nowhere"))

    always: list = []
    threads = [threading.Thread(target=work) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(toy_double._uses) == 4 and {*toy_double._uses} == {*always}
    for each in always:
        each.remove()
    with toy_double.use(lambda x: 2 * x) as use:
        threads = [threading.Thread(target=lambda: [toy_double(x) for _ in range(500)]) for _ in range(4)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
    assert use.hits == 2000


def test_no_hit_in_a_with_is_an_error(x):
    with (
        pytest.raises(ops.SelectorError, match=r"where 'layres.0', 0 hits>: no call of toy_double"),
        toy_double.use(lambda x: 2 * x, where="layres.0"),
    ):
        toy_double(x)
    with pytest.raises(ZeroDivisionError), toy_double.use(lambda x: 2 * x, where="layres.0"):
        raise ZeroDivisionError  # what went wrong inside is what is told
    assert not toy_double._uses


def test_steps(x):
    outer, inner = Recorder(), Recorder()
    with ops.intercepted(outer), toy_quadruple.steps(), ops.intercepted(inner):
        given = scopes.run(None, "", lambda: [toy_double(x), toy_quadruple(x), toy_quadruple(x), toy_double(x)], (), {})
    np.testing.assert_array_equal(given[2].numpy(), 4 * x.numpy())
    steps = [f"toy_quadruple/toy_double[{i}]" for i in range(4)]
    assert inner.addresses == ["/toy_double[0]", *steps, "/toy_double[1]"], "steps do not shift the model's ordinals"
    assert {*outer.addresses} == {*inner.addresses, "/toy_quadruple[0]", "/toy_quadruple[1]"}
    whole = Recorder()
    with ops.intercepted(whole):
        toy_quadruple(x)
    assert [call.op for call in whole.calls] == [toy_quadruple], "without steps() it is one call"
    with toy_double.use(lambda x: 3 * x, where="toy_quadruple"), toy_quadruple.steps():
        np.testing.assert_allclose(toy_quadruple(x).numpy(), 9 * x.numpy(), rtol=1e-6)
    with pytest.raises(ops.OpError, match="toy_double has no steps; it is one kernel"):
        toy_double.steps()
