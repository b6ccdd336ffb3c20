"""The embedded model, every op of it by the kernel that is generated for a GPU, run without one: the same story."""

from __future__ import annotations

import pytest

import llm
from ops import Kernel, target
from ops.call import raw
from ops.languages import cuda, hosted
from ops.op import registry

pytestmark = pytest.mark.gpu


def kernel_of(op):
    """The op's kernel in CUDA, emulated: made for each range of sizes when it is first called for."""
    made = {}

    def launch(call, outputs):
        arguments = op._request(call.args, call.constants).arguments
        if arguments not in made:
            with target.building_for_gpu("cuda", "sm_75"):
                launcher = hosted.programs(lambda source, parameters: cuda.emulated(source, parameters, ()))
                made[arguments] = hosted.of(op, call.args, call.constants, launcher)
        made[arguments](*raw(call.args), *[each.buffer.data for each in outputs])

    return Kernel(f"{op.name}_cuda", "cuda emulated", launch)


@pytest.mark.parametrize("dtype", ["float32"])
def test_the_story_is_the_same(dtype):
    model = llm.load("tiny", dtype=dtype)
    prompt = "Once upon a time"
    wanted = model.generate(prompt, max_tokens=12)
    uses = [op.use(kernel_of(op)) for op in registry.values() if op.__module__.startswith("ops.")]
    try:
        assert model.generate(prompt, max_tokens=12) == wanted
    finally:
        for each in uses:
            each.remove()
    hit = {each.op.name for each in uses if each.hits}
    assert {"rms_norm", "linear", "rope", "attention", "cache_write", "silu_mul", "add", "embedding"} <= hit
