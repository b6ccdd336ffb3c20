"""Swaps in CUDA in the embedded model, emulated where there is no GPU: the story, and a barrier that is missing."""

import pytest

import llm
import ops

TEXT = r"""
extern "C" __global__ void block_norm(const float* x, const float* weight, float* out,
                                      int width, float eps, bool plus_one) {
  __shared__ float part[64];
  int t = threadIdx.x, row = blockIdx.x;
  float s = 0;
  for (int i = t; i < width; i += blockDim.x) s += x[row * width + i] * x[row * width + i];
  part[t] = s;
  __syncthreads();
  for (int o = 32; o; o >>= 1) {
    if (t < o) part[t] += part[t + o];
    __syncthreads();
  }
  float k = rsqrtf(part[0] / width + eps);
  for (int i = t; i < width; i += blockDim.x)
    out[row * width + i] = x[row * width + i] * k * (weight[i] + (plus_one ? 1 : 0));
}"""


@pytest.fixture(autouse=True)
def restored():
    yield
    ops.restore()


def swapped(text, **options):
    @ops.rms_norm.swap("cuda", grid=lambda x, *_: x.shape[0], block=64, **options)
    def block_norm():
        return text

    return block_norm


def test_the_story_stays_the_same():
    model = llm.load("tiny", dtype="float32")
    wanted = model.generate("Once upon a time", max_tokens=20)
    swap = swapped(TEXT, where="layers.0-3.*", device="emulate")
    assert model.generate("Once upon a time", max_tokens=20) == wanted
    assert swap.hits == 8 * 20 and swap.state == "in use"
    assert "cuda emulated" in repr(ops.rms_norm.swaps), "that it was no GPU is said"


BROKEN = {
    "  part[t] = s;\n  __syncthreads();": (
        "  part[t] = s;",
        r"race on shared memory part\[32\] between threads .* of block \(0,0,0\): read .*:\d+, write .*:\d+; "
        r"a __syncthreads\(\) is missing",
    ),
    "out[row * width + i] =": ("out[row * width + i + 1] =", r"out\[\d+\] (written )?out of bounds|out\[\d+\]"),
    "s += x[row * width + i] * x[row * width + i]": ("s += x[row * width + i]", "output of rms_norm"),
    "for (int i = t; i < width; i += blockDim.x) s": ("for (int i = t; i <= width; i += blockDim.x) s", r"x\[\d+\]"),
}


@pytest.mark.parametrize("right", BROKEN)
def test_a_broken_twin_is_refused_and_named(right):
    wrong, said = BROKEN[right]
    assert TEXT.count(right) == 1
    with pytest.raises(ops.SwapRefused, match=rf"(?s)block_norm (on|is wrong on) an edge case.*({said})"):
        swapped(TEXT.replace(right, wrong), device="emulate")
    assert not ops.rms_norm._uses


def test_what_a_gpu_kernel_must_say():
    with pytest.raises(ops.SwapRefused, match="cuda asks for grid=, the number of blocks"):
        ops.rms_norm.swap("cuda")(block_norm)
    with pytest.raises(ops.SwapRefused, match="a kernel in cuda is called by the name of the function: use def"):
        ops.rms_norm.swap("cuda", grid=1)(lambda: TEXT)
    with pytest.raises(ops.SwapRefused, match="grid is 0, expected 1 to 3 whole numbers above 0"):
        ops.rms_norm.swap("cuda", grid=0)(block_norm)


def block_norm():
    return TEXT
