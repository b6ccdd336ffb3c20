"""Swaps: hand-written kernels in the place of an op's own, by the languages that need no compiler."""

import importlib.util
import re
import threading
import time

import numpy as np
import pytest
from tvm.script import tirx as T

import ops
from ops import SelectorError, SwapRefused, SwapWarning, select
from ops.verify import Schedule

from .harness import random
from .toys import Model, toy_add_to, toy_double


@pytest.fixture(autouse=True)
def restored():
    yield
    ops.restore()


def norm(x, weight, *, eps, plus_one=False):
    x = x.astype("float64")
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * (weight.astype("float64") + plus_one)


def test_a_swap_computes_and_tells(x):
    @toy_double.swap("python", where="layers.0")
    def mine(x):
        return x + x

    model = Model()
    model(x)
    assert mine.hits == 2 and mine.state == "checking" and mine.checked == 2
    listing = repr(toy_double.swaps)
    assert re.search(r"mine +toy_double +python +'layers.0' +checking +2 +2", listing), listing
    for _ in range(6):
        model(x)
    assert mine.state == "in use" and mine.trial.timed == 6 and mine.checked == 8
    np.testing.assert_array_equal(toy_double(x).numpy(), 2 * x.numpy())
    mine.remove()
    mine.remove()
    model(x)
    assert mine.hits == 14 and mine.state == "removed" and not toy_double._uses


def test_the_last_one_wins_and_the_same_name_replaces(x):
    counts = dict.fromkeys("abc", 0)

    def make(name, key, **options):
        def kernel(x):
            counts[key] += 1
            return 2 * x

        kernel.__name__ = name
        return toy_double.swap("python", **options)(kernel)

    first, second = make("one", "a"), make("two", "b")
    toy_double(x)
    assert counts == {"a": 0, "b": 1, "c": 0}
    assert toy_double.swaps.column("name") == ["two", "one"], "the first to be asked at the top"
    third = make("two", "c")
    toy_double(x)
    assert counts == {"a": 0, "b": 1, "c": 1} and second.state == "replaced"
    assert toy_double.swaps.column("name") == ["two", "one"]
    third.remove()
    toy_double(x)
    assert counts["a"] == 1 and first.hits == 1


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_edge_cases_in_the_first_place(dtype):
    swap = ops.rms_norm.swap("python", where=f"/rms_norm dtype={dtype}")(norm)
    assert bool(swap.checked) == (dtype == "float32"), "a kernel that names no dtype is tried in float32"
    with pytest.raises(SelectorError, match="was removed, and had not been used"):
        swap.remove()


def test_a_wrong_kernel_is_refused_at_installation():
    def forgot(x, weight, *, eps, plus_one=False):
        return norm(x, weight, eps=eps)

    worst = r"plus_one=True\): error .* instead of .* at \[.*, allowed 1e-05\n  x\[\d+\]: \[.*weight: \["
    with pytest.raises(SwapRefused, match=r"(?s)forgot is wrong on an edge case: output of rms_norm\(.*" + worst):
        ops.rms_norm.swap("python")(forgot)
    assert not ops.rms_norm._uses


def test_a_wrong_kernel_is_refused_at_its_first_call(rng):
    x, weight = ops.tensor(random(rng, (3, 8), "float32")), ops.tensor(random(rng, (8,), "float32"))

    @ops.rms_norm.swap("python", edge_cases=False)
    def unnormed(x, weight, *, eps, plus_one=False):
        return x * weight

    with pytest.raises(SwapRefused, match="unnormed is wrong at its first call, and was removed: output of rms_norm"):
        ops.rms_norm(x, weight, eps=1e-6)
    assert unnormed.state == "refused"
    np.testing.assert_allclose(
        ops.rms_norm(x, weight, eps=1e-6).numpy(), norm(x.numpy(), weight.numpy(), eps=1e-6), rtol=1e-4
    )


def test_a_later_mistake_puts_it_in_quarantine_for_its_shapes(rng):
    x, wide = (ops.tensor(random(rng, shape, "float32")) for shape in ((3, 8), (3, 9)))
    wrong = False

    @toy_double.swap("python", check="first 1, then 1/3")
    def moody(x):
        return x if wrong and x.shape[1] == 8 else 2 * x

    toy_double(x)
    wrong = True
    for _ in range(2):
        np.testing.assert_array_equal(toy_double(x).numpy(), x.numpy())  # not sampled: nobody knows yet
    with pytest.warns(SwapWarning, match=r"moody is wrong, and toy_double's own kernel computes such calls again: "
                      r"output of toy_double\(x=float32\[3, 8\]\): error 0.5"):  # fmt: skip
        np.testing.assert_array_equal(toy_double(x).numpy(), 2 * x.numpy())
    assert moody.state == "quarantined for (float32[3, 8])"
    for _ in range(5):
        np.testing.assert_array_equal(toy_double(x).numpy(), 2 * x.numpy())
    np.testing.assert_array_equal(toy_double(wide).numpy(), 2 * wide.numpy())
    assert moody.hits == 10 and "quarantined for (float32[3, 8])" in repr(toy_double.swaps)


