"""Tensors and ops on devices: "emulate" everywhere, "cuda" where there is a GPU, or a stub of its driver."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from tvm.script import tirx as T

import ops
from ops import build, cross, device, target
from ops.languages import cuda_driver, nvrtc
from ops.spec import FLOATS
from ops.tolerance import KERNEL, relative_error

from . import cuda_stub

cuda_stub.install()
DEVICES = ("emulate", *(["cuda"] if cuda_driver.device() else []))
pytestmark = pytest.mark.gpu


@pytest.fixture(params=DEVICES)
def on(request):
    return request.param


def there(rng, on, *shape, dtype="float32"):
    return ops.tensor(rng.standard_normal(shape, "float32"), dtype, device=on)


@pytest.mark.parametrize("dtype", [*FLOATS, "int32", "q4", "q8"])
def test_there_and_back(rng, on, dtype):
    here = ops.tensor((rng.standard_normal((6, 64)) * 9).astype("int32" if dtype == "int32" else "float32"), dtype)
    moved = here.to(on)
    assert (moved.device, moved.shape, moved.dtype) == (on, here.shape, dtype) and moved.to(on) is moved
    for each in (moved, copy.deepcopy(moved), pickle.loads(pickle.dumps(moved))):
        assert each.device == on and np.array_equal(each.numpy(), here.numpy())
    back = moved.to("cpu")
    assert back.device == "cpu" and np.array_equal(back.numpy(), here.numpy())
    assert on in repr(moved)


def test_views_and_memory(rng, on):
    x = there(rng, on, 5, 8)
    assert x[2:4].device == x.reshape(8, 5).device == on
    x[1].numpy()[...] = 7.0  # NumPy shares the memory, here as on the CPU
    assert (ops.copy(x).numpy()[1] == 7.0).all()
    assert x.on_cpu().device == "cpu" and np.shares_memory(x.on_cpu().numpy(), x.numpy())
    assert ops.zeros((3,), device=on).numpy().tolist() == [0, 0, 0] and ops.empty((0, 4), device=on).numpy().size == 0


def calls(rng, on):
    """A few ops at odd sizes, each with its arguments."""
    x, positions = there(rng, on, 3, 48), ops.tensor(np.array([4, 5, 6], "int32"), device=on)
    q, k = there(rng, on, 3, 4, 8), there(rng, on, 7, 2, 8)
    yield ops.rms_norm, (x, there(rng, on, 48)), {"eps": 1e-5}
    yield ops.silu_mul, (x, there(rng, on, 3, 48)), {}
    yield ops.linear, (x[:1], there(rng, on, 33, 48)), {}
    yield ops.linear, (there(rng, on, 19, 64), there(rng, on, 32, 64, dtype="q4")), {}
    yield ops.rope, (q, positions, there(rng, on, 4)), {}
    yield ops.attention, (q, k, k, positions), {"scale": 0.3}
    yield ops.embedding, (positions, there(rng, on, 9, 48)), {}
    yield ops.cache_write, (k, there(rng, on, 3, 2, 8), positions), {}
    yield ops.argmax, (x,), {}
    yield ops.top_k, (x,), {"k": 5}


def test_ops_compute_what_they_are(rng, on):
    for op, args, constants in calls(rng, on):
        expected = op.reference(*[copy.deepcopy(each) for each in args], **constants)
        given = op(*args, **constants)
        results = [*(given if isinstance(given, tuple) else () if given is None else (given,))]
        results += [each for name, each in zip(op.parameters, args, strict=False) if name in op.writes]
        wanted = expected if isinstance(expected, tuple) else (expected,)
        for result, right in zip(results, wanted, strict=True):
            assert result.device == on
            assert relative_error(result.numpy(), right) <= KERNEL.get(result.dtype, 0.0), op.name


def test_results_go_on_into_other_ops(rng, on):
    """What the CPU reads between is there, and what it wrote."""
    x = there(rng, on, 4, 32)
    first = ops.add(x, x)
    first.numpy()[0] = 1.0
    assert np.array_equal(ops.scale(first, 3.0).numpy(), first.numpy() * np.float32(3))
    ids = ops.argmax(first)  # numbers that a kernel wrote, which the next call checks
    table = there(rng, on, 32, 6)
    assert np.array_equal(ops.embedding(ids, table).numpy(), table.numpy()[ids.numpy()])
    chain = x
    for _ in range(8):  # buffers of the pool are used again while kernels wait for their turn
        chain = ops.scale(chain, 0.5)
    assert np.array_equal(chain.numpy(), x.numpy() * np.float32(0.5**8))


def test_numbers_out_of_range(rng, on):
    table = there(rng, on, 9, 4)
    with pytest.raises(ops.KernelError, match="embedding"):
        ops.embedding(ops.tensor(np.array([9], "int32"), device=on), table)
    with pytest.raises(ops.KernelError):
        ops.cache_write(there(rng, on, 4, 2, 8), there(rng, on, 1, 2, 8), ops.integer(4, on))


def test_what_kernels_for_gpus_take_for_granted(rng, on):
    with pytest.raises(ops.KernelError, match="no multiple of 16 bytes"):
        ops.silu(there(rng, on, 9)[1:])


def test_tensors_from_another_machine():
    spec = ops.Spec((2,), "float32", "cuda")
    assert device.here(spec) is (spec if "cuda" in DEVICES else spec.on("cpu"))
    assert device.here(spec.on("emulate")).device == "emulate"


def test_one_device_a_call(rng, on):
    x, weight = there(rng, on, 1, 8), there(rng, "cpu", 8)
    with pytest.raises(ops.OpError, match=rf"x is on '{on}' and weight on 'cpu'.*weight\.to\('{on}'\)"):
        ops.rms_norm(x, weight, eps=1e-5)


@T.prim_func(s_tir=True)
def relu_kernel(x_: T.handle, out_: T.handle):
    X, Y = T.match_buffer(x_, (3, 40), "float32", align=4), T.match_buffer(out_, (3, 40), "float32", align=4)
    for i, k in T.grid(3, 40):
        with T.sblock("relu"):
            vi, vk = T.axis.remap("SS", [i, k])
            Y[vi, vk] = T.max(X[vi, vk], T.float32(0))


def relu_tir():
    return relu_kernel


def test_swaps_see_its_memory(rng, on):
    """A kernel of Python, of TVMScript, of C and of CUDA, each for the calls of the device."""
    x = there(rng, on, 3, 40)
    wanted = np.maximum(x.numpy(), 0)

    def relu(x):
        return np.maximum(x, 0)

    def relu_c():
        return "for (int i = 0; i < rows * width; i++) out[i] = x[i] > 0 ? x[i] : 0;"

    def relu_cuda():
        return "int i = blockIdx.x * 32 + threadIdx.x; if (i < rows * width) out[i] = x[i] > 0 ? x[i] : 0;"

    for language, given, more in (
        ("python", relu, {}),
        ("tvmscript", relu_tir, {}),
        ("c", relu_c, {}),
        ("cuda", relu_cuda, {"grid": lambda x: -(-x.size // 32), "block": 32}),
    ):
        for check in ("always", "never"):  # what is compared is waited for
            swap = ops.relu.swap(language, where=f"/relu device={on}", check=check, **more)(given)
            with swap.active():
                for _ in range(3):
                    assert np.array_equal(ops.relu(ops.copy(x)).numpy(), wanted), language
            assert swap.hits == 3
            swap.remove()
    with ops.relu.use(relu_tir()):
        assert np.array_equal(ops.relu(ops.copy(x)).numpy(), wanted)


def test_race(rng, on):
    race = ops.silu.race(there(rng, on, 4, 32))
    assert {"own", "reference"} <= {each.name for each in race.contenders if each.right}


def test_kernels_are_logged_once(rng, on):
    weight, eps = there(rng, on, 24), float(np.random.default_rng().random())  # in no disk cache, on any draw
    for rows in (3, 4):
        ops.rms_norm(there(rng, on, rows, 24), weight, eps=eps)
    made = [each for each in build.log if each.op == "rms_norm" and repr(eps) in each.specs]
    assert [each.reason for each in made] == [f"for {on}"]


def test_devices_that_are_not_there():
    with pytest.raises(ops.OpError, match="no device 'tpu'; there are cpu, cuda, emulate"):
        ops.zeros((1,), device="tpu")
    with pytest.raises(ops.OpError, match="Metal's kernels are generated and emulated"):
        ops.tensor([1.0], device="metal")
    if cuda_driver.device() is None:
        with pytest.raises(ops.OpError, match=r'device "cuda": .*; device "emulate" has the CPU run the same kernels'):
            ops.tensor([1.0]).to("cuda")


if "cuda" in DEVICES:

    class TestCuda:
        def test_kernels_wait_in_the_cache_for_their_gpu(self):
            """What was built on a machine without the GPU is what a call on it asks the cache for."""
            with target.building_for_gpu("cuda", device.find("cuda").gpu.arch):
                built = cross.built(elsewhere := ops.neg._request((ops.zeros((3, 8)),), {}))
                key = elsewhere.key
            assert ops.neg._request((ops.zeros((3, 8), device="cuda"),), {}).key == key
            assert built.functions and "define" in built.host

        def test_memory_that_is_not_there(self):
            with pytest.raises(MemoryError, match="no memory for float32"):
                ops.empty((2**40,), device="cuda")

        @pytest.mark.parametrize("order", [("cuda", "emulate"), ("emulate", "cuda")], ids="-".join)
        def test_an_emulated_gpu_beside_it(self, rng, order):
            """Kernels of one key and two kinds of machine code."""
            width = 20 + order.index("cuda")
            for each in order:
                x = there(rng, each, 4, width)
                assert np.array_equal(ops.neg(ops.copy(x)).numpy(), -x.numpy())

        def test_large_tensors_are_sent_ahead(self, rng):
            x = there(rng, "cuda", 300, 300)
            assert x.numpy().shape == (300, 300) and x.numpy()[299, 299] == x.to("cpu").numpy()[299, 299]

        def test_memory_is_given_back(self):
            found: Any = device.find("cuda")
            freed = []
            original, found.free = found.free, lambda address: (freed.append(address), original(address))
            try:
                ops.empty((77, 3), device="cuda")
                ops.memory.clear()
            finally:
                del found.free
            assert freed


@pytest.mark.skipif(cuda_driver.device() is not None, reason="there is a GPU, or the stub already")
@pytest.mark.skipif(not nvrtc.available(), reason="needs the extra cuda")
def test_over_a_stub_of_the_driver(tmp_path):
    """These tests, and those of models, on "cuda", in a process that finds a driver."""
    environment = cuda_stub.environment(cuda_stub.build(tmp_path))
    files = ["tests/ops/test_device.py", "tests/llm/test_on_device.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "gpu", "-k", "cuda or Cuda", *files]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " skipped" not in done.stdout and int(done.stdout.split(" passed")[0].split()[-1]) >= 27, done.stdout
