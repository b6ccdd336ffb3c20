"""Sessions in real front ends: stop at the model's line, look, go back, go on; the text is that of a straight run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pexpect
import pytest

import llm
import llm.models.llama

ROOT = Path(__file__).resolve().parents[2]
LLAMA = Path(llm.models.llama.__file__)
PROMPT, TOKENS = "Once upon a time", 8
STORY = f"model.generate({PROMPT!r}, max_tokens={TOKENS})"
STOP = 'stop("layers.1.self_attn/rope[1]", when=lambda call: call.args[0].shape[0] > 1)'  # in the prompt's pass
SCRIPT = f"""\
import llm
from debug.stop import stop
model = llm.load("tiny")
with {STOP} as s:
    text = {STORY}
print("THE TEXT IS", repr(str(text)), "AFTER", s.stopped)
"""
COMMANDS = (
    'p "x is", call.inputs["x"].shape', "goto layers.0.mlp",  # at the stop
    'p "now", call.address', 'p "x is", x.shape', "c",  # where it went back to
    "rerun",  # at the stop again
    'p "gives", output.shape', "c",  # after its launch
)  # fmt: skip
PLAIN = os.environ | {"NO_COLOR": "1", "PYTHON_COLORS": "0", "TERM": "dumb", "PYTHONPATH": str(ROOT)}
PLAIN.pop("PYTHONBREAKPOINT", None)


@pytest.fixture(scope="module")
def model() -> Any:
    return llm.load("tiny")


def line_of(text: str) -> int:
    return next(n for n, line in enumerate(LLAMA.read_text("utf-8").splitlines(), 1) if text in line)


def check(said: str, model: Any) -> None:
    """The transcript of `COMMANDS` and the program's last line."""
    text = re.sub(r"\x1b\[[0-9;?]*[ -/]*[@-~]", "", said).replace("\r\n", "\n")
    rope, mlp = (rf"{re.escape(str(LLAMA))}\({line_of(part)}\)forward\(" for part in ("rotate(q), ", "self.down_proj("))
    tokens = len(model.tokenizer.encode(PROMPT))
    c = model.config
    steps = [
        "Stop at layers.1.self_attn/rope\\[1\\]@\\d+, before its launch: its condition holds", rope,
        rf"\('x is', \({tokens}, {c.num_key_value_heads}, {c.head_dim}\)\)",
        "Stop at layers.0.mlp.gate_proj/linear\\[0\\]@\\d+, before its launch\n", mlp,
        r"\('now', 'layers.0.mlp.gate_proj/linear\[0\]'\)", rf"\('x is', \({tokens}, {c.hidden_size}\)\)",
        "Stop at layers.1.self_attn/rope\\[1\\]@\\d+, before its launch: its condition holds", rope,
        "Stop at layers.1.self_attn/rope\\[1\\]@\\d+, after its launch", rope,
        rf"\('gives', \({tokens}, {c.num_key_value_heads}, {c.head_dim}\)\)",
        rf"THE TEXT IS {re.escape(repr(str(eval(STORY, {'model': model}))))} AFTER 2",
    ]  # fmt: skip
    at = 0
    for step in steps:
        found = re.compile(step).search(text, at)
        assert found, f"{step!r} is not in what follows {text[:at][-200:]!r}:\n{text[at:]}"
        at = found.end()


def test_a_script(tmp_path, model):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "script.py"], input="\n".join(COMMANDS) + "\n",
        cwd=tmp_path, env=PLAIN, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    check(done.stdout, model)


