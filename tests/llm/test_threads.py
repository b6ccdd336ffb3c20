"""Models that generate at once from several Python threads, and what a model costs when it does not."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import ops
from ops.quantize import FORMATS

from . import small

PROMPTS = ("Once", "The quick brown fox", "x" * 40)
ROUNDS = 3


def at_once(*runs: Callable[[], Any]) -> list[Any]:
    """What each run gives, all started at the same moment from a thread of their own."""
    barrier, results, errors = threading.Barrier(len(runs)), [None] * len(runs), []

    def work(i: int) -> None:
        try:
            barrier.wait()
            results[i] = runs[i]()
        except BaseException as error:  # raised again below
            errors.append(error)

    made = [threading.Thread(target=work, args=(i,)) for i in range(len(runs))]
    for each in made:
        each.start()
    for each in made:
        each.join(120)
    if errors:
        raise errors[0]
    assert not any(each.is_alive() for each in made)
    return results


def tell(model: Any, seed: int, cache: Any = None) -> list[tuple[list[int], list[float]]]:
    """Tokens and log-probabilities of texts from every prompt, greedy and sampled."""
    made = []
    for i, prompt in enumerate(PROMPTS):
        for options in ({}, {"temperature": 1.2, "top_p": 0.95, "seed": seed + i}):
            if cache is not None:
                cache.truncate(0)
            text = model.generate(prompt, max_tokens=16, cache=cache, **options)
            made.append((text.tokens, text.logprobs))
    return made


@pytest.fixture(params=(*ops.spec.FLOATS, *FORMATS))
def models(request, rng) -> list[Any]:
    """Two of the same shapes, so that they share kernels and buffers, and one whose kernels run on all threads.

    Packed ones have a float16 cache.
    """
    wide = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    dtype = request.param if request.param in ops.spec.FLOATS else "float32"
    models = [small.model(rng, dtype) for _ in range(2)] + [small.model(rng, dtype, **wide)]
    for model in models if request.param in FORMATS else ():
        model.cache_dtype = "float16"
        for name, weight in list(model.parameters()):
            if weight.ndim == 2:
                model.set_parameter(name, ops.tensor(weight, request.param))
    return models


def test_models_at_once_say_what_they_say_alone(models, rng):
    for _ in range(ROUNDS):
        seeds = [int(rng.integers(2**31)) for _ in models]
        alone = [tell(model, seed) for model, seed in zip(models, seeds, strict=True)]
        together = at_once(
            *(lambda model=model, seed=seed: tell(model, seed) for model, seed in zip(models, seeds, strict=True))
        )
        assert together == alone


def test_one_model_with_a_cache_for_each_thread(models, rng):
    model = models[0]
    pairs = [(int(rng.integers(2**31)), model.new_cache()) for _ in range(3)]
    alone = [tell(model, seed) for seed, _ in pairs]
    for _ in range(ROUNDS):
        assert at_once(*(lambda pair=pair: tell(model, *pair) for pair in pairs)) == alone


def test_big_kernels_at_once(rng):
    """All of them run on all threads, and each Python thread has its own."""
    weights = [ops.tensor(rng.standard_normal((1024, 512)).astype("float32")) for _ in range(3)]
    x = ops.tensor(rng.standard_normal((20, 512)).astype("float32"))

    def work(weight: ops.Tensor) -> list[np.ndarray]:
        return [ops.softmax(ops.linear(x[: 1 + i % 20], weight)).numpy().copy() for i in range(60)]

    alone = [work(weight) for weight in weights]
    for together, wanted in zip(at_once(*(lambda w=w: work(w) for w in weights)), alone, strict=True):
        for got, each in zip(together, wanted, strict=True):
            np.testing.assert_array_equal(got, each)


COLD = """
import json, sys
import numpy as np
from tests.llm import small
from tests.llm.test_threads import at_once, tell

rng = np.random.default_rng(int(sys.argv[1]))
models = [small.model(rng), small.model(rng), small.model(rng, hidden_size=64, num_key_value_heads=4)]
out = sys.stdout
together = at_once(*(lambda model=model: tell(model, 7) for model in models))
assert sys.stdout is out, "a dry run left its own"
alone = [tell(model, 7) for model in models]
print(json.dumps([together, alone]))
"""


def test_cold_models_at_once(tmp_path, seed):
    """Every kernel is wanted by several threads at the same time, and none is there."""
    done = subprocess.run(
        [sys.executable, "-c", COLD, str(seed)],
        env=os.environ | {"LIMPID_CACHE": str(tmp_path)}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    together, alone = json.loads(done.stdout.splitlines()[-1])
    assert together == alone
    assert len(list((tmp_path / "kernels").glob("*.lock"))) > 0


def test_dry_runs_at_once_leave_the_streams_alone(capsys):
    before, inside = (sys.stdout, sys.stderr, sys.breakpointhook), threading.Event()

    def noisy(wait: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> None:
            print("nobody should read this")
            wait()
            print("nor this")

        return lambda: ops.prepare(run, progress=False)

    def bystander() -> None:
        assert inside.wait(60)
        print("but this")

    at_once(noisy(lambda: (inside.set(), time.sleep(0.2))), noisy(lambda: time.sleep(0.1)), bystander)
    assert (sys.stdout, sys.stderr, sys.breakpointhook) == before
    assert capsys.readouterr().out == "but this\n"


def test_nothing_runs_after_a_generation(rng):
    """No thread goes on looking for work: the whole process sleeps."""
    model = small.model(rng, hidden_size=256, intermediate_size=1024, vocab_size=8192)  # kernels on all threads
    spent = []
    for _ in range(3):
        model.generate([1, 2, 3], max_tokens=20)
        started = time.process_time()
        time.sleep(1)
        spent.append(time.process_time() - started)
    assert min(spent) < 0.05 * ops.target.threads()
