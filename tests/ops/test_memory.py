import gc
import threading

import numpy as np
import pytest

import ops
from debug.poison import poison
from ops import memory
from ops.spec import Spec

from .harness import random

SHAPE = (29, 31)


@pytest.fixture(autouse=True)
def empty_pool():
    gc.collect()
    memory.clear()


def churn(times: int = 20) -> None:
    """Allocate, fill and release memory of the same spec, several at once."""
    for i in range(times):
        tensors = [ops.empty(SHAPE) for _ in range(3)]
        for each in tensors:
            each.numpy()[...] = -1000 - i


HOLDERS = {
    "tensor": lambda x: x,
    "view": lambda x: x[3:7],
    "view of a view": lambda x: x[3:].reshape(-1)[5:9],
    "reshaped": lambda x: x.reshape(-1),
    "numpy of a reshaped": lambda x: x.reshape(-1).numpy(),
    "dlpack of what was reshaped twice": lambda x: np.from_dlpack(x.reshape(-1).reshape(31, 29)),
    "numpy": lambda x: x.numpy(),
    "slice of numpy": lambda x: x.numpy()[::3, 1:],
    "asarray": lambda x: np.asarray(x),
    "numpy of a view": lambda x: x[2:4].numpy(),
    "dlpack": lambda x: np.from_dlpack(x),
    "dlpack capsule": lambda x: x.__dlpack__(),
    "a tensor over its numpy": lambda x: ops.tensor(x.numpy()),
    "row by iteration": lambda x: list(x)[-1],
}


def values_of(held: object) -> np.ndarray:
    if type(held).__name__ == "PyCapsule":

        class Once:
            def __dlpack__(self, **_):
                return held

            def __dlpack_device__(self):
                return (1, 0)

        return np.from_dlpack(Once())  # type: ignore[arg-type]
    return np.asarray(held)


@pytest.mark.parametrize("holder", HOLDERS)
def test_memory_that_is_still_referred_to_is_not_reused(holder):
    x = ops.zeros(SHAPE)
    held = HOLDERS[holder](x)
    del x
    churn()
    gc.collect()
    churn()
    assert (values_of(held) == 0).all()


def test_a_buffer_is_reshaped_once():
    x = ops.zeros(SHAPE)
    flat = x.reshape(-1)
    seen = flat.buffer
    assert x.reshape(-1).buffer is seen
    del flat
    x = ops.neg(x)  # whose kernel is ready now
    x.reshape(-1)
    buffer = x.buffer
    del x
    again = ops.empty(SHAPE)
    assert again.buffer is buffer
    assert len(buffer.views) == 1
    again.numpy()[...] = 3
    assert (again.reshape(-1).numpy() == 3).all()


@pytest.mark.parametrize("holder", [name for name in HOLDERS if name != "dlpack capsule"])
def test_memory_is_reused_or_freed_when_the_holder_is_gone(holder):
    x = ops.zeros(SHAPE)
    held = HOLDERS[holder](x)
    del held
    buffer_id = id(x.buffer)
    del x
    assert [id(each) for each in Spec(SHAPE, "float32").free] == [buffer_id]


def test_bfloat16_arrays_hold_their_memory():
    x = ops.zeros(SHAPE, "bfloat16")
    array = x.numpy()
    del x
    for _ in range(5):
        ops.empty(SHAPE, "bfloat16").numpy()[...] = 9
    assert (array.astype("float32") == 0).all()


def test_the_same_memory_comes_back():
    x = ops.empty(SHAPE)
    buffer = id(x.buffer)
    del x
    other, same = ops.empty(SHAPE, "int32"), ops.empty(SHAPE)
    assert id(same.buffer) == buffer and id(other.buffer) != buffer, "another spec, another buffer"


def test_no_allocation_in_steady_state(rng):
    x, weight = ops.tensor(random(rng, (4, 64), "float32")), ops.tensor(random(rng, (64,), "float32"))

    def step(x):
        for _ in range(5):
            x = ops.rms_norm(x, weight, eps=1e-5)
        return x

    step(x)
    gc.collect()  # the compiler keeps frames of the call that it was started from, until then
    step(x)
    before = memory.statistics()["allocations"]
    for _ in range(50):
        step(x)
    assert memory.statistics()["allocations"] == before


def test_idle_memory_is_limited(monkeypatch):
    monkeypatch.setattr(memory, "IDLE_LIMIT", 2**20)
    highest = 0
    for rows in range(1, 400):
        ops.empty((rows, 64))
        highest = max(highest, memory.idle_bytes())
    assert highest < 1.2 * 2**20
    held = [ops.empty((1000, 64)) for _ in range(10)]
    assert memory.idle_bytes() <= 2**20, "memory in use is not idle"
    del held
    assert memory.idle_bytes() >= 10 * 1000 * 64 * 4
    ops.empty((999, 64))
    assert memory.idle_bytes() <= 2**20


def test_clear_gives_idle_memory_back():
    x, y = ops.zeros(SHAPE), ops.empty(SHAPE)
    del y
    assert memory.statistics()["idle_bytes"] == x.nbytes
    memory.clear()
    assert memory.idle_bytes() == 0 and (x.numpy() == 0).all()


def test_too_much_says_how_much():
    with pytest.raises(MemoryError, match=r"no memory for int8\[4503599627370496\], 4503599627370496 bytes"):
        ops.empty((2**52,), "int8")


def test_a_finalizer_cannot_reach_memory_given_away():
    seen = []

    class Late:
        def __init__(self, x):
            self.x, self.me = x, self

        def __del__(self):
            seen.append(getattr(self.x, "buffer", None))

    late = Late(ops.zeros(SHAPE))
    late.x.numpy()[...] = 1
    del late
    gc.collect()
    assert len(seen) == 1
    assert seen[0] is None or not Spec(SHAPE, "float32").free


def test_two_threads_never_share_a_buffer():
    wrong, barrier = [], threading.Barrier(2)

    def work(mark: int) -> None:
        barrier.wait()
        for i in range(3000):
            x, y = ops.empty((8, 8)), ops.empty((8, 8))
            values = x.numpy()
            values[...] = mark
            y.numpy()[...] = -mark
            if i % 7 == 0:
                del values
            if not (x.numpy() == mark).all():
                wrong.append((mark, i))

    threads = [threading.Thread(target=work, args=(mark,)) for mark in (1, 2)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not wrong
    free = Spec((8, 8), "float32").free
    assert len({id(each) for each in free}) == len(free)


def test_two_threads_calling_ops(rng):
    weight = ops.tensor(random(rng, (64,), "float32"))
    inputs = [ops.tensor(random(rng, (3, 64), "float32")) for _ in range(2)]
    expected = [ops.rms_norm(x, weight, eps=1e-5).numpy().copy() for x in inputs]
    wrong = []

    def work(i: int) -> None:
        for _ in range(2000):
            if not np.array_equal(ops.rms_norm(inputs[i], weight, eps=1e-5).numpy(), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not wrong


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
def test_what_is_poisoned_is_what_the_next_output_starts_from(dtype):
    spec = ops.Spec((3, 5), dtype)
    poison(spec)
    values = ops.empty(spec.shape, dtype).numpy()
    assert (np.isnan(values.astype("float32")) if dtype != "int32" else values == np.iinfo("int32").min).all()
