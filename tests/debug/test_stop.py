"""The stop: where it opens the debugger, when, and with what at hand."""

from __future__ import annotations

import bdb
import pdb
import re
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llm.models.llama
import ops
from debug import prompt
from debug.conditions import above, diverges, nonfinite
from debug.stop import stop, stops
from tests.debug.typed import typed
from tests.llm import small

LLAMA = Path(llm.models.llama.__file__)


@pytest.fixture(autouse=True)
def nothing_left():
    yield
    assert stops() == ()
    assert not ops.intercept.chain()
    assert sys.gettrace() is None


def line_of(text: str) -> int:
    return next(n for n, line in enumerate(LLAMA.read_text("utf-8").splitlines(), 1) if text in line)


def at(text: str) -> str:
    """What the debugger prints where it stands at a line of the model."""
    return f"> {LLAMA}({line_of(text)})forward()"


def test_it_opens_at_the_line_before_the_call(rng, monkeypatch):
    model = small.model(rng)
    session = typed(
        monkeypatch, "p call.address, call.source", 'p call.inputs["x"].shape', "p output", "p type(self).__name__",
        "p [*locals()]", "n", "p k.shape", "p [*locals()]", "c",
    )  # fmt: skip
    with stop("layers.1.self_attn.k_proj") as s:
        model([1, 2, 3])
    said = session.said
    assert said.index(at("k = self.k_proj(x)")) < said.index(at("v = self.v_proj(x)"))
    assert f"('layers.1.self_attn.k_proj/linear[0]', '{_relative()}:{line_of('k = self.k_proj(x)')}')" in said
    assert "(Pdb) (3, 32)\n" in said
    assert "NameError: name 'output' is not defined" in said  # not launched yet
    assert "(Pdb) 'Attention'" in said
    assert "(Pdb) (3, 2, 8)\n" in said  # the next line is one of the model's
    first, second = [line for line in said.splitlines() if "'rotate'" in line]
    assert "'call'" in first
    assert "'k'" not in first
    assert "'call'" not in second
    assert (s.hits, s.stopped) == (1, 1)
    assert not session.left


def _relative() -> str:
    return str(LLAMA.relative_to(Path.cwd()))


def test_steps_stay_in_the_model(rng, monkeypatch):
    model = small.model(rng)
    session = typed(monkeypatch, "s", "up", "p type(self).__name__", "down", "s", "s", "r", "n", "n", "w", "c")
    with stop("layers.0.self_attn/attention[0]"):
        model([1, 2])
    where = [line for line in session.said.splitlines() if line.startswith(("> ", "(Pdb) > "))]
    assert all(str(LLAMA) in line for line in where), where
    assert at("return self.o_proj(") in session.said
    assert "'Block'" in session.said
    assert "ops/" not in session.said


class Doubles(llm.Module):
    """A module whose variables are called as what is at hand."""

    def forward(self, x: ops.Tensor) -> ops.Tensor:
        call = 2.0
        output = ops.scale(x, call)
        return ops.scale(output, call)


def test_the_frame_keeps_its_own(rng, monkeypatch):
    x = ops.tensor(rng.standard_normal((2, 3)).astype("float32"))
    session = typed(
        monkeypatch, "p call, _call.op.name", "rerun", "p _output.shape", "p output", "call = 3.0", "x = None", "n",
        "p call, x", "c",
    )  # fmt: skip
    with stop("/scale[0]"):
        result = Doubles()(x)
    assert "_call is what else would be called call" in session.said
    assert "(Pdb) (2.0, 'scale')" in session.said
    assert "(Pdb) (2, 3)" in session.said
    assert "NameError: name 'output'" in session.said
    assert "(3.0, None)" in session.said
    np.testing.assert_allclose(result.numpy(), x.numpy() * 6.0, rtol=1e-6)


def test_after_and_handles(rng, monkeypatch):
    model = small.model(rng)
    session = typed(monkeypatch, "p call.address", "c", "p call.address", "c")
    s = stop("/rope", after=4)
    assert stops() == (s,)
    model([5])
    s.remove()
    s.remove()
    model([5])
    assert re.findall(r"'layers\.\d.*'", session.said) == [f"'layers.2.self_attn/rope[{i}]'" for i in (0, 1)]
    assert (s.hits, s.stopped) == (6, 2)
    assert not session.left


