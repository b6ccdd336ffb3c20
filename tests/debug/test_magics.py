import pytest
from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell

import debug
import ops
from debug.profiler import profile
from debug.trace import Trace
from tests.llm import small


@pytest.fixture
def shell(rng, monkeypatch):
    """An IPython of its own with a model in it; what is displayed is collected in `shell.shown`."""
    made = InteractiveShell()
    shown = []
    monkeypatch.setattr("debug.magics.display", shown.append)
    made.run_line_magic("load_ext", "debug.magics")
    made.push({"model": small.model(rng), "shown": shown, "debug": debug})
    yield made
    assert made.history_manager is not None
    made.history_manager.end_session()


def run(shell, source: str):
    """Run a cell; what it raised is raised here."""
    result = shell.run_cell(source, store_history=True)
    result.raise_error()
    return result


class Spy:
    """A tool that remembers what it was made with and whether code ran inside it."""

    on: "list[Spy]" = []  # noqa: RUF012 - those that are on

    def __init__(self, *args, **named):
        self.args, self.named, self.entered = args, named, 0

    def __enter__(self):
        self.entered += 1
        Spy.on.append(self)
        return self

    def __exit__(self, *_):
        Spy.on.remove(self)


@pytest.fixture
def spies(monkeypatch):
    for name in ("check", "profile", "stop"):
        monkeypatch.setattr(debug, name, Spy, raising=False)
    monkeypatch.setattr(debug, "why", lambda *args, **named: (args, named), raising=False)


def test_a_line_is_traced_and_displayed(shell):
    run(shell, "%trace model([1, 2])")
    (found,) = shell.user_ns["shown"]
    assert isinstance(found, Trace) and len(found) > 40
    assert shell.user_ns["_"].shape == (2, 258)  # the statement's value is the cell's


def test_a_cell_with_arguments_and_a_name(shell):
    run(shell, '%%trace -o t "layers.0-1/linear", keep=True\nids = [1, 2, 3]\nlogits = model(ids)')
    t = shell.user_ns["t"]
    assert {record.op_name for record in t} == {"linear"} and len(t) == 14
    assert t["layers.0.mlp.gate_proj/linear[0]"].output.shape == (3, 48)
    assert shell.user_ns["logits"].shape == (3, 258) and shell.user_ns["ids"] == [1, 2, 3]
    assert shell.user_ns["shown"] == []


def test_arguments_before_a_statement(shell):
    shell.user_ns["where"] = "/rope"
    run(shell, "%trace -o t where, statistics=False -- out = model([1]); size = out.shape")
    assert {record.op_name for record in shell.user_ns["t"]} == {"rope"}
    assert shell.user_ns["size"] == (1, 258)


def test_the_models_line_is_that_of_the_cell(shell):
    run(shell, "%%trace -o t\nimport ops\nx = ops.tensor([[1.0]])\nops.neg(x)")
    assert shell.user_ns["t"].records[0].source.endswith(":3")


def test_an_error_leaves_nothing_on(shell):
    with pytest.raises(ZeroDivisionError):
        run(shell, "%%trace -o t\nmodel([1])\n1 / 0")
    assert "t" not in shell.user_ns
    with pytest.raises(ops.SelectorError, match=r"layers\.0"):
        run(shell, '%trace "layer.0" -- model([1])')
    run(shell, "%trace -o t model([1])")
    assert len(shell.user_ns["t"]) > 40


def test_check_profile_and_stop_take_what_the_functions_take(shell, spies):
    for name in ("check", "profile", "stop"):
        run(shell, f'%%{name} -o made "layers.0", every=3\ninside = list(debug.{name}.on)')
        made = shell.user_ns["made"]
        assert (made.args, made.named) == (("layers.0",), {"every": 3})
        assert shell.user_ns["inside"] == [made] and not Spy.on
        run(shell, f'%{name} -o made "layers.1" -- inside = list(debug.{name}.on)')
        assert shell.user_ns["made"].args == ("layers.1",) and shell.user_ns["inside"] == [shell.user_ns["made"]]


