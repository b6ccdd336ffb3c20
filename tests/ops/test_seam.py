"""Every tool is made of what is tested here: each test is a small tool, at work on a model that knows none of them."""

import gc
import inspect

import numpy as np
import pytest

import ops
from ops import Dim, Interceptor, Spec, build
from ops import scope as scopes

from .toys import Model, Recorder, toy_double, toy_split, toy_unbuilt

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
    assert first.scope.module is model.layers[1] and first.scope.parent and first.scope.parent.module is model
    assert first.scope.args[0].spec is x.spec and first.scope.constants == {"fail": False}
    assert repr(first.scope) == f"<layers.1 in pass {first.scope.number}>"


def test_a_call_knows_the_line_of_the_model(x):
    class Lines(Interceptor):
        def __init__(self):
            self.found = []

        def call(self, call, launch):
            def ask():
                return call.source, call.frame and call.frame.f_code.co_name

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
        (ops.zeros((3, 7)), r"Bad.call gave float32\[3, 7\], expected float32\[3, 8\]"),
        (ops.zeros((3, 8), "float16"), r"Bad.call gave float16\[3, 8\], expected float32\[3, 8\]"),
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


def test_calls_that_a_tool_keeps_hold_their_tensors(x):
    seen = Recorder()
    with ops.intercepted(seen):
        Model(1)(x)
    kept = seen.calls[2].args[0].numpy().copy()
    gc.collect()
    for _ in range(50):
        Model(1)(x)
    np.testing.assert_array_equal(seen.calls[2].args[0].numpy(), kept)