def test_cleared_at_the_prompt(rng, monkeypatch):
    """The pass that is under way may still be gone back in."""
    model = small.model(rng)
    straight = model([5, 6]).numpy().copy()
    session = typed(monkeypatch, "from debug.stop import clear; clear()", "goto layers.0.input_layernorm", "c")
    stop("layers.1")
    stop("/rope")
    assert np.array_equal(model([5, 6]).numpy(), straight)
    assert "Stop at layers.0.self_attn/rope[0]" in session.said
    assert "Stop at layers.0.input_layernorm/rms_norm[0]" in session.said
    assert not session.left


def test_conditions(rng, monkeypatch):
    model = small.model(rng)
    model.layers[1].mlp.up_proj.weight.numpy()[7, 3] = np.nan
    session = typed(monkeypatch, "p call.address", "p float(output.numpy()[0, 7])", "q")
    with pytest.raises(bdb.BdbQuit), stop(when=nonfinite):
        model([1, 2])
    assert "'layers.1.mlp.up_proj/linear[0]'" in session.said
    assert "output holds 2 NaN and 0 infinite values, the first at [0, 7]" in session.said
    assert at("return self.down_proj(ops.silu_mul(") in session.said
    assert "(Pdb) nan" in session.said

    model = small.model(rng)
    model.layers[2].input_layernorm.weight.numpy()[4] = 1e6
    session = typed(monkeypatch, "c")
    with stop("/rms_norm", when=above(1e4)) as s:
        model([1])
    assert "Stop at layers.2.input_layernorm/rms_norm[0]" in session.said
    assert "at [0, 4], above 10000" in session.said
    assert (s.hits, s.stopped) == (7, 1)

    session = typed(monkeypatch, "c", "c")
    with stop("layers.0-1", when=lambda call: call.op is ops.rope and call.ordinal == 1) as s:
        model([1])
    assert s.stopped == 2
    session = typed(monkeypatch, "p output.shape", "c")
    with stop("/add", when=lambda call: lambda output: "wide" if output.shape[0] > 1 else "", after=5):
        model([1, 2])
    assert "layers.2/add[1]" in session.said
    assert ": wide" in session.said


def crooked(x: np.ndarray, weight: np.ndarray, *, eps: float, plus_one: bool) -> np.ndarray:
    good = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * weight
    good[0, 5] += 0.01
    return good


def test_diverging_from_the_reference(rng, monkeypatch):
    model = small.model(rng)
    with stop(when=diverges) as s:  # every call of a sound model, within the tolerance of a kernel
        model(rng.integers(0, 256, 40))
    assert s.hits > 40
    assert not s.stopped
    session = typed(monkeypatch, "c", "c")
    with ops.rms_norm.use(crooked, where="layers.1.input_layernorm"), stop(when=diverges(1e-4)) as s:
        model([1])
    assert s.stopped == 1
    assert "Stop at layers.1.input_layernorm/rms_norm[0]" in session.said
    assert "output is not what the reference gives" in session.said
    assert "at [0, 5]; tolerance 0.0001" in session.said


def test_a_condition_that_never_holds_is_no_error_and_a_wrong_address_is(rng):
    model = small.model(rng)
    with stop("/rope", when=lambda call: False):
        model([1])
    with (
        pytest.raises(ops.SelectorError, match=r"layers.1.self_atn.* there were layers\.\d\.self_attn"),
        stop("layers.1.self_atn"),
    ):
        model([1])
    left = stop("layers.77")
    model([1])
    assert "'layers.77' meant none of the calls" in left.unmet()
    left.remove()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"when": "nonfinite"}, "expected a function of the call"),
        ({"after": -1}, "expected an integer, 0 or above"),
        ({"where": []}, "an empty list of selectors"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ops.OpError, match=message):
        stop(**arguments)


def test_above_without_its_number(rng):
    with stop(when=above), pytest.raises(ops.OpError, match="above takes a number"):  # type: ignore[arg-type]
        ops.neg(ops.tensor(rng.standard_normal(3).astype("float32")))


def test_it_stops_in_other_threads(rng, monkeypatch):
    model = small.model(rng)
    session = typed(monkeypatch, "import threading", "p threading.current_thread().name", "back", "c", "c")
    results: list[Any] = []
    with stop("layers.1/add[0]") as s:
        thread = threading.Thread(target=lambda: results.append(model([1, 2]).numpy()), name="elsewhere")
        thread.start()
        thread.join()
    assert s.stopped == 2
    assert "'elsewhere'" in session.said
    assert np.array_equal(results[0], model([1, 2]).numpy())


