"""What a swap is trusted with: each kind of call is proven by itself, and nothing wrong stays in use."""

import warnings

import numpy as np
import pytest

import ops
from ops import SwapRefused, SwapWarning

from ..test_swap import imported

LOCAL = """
void mine(const float* x, float* out, int rows, int width) {
  float kept[4096];
  for (int i = 0; i < rows * width; i++) kept[i] = x[i] / (1 + expf(-x[i]));
  for (int i = 0; i < rows * width; i++) out[i] = kept[i];
}"""
FILE = """
import ops

@ops.silu.swap("c", edge_cases=False)
def mine():
    '''
    for (int i = 0; i < rows * width; i++) out[i] = {};
    '''
"""
SILU = "x[i] / (1 + expf(-x[i]))"


@pytest.fixture(autouse=True)
def restored():
    yield
    ops.restore()


def tensor(*shape):
    return ops.tensor(np.linspace(-2, 2, int(np.prod(shape)), dtype="float32").reshape(shape))


def right(x):
    np.testing.assert_allclose(ops.silu(x).numpy(), ops.silu.reference(x.numpy()), rtol=1e-5, atol=1e-6)


def swapped(text, **options):
    def mine():
        return text

    return ops.silu.swap("c", **options)(mine)


def test_a_proven_kernel_meets_a_size_that_it_cannot_do():
    swap = swapped(LOCAL)
    for _ in range(10):
        right(tensor(3, 8))
    with pytest.warns(SwapWarning, match=r"mine is wrong, .*: silu\(x=float32\[200, 100\]\).*kept|the stack"):
        right(tensor(200, 100))
    right(tensor(200, 100))
    right(tensor(3, 8))
    assert swap.state == "quarantined for (float32[200, 100])"


def test_each_kind_of_call_is_compared_once():
    calls = []

    @ops.silu.swap("python", edge_cases=False, check="first 2, then 1/1000")
    def mine(x):
        calls.append(x.shape)
        return ops.silu.reference(x) * (2 if x.shape[0] == 30 else 1)

    for _ in range(5):
        right(tensor(3, 8))
    with pytest.warns(SwapWarning, match=r"output of silu\(x=float32\[30, 8\]\)"):
        right(tensor(30, 8))
    right(tensor(30, 8))
    assert calls.count((30, 8)) == 1 and mine.checked == 3


def test_a_kernel_that_ignores_a_constant():
    @ops.rms_norm.swap("python", edge_cases=False)
    def fixed(x, weight, *, eps, plus_one=False):
        return ops.rms_norm.reference(x, weight, eps=1e-5, plus_one=plus_one)

    x, weight = ops.tensor(np.full((2, 8), 1e-3, "float32")), ops.tensor(np.ones(8, "float32"))
    ops.rms_norm(x, weight, eps=1e-5)
    with pytest.warns(SwapWarning, match="eps=1e-06"):
        ops.rms_norm(x, weight, eps=1e-6)
    ops.rms_norm(x, weight, eps=1e-5)
    assert len(fixed.trial.quarantined) == 1 and fixed.hits == 3


def test_a_reload_that_is_wrong_at_its_first_call_is_rolled_back(tmp_path):
    file = tmp_path / "kernels.py"
    file.write_text(FILE.format(SILU))
    swap = imported(file).mine
    right(tensor(3, 8))
    kernel = swap.kernel
    file.write_text(FILE.format("2 * x[i]"))
    assert swap.reload()
    with pytest.warns(SwapWarning, match="mine was edited, and is wrong: the kernel from before is in use again"):
        right(tensor(3, 8))
    assert swap.kernel is kernel
    right(tensor(3, 8))
    file.write_text(FILE.format(f"1 * ({SILU})"))
    assert swap.reload()
    right(tensor(3, 8))
    assert swap.kernel is not kernel and swap.state == "checking"


def test_a_warning_is_given_each_time(tmp_path):
    file = tmp_path / "kernels.py"
    file.write_text(FILE.format(SILU))
    swap = imported(file).mine
    right(tensor(3, 8))
    for _ in range(2):
        file.write_text(FILE.format("2 * x[i]"))
        swap.reload()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("default")
            right(tensor(3, 8))
        assert len(told) == 1 and told[0].filename == str(file)
        file.write_text(FILE.format(SILU))


def test_a_file_that_is_gone(tmp_path):
    file = tmp_path / "kernels.py"
    file.write_text(FILE.format(SILU))
    swap = imported(file).mine
    file.unlink()
    with pytest.raises(ops.KernelError, match=r"kernels\.py has no function mine any more"):
        swap.reload()
    right(tensor(3, 8))


def test_two_functions_of_one_name(tmp_path):
    file = tmp_path / "kernels.py"
    other = FILE.replace("silu", "neg").replace("import ops\n", "")
    file.write_text(FILE.format(SILU) + other.format("-x[i]"))
    imported(file)
    file.write_text("\n" * 12 + FILE.format(f"1 * ({SILU})") + other.format("0 - x[i]"))
    assert len(ops.reload()) == 2
    right(tensor(3, 8))
    np.testing.assert_array_equal(ops.neg(tensor(3, 8)).numpy(), -tensor(3, 8).numpy())


def test_the_same_name_elsewhere_is_another_swap():
    first, second = (swapped(LOCAL, where=f"layers.{i}") for i in (0, 1))
    assert [each.state for each in (first, second)] == ["checking"] * 2
    again = swapped(LOCAL, where="layers.0")
    assert first.state == "replaced" and second.state == again.state == "checking"


def test_what_is_never_checked_runs_here():
    swap = swapped(LOCAL, check="never")
    for _ in range(3):
        right(tensor(3, 8))
    assert swap.state == "in use" and (swap.trial.microseconds or 0) < 2000


def test_a_whole_number_for_a_float_and_no_rows():
    text = "void mine(const float* x, float* out, int rows, int width, float factor) {\n"
    text += "for (int i = 0; i < rows * width; i++) out[i] = x[i] * factor; }"

    def mine():
        return text

    ops.scale.swap("c")(mine)
    np.testing.assert_array_equal(ops.scale(tensor(3, 8), 2).numpy(), 2 * tensor(3, 8).numpy())
    cuda = 'extern "C" __global__ void mine(const float* x, float* out, int width) {\n'
    cuda += "int i = blockIdx.x * width + threadIdx.x; if (threadIdx.x < width) out[i] = -x[i]; }"

    def negated():
        return cuda.replace("mine", "negated")

    ops.neg.swap("cuda", grid=lambda x: x.shape[0], block=64, edge_cases=False, device="emulate")(negated)
    assert ops.neg(ops.zeros((0, 8))).shape == (0, 8)
    np.testing.assert_array_equal(ops.neg(tensor(3, 8)).numpy(), -tensor(3, 8).numpy())


def test_packed_weights_are_verified_on_edge_cases_too():
    def mine():
        return "void mine(const float* x, const uint8_t* weight, float* out) { out[0] = 7; }"

    with pytest.raises(SwapRefused, match=r"mine is wrong on an edge case: output of linear\(.*q[48]"):
        ops.linear.swap("c", where=lambda call: call.inputs["weight"].spec.format is not None)(mine)


@pytest.mark.parametrize("decorated", [int, "text", 3])
def test_what_holds_no_text(decorated):
    with pytest.raises(SwapRefused, match="a kernel in c is called by the name of the function: use def, not"):
        ops.silu.swap("c")(decorated)
    with pytest.raises(ops.KernelError, match="mine has parameters; what gives the text of a kernel is called without"):

        @ops.silu.swap("c")
        def mine(given):
            return LOCAL