def test_stop_without_a_statement_stays(shell, spies):
    run(shell, '%stop -o s "layers.3", when=len')
    assert shell.user_ns["s"].named == {"when": len} and shell.user_ns["s"].entered == 0


def test_why(shell, spies):
    run(shell, "%why -o answer model, index=(5, 17)")
    assert shell.user_ns["answer"] == ((shell.user_ns["model"],), {"index": (5, 17)})
    run(shell, "%why model, index=(0,)")
    assert shell.user_ns["shown"][-1][1] == {"index": (0,)}


@pytest.mark.parametrize(
    "line", ["%trace", '%trace "layers.0" --', "%%trace -o t\n\n", "%why", "%trace -o 3x model([1])"]
)
def test_how_it_is_used_is_said(shell, line):
    with pytest.raises(UsageError):
        run(shell, line)


def test_a_call_that_a_cell_makes_names_the_cell(shell, monkeypatch):
    monkeypatch.setattr("IPython.get_ipython", lambda: shell)
    run(shell, "def twice(x):\n    return x + x\n")
    run(shell, "with debug.trace() as t:\n    twice(model.layers[0].input_layernorm.weight)")
    [record] = shell.user_ns["t"]
    assert record.source == f"Cell In[{shell.execution_count - 2}]:2"


def test_the_profile_itself(shell, monkeypatch):
    monkeypatch.setattr(debug, "profile", profile, raising=False)
    run(shell, "%profile -o p model([1, 2])")
    p = shell.user_ns["p"]
    assert p.forwards and sum(row.calls for row in p.rows()) == len(p.calls) > 40


CELL = """%%kernel -o made c op=rms_norm layers=0-1 on='model([1, 2, 3])' check='first 2'
void rms_norm_cell(const float* x, const float* weight, float* out, int rows, int width, float eps) {
  for (int r = 0; r < rows; r++, x += width, out += width) {
    float s = 0;
    for (int i = 0; i < width; i++) s += x[i] * x[i];
    for (int i = 0; i < width; i++) out[i] = x[i] / sqrtf(s / width + eps) * weight[i];
  }
}
"""


def test_a_kernel_in_a_cell(shell):
    run(shell, CELL.replace("op=rms_norm", "op=rms_norm edge_cases=False"))
    made = shell.user_ns["made"]
    try:
        assert made.swap.hits and made.swap.recipe.language == "c"
        (race, *_) = made.races
        assert {"own", "rms_norm_cell", "reference"} <= {each.name for each in race.contenders}
        assert "rms_norm_cell" in repr(made) and "<svg" in made._repr_html_()
        first = made.swap
        run(shell, CELL.replace("op=rms_norm", "op=rms_norm edge_cases=False").replace("float s = 0", "float s = 0.0f"))
        assert first.state == "replaced" and shell.user_ns["made"].swap is not first
        with pytest.raises(ops.KernelError, match=r"Cell In\[\d+\]:4: error: .*flaot"):
            run(shell, CELL.replace("float s", "flaot s"))
        assert shell.user_ns["made"].swap.state == "in use"
        with pytest.raises(ops.SwapRefused, match=r"is wrong on an edge case: .*plus_one=True"):
            run(shell, CELL)
    finally:
        ops.restore()


def test_a_kernel_in_python_in_a_cell(shell):
    cell = "%%kernel -o made python op=silu\ndef mine(x):\n    return ops.silu.reference(x)"
    shell.push({"ops": ops})
    run(shell, cell)
    try:
        (race,) = shell.user_ns["made"].races
        assert race.call.args[0].shape == (17, 64) and "mine" in repr(race)
    finally:
        ops.restore()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "%%kernel LANGUAGE op=NAME"),
        ("pascal op=silu", "the languages are c, c"),
        ("c op=sillu", "op= names an op: add, "),
        ("c op=silu fast", "'fast' is not NAME=VALUE"),
        ("python op=silu", "the cell defines no function"),
    ],
)
def test_a_line_of_kernel_that_is_not_understood(shell, line, said):
    with pytest.raises(UsageError, match=said):
        run(shell, f"%%kernel {line}\nx = 1")