def test_what_a_wrong_kernel_wrote_is_put_back(rng):
    total, x = (random(rng, shape, "float32") for shape in ((3, 8), (8,)))
    wrong = False

    @toy_add_to.swap("python", check="always")
    def add(total, x, position):
        total = total.copy()
        total[position] += 7 * x if wrong else x
        return total

    mine = ops.tensor(total.copy())
    toy_add_to(mine, ops.tensor(x), 1)
    wrong = True
    with pytest.warns(SwapWarning, match="total of toy_add_to"):
        toy_add_to(mine, ops.tensor(x), 1)
    total[1] += x
    total[1] += x
    np.testing.assert_allclose(mine.numpy(), total, rtol=1e-6)


def test_scopes(x):
    @toy_double.swap("python", active=False)
    def scoped(x):
        return 2 * x

    toy_double(x)
    assert scoped.hits == 0 and scoped.state == "disabled"
    with scoped.active() as swap:
        toy_double(x)
        other = threading.Thread(target=toy_double, args=(x,))
        other.start()
        other.join()
    assert swap is scoped and scoped.hits == 1, "another thread is not in this `with`"
    with pytest.raises(SelectorError, match="no call of toy_double in this `with` was meant"), scoped.active():
        pass
    scoped.enable()
    toy_double(x)
    scoped.disable()
    toy_double(x)
    assert scoped.hits == 2
    with toy_double.swap("python")(lambda x: x + x) as named:
        toy_double(x)
    assert named.state == "removed"
    with pytest.raises(SelectorError, match="had not been used"), toy_double.swap("python")(lambda x: x + x):
        pass
    with pytest.raises(ZeroDivisionError), toy_double.swap("python")(lambda x: x + x) as failed:
        _ = 1 / 0
    assert failed.state == "removed"


def test_inside_one_module(x):
    model = Model()
    swap = toy_double.swap("python", where=select.Inside(model.layers[1]))(lambda x: 2 * x)
    model(x)
    model(x)
    assert swap.hits == 4 and repr(swap.where) == f"inside this {type(model.layers[1]).__name__}"


def test_restore_tells_what_was_there(x):
    toy_double.swap("python")(lambda x: 2 * x)
    toy_double(x)
    listing = ops.restore()
    assert listing.column("hits") == [1] and not toy_double._uses and len(toy_double.swaps) == 0


