"""Every tool is made of what is tested here: each test is a small tool, at work on a model that knows none of them."""

import gc
import inspect
import threading
import traceback
from contextvars import copy_context

import numpy as np
import pytest
from tvm.script import tirx as T

import ops
from ops import Call, Dim, Interceptor, Kernel, Spec, build
from ops import scope as scopes

from .harness import random
from .toys import Model, toy_add_to, toy_double, toy_quadruple, toy_split, toy_unbuilt


class Recorder(Interceptor):
    """Sees: addresses, and what each call gave."""

    def __init__(self):
        self.calls: list[Call] = []
        self.outputs: list = []

    def call(self, call, launch):
        index = len(self.calls)
        self.calls.append(call)
        self.outputs.append(None)
        self.outputs[index] = launch(call)
        return self.outputs[index]

    @property
    def addresses(self) -> list[str]:
        return [call.address for call in self.calls]


@pytest.fixture
def x(rng) -> ops.Tensor:
    return ops.tensor(random(rng, (3, 8), "float32"))


ADDRESSES = [
    "layers.0/toy_double[0]",
    "layers.0/toy_add_to[0]",
    "layers.0/toy_double[1]",
    "layers.1/toy_double[0]",
    "layers.1/toy_add_to[0]",
    "layers.1/toy_double[1]",
    "/rms_norm[0]",
]


def test_see_every_call(x):
    model, seen = Model(), Recorder()
    with ops.intercepted(seen):
        output = model(x)
    assert seen.addresses == ADDRESSES
    assert seen.outputs[-1] is output and seen.outputs[1] is None
    np.testing.assert_array_equal(seen.outputs[2].numpy(), 4 * x.numpy())
    model(x)
    assert len(seen.calls) == 7, "outside of the with nothing is seen"


def test_what_a_call_tells(x):
    model, seen = Model(), Recorder()
    with ops.intercepted(seen):
        model(x)
        model(x)
    first, write = seen.calls[3], seen.calls[4]
    assert (first.op, first.path, first.ordinal, first.constants) == (toy_double, "layers.1", 0, {})
    assert first.inputs.keys() == {"x"} and first.outputs == (Spec((3, 8), "float32"),)
    assert first.written == {} and write.written == {"total": model.totals[1]} and write.outputs == ()
    assert write.inputs["position"] == 1
    assert repr(write) == (
        f"layers.1/toy_add_to[0]@{write.scope.number}(total=float32[2, 8], x=float32[8], position=1)"
    )
    assert seen.calls[6].constants == {"eps": 1e-6, "plus_one": False}, "defaults are filled in"
    assert seen.calls[7].scope.number == first.scope.number + 1, "the second pass"
    assert seen.calls[7].full_address == f"layers.0/toy_double[0]@{first.scope.number + 1}"
    assert first.scope.module is model.layers[1] and first.scope.parent.module is model
    assert first.scope.args[0].spec is x.spec and first.scope.constants == {"fail": False}
    assert repr(first.scope) == f"<layers.1 in pass {first.scope.number}>"


def test_a_call_knows_the_line_of_the_model(x):
    class Lines(Interceptor):
        def __init__(self):
            self.found = []

        def call(self, call, launch):
            def ask():
                return call.source, call.frame.f_code.co_name

            ops.tensor([1.0])
            self.found.append(ask())
            return launch(call.replace(call.args))

    outer, inner = Lines(), Lines()
    with ops.intercepted(outer, inner):
        Model(1)(x)
        toy_double(x)
    line = inspect.getsourcelines(test_a_call_knows_the_line_of_the_model)[1]
    *model_lines, here = outer.found
    assert outer.found == inner.found
    assert [source.rpartition(":")[0] for source, _ in model_lines] == ["tests/ops/toys.py"] * 4
    assert [name for _, name in model_lines] == ["forward"] * 4
    assert model_lines[0] != model_lines[2]
    path, _, number = here[0].partition(":")
    assert path == "tests/ops/test_seam.py" and line < int(number) < line + 22
    seen = Recorder()
    with ops.intercepted(seen):
        toy_double(x)
    assert seen.calls[0].source == "?", "the call is over"


