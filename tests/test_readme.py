"""The README's Python runs, top to bottom, in one namespace; its commands and flags exist."""

import contextlib
import io
import re
from pathlib import Path

from typer.testing import CliRunner

from llm import cli

README = (Path(__file__).resolve().parents[1] / "README.md").read_text("utf-8")


def test_python_blocks_run():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 5
    names: dict = {"__name__": "__readme__"}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for i, block in enumerate(blocks):
            exec(compile(block, f"README.md block {i}", "exec"), names)
    assert " Tom\n" in printed.getvalue()
    assert names["use"].hits == 4


def test_commands_exist():
    def help_of(command: str) -> str:
        done = CliRunner().invoke(cli.app, [command, "--help"])
        assert done.exit_code == 0, done.output
        return done.output

    for command in re.findall(r"^\| `limpid (\w+)", README, re.MULTILINE):
        help_of(command)
    shown = help_of("generate")
    flags = re.search(r"`(--model .*?)`", README)
    assert flags is not None
    for flag in flags[1].split():
        assert flag in shown


def test_the_line_to_break_on_is_in_a_layer():
    name, line = re.findall(r"b (llm/models/\w+\.py):(\d+)", README)[0]
    source = (Path(__file__).resolve().parents[1] / name).read_text("utf-8").splitlines()
    assert "ops.attention(" in source[int(line) - 1]
