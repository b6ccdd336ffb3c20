"""Whole models on devices: the same story, and the same tools, as on the CPU."""

from __future__ import annotations

import numpy as np
import pytest

import debug
import llm
import ops
from ops import build
from ops.languages import cuda_driver
from tests.ops import cuda_stub

cuda_stub.install()
DEVICES = ("emulate", *(["cuda"] if cuda_driver.device() else []))
pytestmark = pytest.mark.gpu
PROMPT = "Once upon a time"


@pytest.fixture(scope="module", params=DEVICES)
def model(request):
    return llm.load("tiny", device=request.param)


@pytest.fixture(scope="module")
def here():
    return llm.load("tiny")


def test_the_story_is_the_same(model, here):
    assert {weight.device for _, weight in model.parameters()} == {model.device}
    wanted = here.generate(PROMPT, max_tokens=12)
    assert model.generate(PROMPT, max_tokens=12) == wanted
    compiled = len(build.log)
    assert model.generate(PROMPT, max_tokens=12) == wanted and len(build.log) == compiled


def test_logits_and_caches(model, here):
    ids = here.tokenizer.encode(PROMPT)
    cache, other = model.new_cache(), here.new_cache()
    assert cache.device == model.device
    given, wanted = model(ids, cache).numpy(), here(ids, other).numpy()
    assert np.abs(given - wanted).max() <= 1e-4 * np.abs(wanted).max()
    twin = cache.copy()
    twin.truncate(len(ids) - 2)
    assert np.allclose(model(ids[-2:], twin).numpy(), given[-2:], atol=1e-4)
    assert np.allclose(model([3], cache).numpy(), here([3], other).numpy(), atol=1e-3)


def test_packed_weights(model):
    packed = [llm.load("tiny", weights="q4").to(name) for name in ("cpu", model.device)]
    first, second = (each(packed[0].tokenizer.encode(PROMPT)).numpy() for each in packed)
    assert np.abs(first - second).max() <= 1e-2 * np.abs(first).max()  # a value may be rounded to the next step


def test_tools_look_at_it(model):
    ids = model.tokenizer.encode("The cat sat")
    with debug.trace(keep=True) as t:
        model(ids)
    with debug.trace(keep=True) as again:
        model(ids)
    first = t.records[0]
    [seen] = first.statistics
    assert first.outputs[0].device == model.device and seen is not None
    assert seen.seen == len(ids) * model.config.hidden_size
    assert [each.statistics for each in t.records] == [each.statistics for each in again.records]
    with debug.check() as c:
        model(ids)
    assert not c.culprits, str(c)
    with debug.nan_hunt() as h:
        model(ids)
    assert h.birth is None
    with debug.patch("layers.1.mlp/silu_mul", lambda y: y * 0) as patched:
        changed = model(ids).numpy().copy()
    assert patched.hits and not np.array_equal(changed, model(ids).numpy())
    with debug.profile() as p:
        model(ids)
    assert "linear" in str(p)


def test_it_moves_and_is_saved(model, here, tmp_path):
    folder = model.save(tmp_path / "saved")
    again = llm.load(folder, device=model.device)
    ids = [5, 6, 7]
    assert np.array_equal(again(ids).numpy(), model(ids).numpy())
    back = again.to("cpu")
    assert back is again and back.device == "cpu" and np.array_equal(back(ids).numpy(), here(ids).numpy())


def test_a_tensor_of_the_cpu_is_refused(model):
    x = ops.zeros((1, model.config.hidden_size))
    with pytest.raises(ops.OpError, match=rf"x is on 'cpu' and weight on '{model.device}'"):
        model.layers[0].mlp(x)