def test_replace_inputs_and_outputs(x):
    class Replace(Interceptor):
        def call(self, call, launch):
            if call.address == "layers.0/toy_double[0]":
                return launch(call.replace((ops.tensor(call.args[0].numpy() + 1),)))
            if call.address == "layers.1/toy_double[1]":
                return ops.tensor(launch(call).numpy() - 5)
            if call.op is ops.rms_norm:
                return launch(call.replace(constants=call.constants | {"plus_one": True}))
            return launch(call)

    seen = Recorder()
    with ops.intercepted(Replace(), seen):
        output = Model()(x)
    changed = (x.numpy() + 1) * 16 - 5
    expected = 2 * changed / np.sqrt((changed.astype("float64") ** 2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(output.numpy(), expected, rtol=1e-5)
    assert seen.calls[-1].constants["plus_one"] is True


def test_replaced_inputs_are_checked_again(x):
    class Wrong(Interceptor):
        def __init__(self, arg):
            self.arg = arg

        def call(self, call, launch):
            return launch(call.replace((self.arg,)))

    with ops.intercepted(Wrong(x[0])), pytest.raises(ops.ShapeError, match=r"toy_double: x is float32\[8\], expected"):
        toy_double(x)
    with ops.intercepted(Wrong(x.numpy())), pytest.raises(ops.OpError, match=r"x is numpy.ndarray, expected Tensor"):
        toy_double(x)
    longer = ops.tensor(np.ones((5, 8), "float32"))
    with ops.intercepted(Wrong(longer)):
        assert toy_double(x).shape == (5, 8), "other inputs give other outputs"


def test_supply_the_output_and_nothing_is_compiled(x):
    class Zeros(Interceptor):
        def call(self, call, launch):
            return ops.zeros(call.outputs[0].shape)

    with ops.intercepted(Zeros()):
        assert (toy_unbuilt(x).numpy() == 0).all()
    with pytest.raises(ops.KernelError, match="toy_unbuilt was built"):
        toy_unbuilt(x)


@pytest.mark.parametrize(
    "given, message",
    [
        (None, r"Bad.call gave None, expected float32\[3, 8\]; return launch\(call\)"),
        (np.zeros((3, 8), "float32"), r"Bad.call gave 'ndarray', expected float32\[3, 8\]"),
        ((ops.zeros((3, 8)),), r"Bad.call gave 'tuple', expected"),
    ],
)
def test_what_an_interceptor_gives_must_be_what_the_op_gives(x, given, message):
    class Bad(Interceptor):
        def call(self, call, launch):
            return given

    with ops.intercepted(Bad()), pytest.raises(ops.OpError, match=r"layers.0/toy_double\[0\]@\d+: " + message):
        Model()(x)


def test_graph_capture(x):
    class Capture(Interceptor):
        """Records calls by value number, and supplies uninitialised outputs."""

        def __init__(self):
            self.numbers: dict[int, int] = {}
            self.kept: list = []
            self.graph: list[tuple] = []

        def number(self, value):
            if not isinstance(value, ops.Tensor):
                return value
            self.kept.append(value)
            return self.numbers.setdefault(id(value.buffer), len(self.numbers))

        def call(self, call, launch):
            plan = call.op.plan(call.args, call.constants)
            outputs = tuple(ops.empty(spec.shape, spec.dtype) for spec in call.outputs)
            inputs = [self.number(each) for each in call.args]
            self.graph.append((call.op.name, inputs, plan.request().specs, [self.number(each) for each in outputs]))
            return outputs[0] if len(outputs) == 1 else outputs or None

    capture, before = Capture(), len(build.log)
    x = ops.tensor(np.ones((5, 48), "float32"))
    with ops.intercepted(capture):
        Model(1, 48)(x)
        toy_split(x.reshape(-1))
    n = Dim("n", 2, 16)
    wide = Spec((n, 48), "float32")
    assert [name for name, *_ in capture.graph] == ["toy_double", "toy_add_to", "toy_double", "rms_norm", "toy_split"]
    assert [(inputs, outputs) for _, inputs, _, outputs in capture.graph] == [
        ([0], [1]),
        ([2, 3, 1], []),
        ([1], [4]),
        ([4, 5], [6]),
        ([7, None, 1.0], [8, 9]),
    ]
    assert capture.graph[0][2] == (wide,) and capture.graph[3][2] == (wide, Spec((48,), "float32"))
    assert capture.graph[4][2] == (Spec((Dim("n"),), "float32"), None, float)
    assert len(build.log) == before, "nothing was compiled"


def test_rewind_a_module_and_run_it_again(x):
    class Rewind(Interceptor):
        """Keeps what calls write; when a module fails, puts it back and runs the module again without the failure."""

        def __init__(self):
            self.saved: list[tuple[ops.Tensor, np.ndarray]] = []

        def call(self, call, launch):
            self.saved += [(tensor, tensor.numpy().copy()) for tensor in call.written.values()]
            return launch(call)

        def scope(self, scope, run):
            if scope.path:
                return run(*scope.args, **scope.constants)
            try:
                return run(*scope.args, **scope.constants)
            except ValueError:
                for tensor, values in reversed(self.saved):
                    tensor.numpy()[...] = values
                return run(*scope.args, **{**scope.constants, "fail": False})

    plain, rewound, seen = Model(), Model(), Recorder()
    expected = plain(x)
    with ops.intercepted(Rewind(), seen):
        given = rewound(x, fail=True)
    np.testing.assert_array_equal(given.numpy(), expected.numpy())
    for total, wanted in zip(rewound.totals, plain.totals, strict=True):
        np.testing.assert_array_equal(total.numpy(), wanted.numpy())
        assert total.numpy().any()
    assert seen.addresses == ["layers.0/toy_double[0]", "layers.0/toy_add_to[0]", *ADDRESSES], "numbered from 0 again"
    assert len({call.scope.number for call in seen.calls}) == 1, "the same pass"


def test_unwind_by_an_exception_of_the_tools_own(x):
    class Found(Exception):
        pass

    class Until(Interceptor):
        """Stops the model at a call, and gives that call's output as the model's."""

        def call(self, call, launch):
            output = launch(call)
            if call.address == "layers.1/toy_double[0]":
                raise Found(output)
            return output

        def scope(self, scope, run):
            try:
                return run(*scope.args, **scope.constants)
            except Found as found:
                if scope.path:
                    raise
                return found.args[0]

    with ops.intercepted(Until()):
        np.testing.assert_array_equal(Model()(x).numpy(), 8 * x.numpy())
    assert scopes.current.get().path == ""


def test_a_scope_can_replace_arguments_and_results(x):
    class Outer(Interceptor):
        def scope(self, scope, run):
            if scope.path != "layers.1":
                return run(*scope.args, **scope.constants)
            again = run(ops.zeros(scope.args[0].shape), **scope.constants)
            assert (again.numpy() == 0).all()
            return run(*scope.args, **scope.constants)

    seen = Recorder()
    with ops.intercepted(Outer(), seen):
        output = Model()(x)
    assert np.abs(output.numpy()).max() > 0
    assert [address for address in seen.addresses if "layers.1" in address] == ADDRESSES[3:6] * 2


def test_order_outermost_first(x):
    order = []

    class Named(Interceptor):
        def __init__(self, label):
            self.label = label

        def call(self, call, launch):
            order.append(f"{self.label}(")
            output = launch(call)
            order.append(f"){self.label}")
            return output

        def scope(self, scope, run):
            order.append(f"{self.label}[")
            output = run(*scope.args, **scope.constants)
            order.append(f"]{self.label}")
            return output

    handle = ops.install(Named("p"))
    with ops.intercepted(Named("a"), Named("b")), ops.intercepted(Named("c")):
        scopes.run(None, "", lambda: toy_double(x), (), {})
    handle.remove()
    assert "".join(order) == "p[a[b[c[" + "p(a(b(c(" + ")c)b)a)p" + "]c]b]a]p"


def test_install_for_the_process(x):
    seen, local = Recorder(), Recorder()
    first, second = ops.install(seen), ops.install(seen)
    toy_double(x)
    assert len(seen.calls) == 2, "installed twice, it sees twice"
    first.remove()
    first.remove()
    with ops.intercepted(local):
        thread = threading.Thread(target=toy_double, args=(x,))
        thread.start()
        thread.join()
    assert (len(seen.calls), len(local.calls)) == (3, 0), "other threads: of the process yes, of the `with` no"
    second.remove()
    toy_double(x)
    assert len(seen.calls) == 3


def test_with_belongs_to_a_context(x):
    seen = Recorder()
    with ops.intercepted(seen):
        inside = copy_context()
        outside_calls = []
        thread = threading.Thread(target=lambda: outside_calls.append(inside.run(toy_double, x)))
        thread.start()
        thread.join()
    assert len(seen.calls) == 1 and len(outside_calls) == 1, "a context that is handed over takes its tools along"
    inside.run(toy_double, x)
    assert len(seen.calls) == 2
    toy_double(x)
    assert len(seen.calls) == 2


def test_a_generator_sees_the_tools_of_who_asks_it(x):
    def steps():
        while True:
            yield toy_double(x)

    seen, generator = Recorder(), steps()
    next(generator)
    with ops.intercepted(seen):
        next(generator)
    next(generator)
    assert len(seen.calls) == 1


def test_ops_of_an_interceptor_are_its_own(x):
    class Doubling(Interceptor):
        """Doubles every output with the op that it also sees."""

        def call(self, call, launch):
            return toy_double(launch(call)) if call.op is toy_double else launch(call)

    class Probing(Interceptor):
        def scope(self, scope, run):
            output = run(*scope.args, **scope.constants)
            toy_double(output)
            return output

    outer, inner = Recorder(), Recorder()
    with ops.intercepted(outer, Doubling(), Probing(), inner):
        scopes.run(None, "", lambda: toy_double(toy_double(x)), (), {})
    model = ["/toy_double[0]", "/toy_double[1]"]
    tools = ["Doubling/toy_double[0]", "Doubling/toy_double[1]"]
    tools += ["Probing/toy_double[0]", "Probing.Doubling/toy_double[0]"]
    # Neither is moved by what tools call; each tool sees what the others call.
    assert [address for address in outer.addresses if "D" not in address and "P" not in address] == model
    assert sorted(set(outer.addresses)) == sorted({*model, *tools})
    assert sorted(set(inner.addresses)) == sorted({*model, *tools})
    first = outer.addresses.index("/toy_double[0]")
    np.testing.assert_array_equal(outer.outputs[first].numpy(), 4 * x.numpy())


def test_an_interceptor_that_runs_the_model(x):
    class Twice(Interceptor):
        def scope(self, scope, run):
            output = run(*scope.args, **scope.constants)
            if scope.path == "":
                other(x)
            return output

    other, twice, seen = Model(1), Twice(), Recorder()
    with ops.intercepted(twice, seen):
        Model(1)(x)
    assert seen.addresses[:4] == [*ADDRESSES[:3], "/rms_norm[0]"]
    assert seen.addresses[4:] == [*(f"Twice.{each}" for each in ADDRESSES[:3]), "Twice/rms_norm[0]"]


def test_after_an_exception_or_ctrl_c_all_is_as_before(x):
    class Stop(Interceptor):
        def __init__(self, error):
            self.error = error

        def call(self, call, launch):
            launch(call)
            raise self.error

    for error in (KeyboardInterrupt(), SystemExit(3), ZeroDivisionError()):
        with pytest.raises(type(error)), ops.intercepted(Stop(error)):
            Model()(x)
        seen = Recorder()
        with ops.intercepted(seen):
            Model()(x)
        assert seen.addresses == ADDRESSES
    assert scopes.current.get().path == ""


def test_errors_name_the_op_the_scope_and_the_argument(x):
    class Wrong(Model):
        def forward(self, x, **_):
            return scopes.run(None, "layers.0.mlp", lambda: toy_double(x[0]), (), {})

    with pytest.raises(ops.ShapeError, match=r"^toy_double in layers.0.mlp: x is float32\[8\], expected \[n, width\]$"):
        Wrong()(x)
    with pytest.raises(ops.OpError, match=r"^toy_double\(x: Tensor\) -> Tensor: missing a required argument: 'x'"):
        toy_double()
    with pytest.raises(ops.OpError, match=r"too many positional"):
        toy_double(x, x)
    with pytest.raises(ops.OpError, match=r"unexpected keyword argument 'epsilon'"):
        ops.rms_norm(x, x[0], eps=1e-5, epsilon=1e-5)
    with pytest.raises(ops.OpError, match=r"x is numpy.ndarray, expected Tensor; pass ops.tensor"):
        toy_double(x.numpy())
    with pytest.raises(ops.OpError, match=r"toy_double: x is NoneType, expected Tensor"):
        toy_double(None)
    with pytest.raises(ops.OpError, match=r"x is ops.spec.Spec, expected Tensor"):
        toy_double(x.spec)
    with pytest.raises(ops.OpError, match=r"shift is list, expected Tensor or None"):
        toy_split(x[0], [1.0])
    with pytest.raises(ops.OpError, match=r"factor is str, expected float"):
        toy_split(x[0], None, "2")
    with pytest.raises(ops.OpError, match=r"position is float, expected int"):
        toy_add_to(ops.zeros((3, 8)), x[0], 1.0)
    with pytest.raises(ops.OpError, match=r"toy_split: a constant is a number, a string or a tuple, not unhashable"):
        toy_split(x[0], sign=[1])
    with pytest.raises(ops.OpError, match=r"sign is ops.tensor.Tensor; it is a compile-time constant"):
        toy_split(x[0], sign=x)
    with pytest.raises(
        ops.KernelError, match=r"toy_add_to\(float32\[2, 8\], float32\[8\], 7\): the position is outside"
    ):
        toy_add_to(ops.zeros((2, 8)), x[0], 7)


def test_an_error_is_raised_once_and_its_cause_is_chained(x):
    def broken(x):
        raise ZeroDivisionError("mine")

    with toy_double.use(broken), pytest.raises(ops.KernelError, match=r"toy_double\(float32\[3, 8\]\): mine") as caught:
        toy_double(x)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(ops.KernelError) as caught:
        toy_unbuilt(ops.tensor(np.ones((2, 2), "float32")))
    assert caught.value.__cause__ is not caught.value
    assert "broken" not in "".join(traceback.format_exception(caught.value))


def test_spec_infers_without_allocating():
    n = Dim("n", 2, 16)
    before = ops.memory.statistics()["allocations"]
    assert toy_double.spec(Spec((n, 8), "float32")) == Spec((n, 8), "float32")
    assert toy_split.spec(Spec((n,), "float32"), factor=2.0) == (Spec((n,), "float32"),) * 2
    assert ops.rms_norm.spec(Spec((n, 8), "bfloat16"), Spec((8,), "float32"), eps=1e-5).shape == (n, 8)
    assert toy_add_to.spec(Spec((2, 3), "float32"), Spec((3,), "float32"), 1) == ()
    with pytest.raises(ops.ShapeError, match=r"weight is float32\[9\], expected \[8\] for x bfloat16\[n:2-16, 8\]"):
        ops.rms_norm.spec(Spec((n, 8), "bfloat16"), Spec((9,), "float32"), eps=1e-5)
    assert ops.memory.statistics()["allocations"] == before


def test_several_outputs_scalars_defaults_and_names(rng):
    values, one = random(rng, (6,), "float32"), np.array([0.5], "float32")
    x, shift = ops.tensor(values), ops.tensor(one)
    for _ in range(3):  # the first call of a form makes its plan, the others find it
        for given, wanted in [
            (toy_split(x), (values, values)),
            (toy_split(x, None), (values, values)),
            (toy_split(x, shift), (values, values + one)),
            (toy_split(x, shift=shift), (values, values + one)),
            (toy_split(x=x, factor=3), (3 * values, values)),
            (toy_split(x, None, 2), (2 * values, values)),
            (toy_split(x, None, 2.5), (np.float32(2.5) * values, values)),
            (toy_split(x, shift, 0.5, sign=-1), (np.float32(0.5) * values, -values + one)),
        ]:
            assert isinstance(given, tuple) and len(given) == 2
            np.testing.assert_allclose(given[0].numpy(), wanted[0], rtol=1e-6)
            np.testing.assert_allclose(given[1].numpy(), wanted[1], rtol=1e-6)
    total = ops.zeros((3, 6))
    assert toy_add_to(total, x, 2) is None
    toy_add_to(total=total, position=2, x=x)
    np.testing.assert_array_equal(total.numpy()[2], 2 * values)
    seen = Recorder()
    with ops.intercepted(seen):
        toy_split(x, None)
        toy_split(shift=None, x=x, sign=-1)
    assert [call.args for call in seen.calls] == [(x, None, 1.0), (x, None, 1.0)]
    assert [call.constants for call in seen.calls] == [{"sign": 1}, {"sign": -1}]


def test_a_scalar_is_no_part_of_a_kernel():
    toy_split(ops.zeros((4,)), None, 1.25)
    before = len(build.log)
    for size in range(1, 6):
        for factor in (0.5, 7, -1.0):
            given = toy_split(ops.tensor(np.ones(size, "float32")), None, factor)
            assert (given[0].numpy() == factor).all()
    assert len(build.log) == before


def test_the_memo_is_bounded(monkeypatch):
    monkeypatch.setattr(inspect.getmodule(ops.Op), "_MEMO_LIMIT", 20)
    for size in range(1, 100):
        toy_split(ops.zeros((size,)))
    assert len(toy_split._plans) <= 40


def test_nothing_to_compute_is_no_launch():
    assert toy_unbuilt(ops.empty((0, 8))).shape == (0, 8)


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
    with pytest.raises(ops.OpError, match="toy_double.use takes a Kernel, a PrimFunc or a function, not int"):
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
            with toy_double.use(lambda x: 2 * x, where="nowhere"):
                toy_double(x)
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


def test_prepare_is_a_dry_run(x):
    model = Model(1, 24)
    given = ops.tensor(np.ones((3, 24), "float32"))
    compiled = ops.prepare(lambda: model(given), progress=False)
    assert not model.totals[0].numpy().any(), "nothing was launched"
    before = len(build.log)
    model(given)
    assert len(build.log) == before and compiled >= 0 and model.totals[0].numpy().any()


def test_an_op_says_what_it_is_when_its_declaration_is_wrong():
    with pytest.raises(TypeError, match=r"toy_wrong: writes= and symbolic= name \['y'\], which are no arguments"):

        @ops.op(symbolic={"y": "n"})
        def toy_wrong(x: ops.Tensor) -> ops.Tensor:
            return ops.like(x)

    with pytest.raises(TypeError, match=r"toy_wrong: x must be annotated as Tensor, int or float"):

        @ops.op()
        def toy_wrong(x) -> ops.Tensor:
            return ops.like(x)

    @ops.op()
    def toy_plain(x: ops.Tensor, y: ops.Tensor | None, n: int) -> ops.Tensor:  # annotations that are no strings
        return ops.like(x)

    assert toy_plain.spec(Spec((2,), "int8"), None, 3) == Spec((2,), "int8")
    with pytest.raises(ops.KernelError, match=r"toy_plain has no kernel; register one with @toy_plain.kernel"):
        toy_plain(ops.zeros((2,)), None, 3)
    with pytest.raises(ops.OpError, match="toy_plain has no reference; register one with @toy_plain.reference"):
        toy_plain.reference(1, 2)


def test_calls_that_a_tool_keeps_hold_their_tensors(x):
    seen = Recorder()
    with ops.intercepted(seen):
        Model(1)(x)
    kept = seen.calls[2].args[0].numpy().copy()
    gc.collect()
    for _ in range(50):
        Model(1)(x)
    np.testing.assert_array_equal(seen.calls[2].args[0].numpy(), kept)