def imported(file):
    spec = importlib.util.spec_from_file_location("kernels", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FILE = """
import ops
from tests.ops.toys import toy_double

@toy_double.swap("python", check="first 2")
def edited(x):
    return {}
"""


def test_an_edited_file_replaces_the_kernel(x, tmp_path):
    file = tmp_path / "kernels.py"
    file.write_text(FILE.format("x + x"))
    module = imported(file)
    swap = module.edited
    toy_double(x)
    old = swap.kernel
    file.write_text("# a line more\n" + FILE.format("3 * x - x"))
    assert ops.reload() == [swap] and swap.kernel is not old
    toy_double(x)
    assert swap.hits == 2 and swap.state == "checking"
    file.write_text(FILE.format("3 * x"))
    right = swap.kernel
    with pytest.raises(SwapRefused, match="edited is wrong"):
        swap.edge_case = toy_double.examples(lambda rng, dtype: [((np.ones((2, 4), dtype),), {})])
        swap.reload()
    assert swap.kernel is right
    file.write_text(FILE.format("(3 * x - "))
    with pytest.raises(ops.KernelError, match=r"kernels\.py:\d: '\(' was never closed"):
        swap.reload()
    assert swap.kernel is right
    toy_double._examples = None


PRIMFUNC = """
from tvm.script import tirx as T
from tests.ops.toys import toy_double

WIDTH = 8

@toy_double.swap("tvmscript", check="first 2")
@T.prim_func(s_tir=True)
def doubled(x_: T.handle, out_: T.handle):
    n = T.int64()
    X = T.match_buffer(x_, (n, WIDTH), "float32", align=1)
    Y = T.match_buffer(out_, (n, WIDTH), "float32", align=1)
    for i, k in T.grid(n, WIDTH):
        with T.sblock("doubled"):
            vi, vk = T.axis.remap("SS", [i, k])
            Y[vi, vk] = {}
"""


def test_an_edited_primfunc_is_reloaded(x, tmp_path):
    file = tmp_path / "kernels.py"
    file.write_text(PRIMFUNC.format("X[vi, vk] + X[vi, vk]"))
    swap = imported(file).doubled
    assert swap.name == "doubled"
    toy_double(x)
    old = swap.kernel
    file.write_text("# a line more\n" + PRIMFUNC.format("X[vi, vk] * T.float32(2)"))
    assert ops.reload() == [swap] and swap.kernel is not old and "float32(2.0)" in str(swap.source())
    np.testing.assert_array_equal(toy_double(x).numpy(), 2 * x.numpy())
    for text, said in (("Z[vi, vk]", r"kernels\.py:\d+: "), ("X[vi, vk + 8]", "out of bounds")):
        right = swap.kernel
        file.write_text(PRIMFUNC.format(text))
        with pytest.raises(ops.KernelError, match=said):
            swap.reload()
        assert swap.kernel is right
    np.testing.assert_array_equal(toy_double(x).numpy(), 2 * x.numpy())


def test_a_file_is_looked_at_while_the_program_runs(x, tmp_path):
    file = tmp_path / "kernels.py"
    file.write_text(FILE.format("x + x"))
    module = imported(file)
    toy_double(x)
    before = module.edited.kernel
    file.write_text(FILE.format("x * 2"))
    time.sleep(0.3)
    toy_double(x)
    assert module.edited.kernel is not before
    file.write_text(FILE.format("x *"))
    time.sleep(0.3)
    with pytest.warns(
        SwapWarning, match="edited was edited, and the kernel from before stays in use: .*invalid syntax"
    ):
        toy_double(x)
    toy_double(x)  # told once


@pytest.mark.parametrize(
    ("text", "first", "every"),
    [("first 8, then 1/64", 8, 64), ("first 3", 3, 0), ("1/2", 0, 2), ("always", 0, 1), ("never", 0, 0)],
)
def test_which_calls_are_checked(text, first, every):
    schedule = Schedule.of(text)
    assert (schedule.first, schedule.every) == (first, every)
    meant = [i for i in range(first + 200) if schedule.means(i)]
    assert meant[:first] == list(range(first))
    assert len(meant) == first + (200 // every if every else 0)


@pytest.mark.parametrize("text", ["", "sometimes", "1/0", "first", 8, "first 8, then"])
def test_a_check_that_is_not_understood(text):
    with pytest.raises(ops.OpError, match=r"check is .*, expected 'first 8, then 1/64'"):
        toy_double.swap("python", check=text)


def test_what_no_swap_is(x):
    with pytest.raises(ops.OpError, match=r"the language is 'fortran', expected one of 'c', 'c\+\+', 'cuda'"):
        toy_double.swap("fortran")
    with pytest.raises(SwapRefused, match="a Python kernel has no grid, block or dims"):
        toy_double.swap("python", grid=3)(lambda x: x)
    with pytest.raises(
        SwapRefused, match="a TVMScript kernel of toy_double is a PrimFunc, or a function that gives one"
    ):
        toy_double.swap("tvmscript")(lambda: "text")


def double_of(width, dtype="float32", beyond=0):
    @T.prim_func(s_tir=True)
    def double(x_: T.handle, out_: T.handle):
        n = T.int64()
        X = T.match_buffer(x_, (n, width), dtype, align=1)
        Y = T.match_buffer(out_, (n, width), dtype, align=1)
        for i, k in T.grid(n, width):
            with T.sblock("double"):
                vi, vk = T.axis.remap("SS", [i, k])
                Y[vi, vk] = X[vi, vk + beyond] + X[vi, vk]

    return double


def test_tvmscript(x):
    swap = toy_double.swap("tvmscript")(double_of(8))
    np.testing.assert_array_equal(toy_double(x).numpy(), 2 * x.numpy())
    assert swap.hits == 1 and swap.kernel.dtypes == {"x": "float32", "out": "float32"}
    given = r"this call of toy_double has \(float32\[3, 9\], float32\[3, 9\]\); narrow the swap with where="
    said = r"double is wrong, .* again: .*double is made for \(X: float32\[n, 8\], Y: float32\[n, 8\]\), " + given
    with pytest.warns(SwapWarning, match=said):
        np.testing.assert_array_equal(toy_double(ops.zeros((3, 9))).numpy(), 0)
    swap.remove()
    toy_double.swap("tvmscript")(double_of(8))
    with pytest.raises(SwapRefused, match="double is wrong at its first call, and was removed: .*" + given):
        toy_double(ops.zeros((3, 9)))
    reaches = r"(?s)double reaches out of bounds: .*index vk \+ 1 with bounds .*\n  Y\[vi, vk\] = X\[vi, vk \+ 1\]"
    with pytest.raises(SwapRefused, match=reaches):
        toy_double.swap("tvmscript")(double_of(8, beyond=1))

    with pytest.raises(SwapRefused, match=r"no_silu is wrong on an edge case: output of silu\(x=float32\[1, 7\]\)"):

        @ops.silu.swap("tvmscript")
        def no_silu():
            return double_of(7)

    swap = ops.silu.swap("tvmscript", where="layers.0")(double_of(8))
    assert swap.checked == 0, "no edge case of silu has two sizes, the last one 8"
