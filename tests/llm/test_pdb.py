"""A session with Python's own debugger: stop in a layer, look, step into an op, go on to the end of the text."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import llm
import ops

ROOT = Path(__file__).resolve().parents[2]
SOURCE = "llm/models/llama.py"
PROMPT = "Once upon a time"


def line_of(text: str) -> int:
    lines = (ROOT / SOURCE).read_text("utf-8").splitlines()
    return next(number for number, line in enumerate(lines, 1) if text in line)


def session(line: int, *commands: str) -> str:
    """What the debugger and the program print."""
    program = ["-m", "llm", "generate", PROMPT, "--max-tokens", "12"]
    done = subprocess.run(
        [sys.executable, "-m", "pdb", "-c", f"b {SOURCE}:{line}", *program],
        input="\n".join([*commands, "q", ""]), cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout


def first_values(model: Any, address: str) -> str:
    """The first tensor argument of the first call at `address`, as it prints."""
    found: list[str] = []

    class Looks(ops.Interceptor):
        def call(self, call: ops.Call, launch: Any) -> Any:
            if call.address == address and not found:
                found.append(repr(call.args[0]))
            return launch(call)

    with ops.intercepted(Looks()):
        model(model.tokenizer.encode(PROMPT), logits_to_keep=1)
    return found[0]


def test_a_session():
    model, line = llm.load("tiny"), line_of("mixed = ops.attention(")
    tokens, width = len(model.tokenizer.encode(PROMPT)), model.config.hidden_size
    out = session(line, "c", "p q", "p x.shape", "p type(cache).__name__", "s", "w", "p self", "r", "cl 1", "c")
    assert f"{SOURCE}({line})forward()" in out
    shown = first_values(model, "layers.0.self_attn/attention[0]")
    assert re.match(rf"{model.dtype}\[{tokens}, \d+, \d+\] on cpu\nmin .* mean .* max ", shown)
    assert f"(Pdb) {shown}\n" in out  # the values of the first layer in the first real forward
    assert f"(Pdb) ({tokens}, {width})\n" in out
    assert "(Pdb) 'Layer'\n" in out
    assert "--Call--" in out
    assert "ops/op.py" in out
    assert "(Pdb) ops.attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor" in out
    assert f"{model.generate(PROMPT, max_tokens=12)}\n" in out
    assert "Exit status: 0" in out


def test_it_stops_in_every_layer_of_every_forward():
    model, line, forwards = llm.load("tiny"), line_of("x = x + self.self_attn("), 3
    layers, width = len(model.layers), model.config.hidden_size
    out = session(line, *["c", "p x.shape"] * (layers * forwards))
    assert out.count(f"{SOURCE}({line})forward()") == layers * forwards
    assert out.count(f"(Pdb) ({len(model.tokenizer.encode(PROMPT))}, {width})\n") == layers
    assert out.count(f"(Pdb) (1, {width})\n") == layers * (forwards - 1)


def test_a_value_may_be_changed_on_the_way():
    line = line_of("x = self.norm(self.last(")
    out = session(line, "c", "x.numpy()[...] = 0", "n", "p float(abs(x.numpy()).max())", "cl 1", "c")
    assert "(Pdb) 0.0\n" in out
    assert "Exit status: 0" in out