def test_a_script_under_pdb(tmp_path, model):
    (tmp_path / "script.py").write_text(SCRIPT)
    commands = ["b script.py:6", "c", *COMMANDS, "p s.hits", "c", "c", "q"]  # once more, to leave at the stop
    done = subprocess.run(
        [sys.executable, "-m", "pdb", "script.py"], input="\n".join(commands) + "\n",
        cwd=tmp_path, env=PLAIN, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    check(done.stdout, model)
    assert done.stdout.count(f"{tmp_path / 'script.py'}(6)<module>()") == 1  # its own breakpoints hold
    assert done.stdout.count("The program finished and will be restarted") == 1  # one debugger, not one in the other
    assert "Traceback" not in done.stdout + done.stderr


def converse(child: Any, prompt: str, commands: tuple[str, ...], end: str = "\n") -> str:
    said = ""
    for command in commands:
        child.expect_exact(prompt)
        said += child.before
        child.send(command + end)
    return said


def test_in_pytest(tmp_path, model):
    """Capturing, which takes the terminal away, is set aside at the prompt."""
    body = textwrap.indent(SCRIPT, "    ")
    (tmp_path / "test_it.py").write_text(f"def test_it():\n    print('captured')\n{body}    assert len(text) > 3\n")
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-rP", "test_it.py"]
    child = pexpect.spawn(sys.executable, command, cwd=str(tmp_path), env=PLAIN, encoding="utf-8", timeout=60)
    said = converse(child, "(Pdb) ", COMMANDS)
    said += child.read()
    assert "IO-capturing turned off" in said
    assert "IO-capturing resumed" in said
    assert "1 passed" in said
    assert said.rindex("captured") > said.index("1 passed") - 3000
    check(said, model)


@pytest.mark.parametrize("simple", [True, False], ids=["simple", "prompt_toolkit"])
def test_in_ipython(tmp_path, model, simple):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = ["-m", "IPython", "--no-banner", "--no-confirm-exit", "--colors=nocolor"]
    env = PLAIN | {"IPYTHONDIR": str(tmp_path), "PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "dumb" if simple else "xterm"}
    command += ["--simple-prompt"] * simple
    child = pexpect.spawn(
        sys.executable, command, cwd=str(tmp_path), env=env, encoding="utf-8", timeout=60, dimensions=(50, 200)
    )
    end = "\n" if simple else "\r"
    said = converse(child, "In [1]:", ("%run -i script.py",), end)
    said += converse(child, "ipdb>", COMMANDS, end)
    said += converse(child, "In [2]:", ("exit",), end)
    check(said, model)
    child.expect(pexpect.EOF)


def test_ipdb_where_it_is_installed(tmp_path, model):
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "ipdb.py").write_text("")
    env = PLAIN | {"IPYTHONDIR": str(tmp_path)}
    child = pexpect.spawn(sys.executable, ["script.py"], cwd=str(tmp_path), env=env, encoding="utf-8", timeout=60)
    said = converse(child, "ipdb> ", COMMANDS)
    check(said + child.read(), model)


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel(kernel_name="python3", cwd=str(tmp_path))
    yield client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def test_in_a_jupyter_kernel(kernel, model):
    said, commands = [], iter(COMMANDS)

    def show(message: dict[str, Any]) -> None:
        content = message["content"]
        said.append(content.get("text", "") or "\n".join(content.get("traceback", [])))

    def answer(message: dict[str, Any]) -> None:
        said.append(message["content"]["prompt"])
        kernel.input(next(commands))

    reply = kernel.execute_interactive(SCRIPT, allow_stdin=True, stdin_hook=answer, output_hook=show, timeout=60)
    assert reply["content"]["status"] == "ok", "".join(said)
    check("".join(said), model)
    assert not [*commands]


def test_the_command_line_with_an_error(tmp_path):
    """LIMPID_ON_ERROR=breakpoint: the debugger at the line of the model where an op failed."""
    (tmp_path / "script.py").write_text(
        "import debug.stop\nimport llm\nimport ops\n"
        'model = llm.load("tiny")\n'
        "model.layers[1].mlp.down_proj.weight = ops.zeros((128, 5))\n"
        f"{STORY}\n"
    )
    done = subprocess.run(
        [sys.executable, "script.py"], input="p call\np self.gate_proj\nc\n", cwd=tmp_path,
        env=PLAIN | {"LIMPID_ON_ERROR": "breakpoint"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert f"{LLAMA}({line_of('self.down_proj(')})forward()" in done.stdout
    assert "layers.1.mlp.down_proj/linear[0]" in done.stdout
    assert done.returncode == 1
    assert "ShapeError: linear in layers.1.mlp.down_proj: weight is" in done.stderr