def test_quitting_leaves_the_cache_as_it_was(rng, monkeypatch):
    model = small.model(rng)
    cache = model.new_cache()
    model([1, 2, 3], cache)
    typed(monkeypatch, "q")
    with pytest.raises(bdb.BdbQuit), stop("layers.2"):
        model([4], cache)
    assert len(cache) == 3


def test_a_dry_run_is_none_of_its_business(rng, monkeypatch):
    model = small.model(rng)
    session = typed(monkeypatch, "c")
    s = stop("layers.1/add[0]")
    ops.prepare(lambda: model([1, 2]))
    assert s.hits == 0
    model([1, 2])
    s.remove()
    assert s.stopped == 1
    assert not session.left


def test_pdb_by_name(monkeypatch):
    monkeypatch.delitem(sys.modules, "_pytest.debugging")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)  # ipdb is there
    monkeypatch.setenv("PYTHONBREAKPOINT", "pdb.set_trace")
    assert type(prompt.new()) is pdb.Pdb


calls: list[Any] = []


def takes_frame(frame: Any = None) -> None:
    calls.append((frame.f_code.co_filename, frame.f_lineno, frame.f_locals["call"].address))


def takes_none() -> None:
    calls.append(None)


def test_the_hook_that_python_names(rng, monkeypatch):
    model = small.model(rng)
    calls.clear()
    session = typed(monkeypatch, "c")
    monkeypatch.setenv("PYTHONBREAKPOINT", "0")
    with stop("layers.0/add[0]") as s:
        model([1])
    assert s.hits == 1
    assert not session.said
    monkeypatch.setenv("PYTHONBREAKPOINT", f"{__name__}.takes_frame")
    with stop("layers.0/add[0]"):
        model([1])
    assert calls == [(str(LLAMA), line_of("x = x + self.self_attn("), "layers.0/add[0]")]
    assert not session.said
    monkeypatch.setenv("PYTHONBREAKPOINT", f"{__name__}.takes_none")
    with stop("layers.0/add[0]"):
        model([1])
    assert len(calls) == 1
    assert "takes_none takes no frame" in session.said
    assert at("x = x + self.self_attn(") in session.said
    session = typed(monkeypatch, "c")
    monkeypatch.setenv("PYTHONBREAKPOINT", "no.such.hook")
    with stop("layers.0/add[0]"):
        model([1])
    assert "no.such.hook is no function that can be called" in session.said


def test_an_error_opens_it_at_the_model_line(rng, monkeypatch):
    model = small.model(rng)
    model.layers[1].mlp.up_proj.weight = ops.zeros((48, 31))
    session = typed(monkeypatch, "p call.address, error", "p call.inputs['weight'].shape", "p ops.add(x, 1)", "c")
    monkeypatch.setenv("LIMPID_ON_ERROR", "breakpoint")
    with pytest.raises(ops.ShapeError, match="weight is"):
        model([1, 2])
    assert at("return self.down_proj(ops.silu_mul(") in session.said
    assert "('layers.1.mlp.up_proj/linear[0]', ShapeError(" in session.said
    assert "(Pdb) (48, 31)" in session.said
    assert "*** " in session.said  # what is typed does not open it once more
    assert session.said.count("> /") == 1
    assert not session.left
    monkeypatch.setenv("LIMPID_ON_ERROR", "stop")
    with pytest.raises(ops.ShapeError) as caught:
        model([1, 2])
    assert "LIMPID_ON_ERROR is 'stop'" in caught.value.__notes__[0]


def failing(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    raise RuntimeError("out of luck")


def test_a_failed_kernel_is_mended_and_the_pass_goes_on(rng, monkeypatch):
    model = small.model(rng)
    straight = model([1, 2]).numpy().copy()
    session = typed(
        monkeypatch, "p error.__cause__", "for each in ops.silu_mul._uses: each.remove()", "goto layers.0.mlp", "c"
    )
    monkeypatch.setenv("LIMPID_ON_ERROR", "breakpoint")
    with stop("layers.2", when=lambda call: False), ops.silu_mul.use(failing, where="layers.1"):
        result = model([1, 2]).numpy()
    assert "RuntimeError('out of luck')" in session.said
    assert np.array_equal(result, straight)
