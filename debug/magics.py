"""IPython magics for the tools: `%load_ext debug`, then

    %%trace -o t "layers.0.*", keep=True        arguments as the function takes them; the cell runs with the tool on
    model(ids)

    %trace model(ids)                           one statement
    %trace -o t "layers.0.*" -- model(ids)      arguments, then ` -- `, then the statement
    %stop "layers.3", when=debug.nonfinite      from now on, until it is removed
    %why t["layers.0/add[0]"], index=(0, 5)

    %%kernel c op=rms_norm layers=0-3           the cell is a kernel's source: swapped in, and raced with the op's own

`%check`, `%profile` and `%stop` are as `%trace`. With `-o NAME` the tool, or the answer of `%why`, becomes the variable
NAME; without, it is displayed.
"""

from __future__ import annotations

import ast
import importlib
import re
from typing import Any

from IPython.core.error import UsageError
from IPython.core.magic import Magics, cell_magic, line_cell_magic, line_magic, magics_class
from IPython.display import display

_TOOLS = "debug"


@magics_class
class DebugMagics(Magics):
    """`%trace`, `%check`, `%profile`, `%stop`, `%why` and `%%kernel`."""

    shell: Any

    @line_cell_magic
    def trace(self, line: str, cell: str | None = None) -> None:
        """Record the calls of a statement or a cell: `%trace [-o NAME] [ARGUMENTS -- ] STATEMENT`."""
        self._under("trace", line, cell)

    @line_cell_magic
    def check(self, line: str, cell: str | None = None) -> None:
        """Check each call against its reference: `%check [-o NAME] [ARGUMENTS -- ] STATEMENT`."""
        self._under("check", line, cell)

    @line_cell_magic
    def profile(self, line: str, cell: str | None = None) -> None:
        """Time the calls: `%profile [-o NAME] [ARGUMENTS -- ] STATEMENT`."""
        self._under("profile", line, cell)

    @line_cell_magic
    def stop(self, line: str, cell: str | None = None) -> None:
        """Stop in the debugger at the calls that are meant: `%stop [-o NAME] ARGUMENTS [ -- STATEMENT]`.

        Without a statement, or a cell, the stop stays until it is removed.
        """
        name, rest = _output(line)
        if cell is None and not _split(rest)[0]:
            self._give(name, self._called("stop", rest))
        else:
            self._under("stop", line, cell)

    @line_magic
    def why(self, line: str) -> None:
        """Explain one element: `%why [-o NAME] RECORD, index=(...)`."""
        name, rest = _output(line)
        if not rest:
            raise UsageError("%why RECORD, index=(...)")
        self._give(name, self._called("why", rest))

    @cell_magic
    def kernel(self, line: str, cell: str) -> None:
        """Swap in the kernel that the cell holds: `%%kernel [-o NAME] LANGUAGE op=NAME [layers=0-3] [on=STATEMENT]`.

        Other options are those of `Op.swap`, as NAME=VALUE; `on` is run, and the kernels race on the inputs there.
        """
        from .kernel_cell import run

        name, rest = _output(line)
        self._give(name, run(self.shell, rest, cell))

    def _under(self, tool: str, line: str, cell: str | None) -> None:
        name, rest = _output(line)
        given, code = (rest, cell) if cell is not None else _split(rest)
        if not code.strip():
            raise UsageError(f"%{tool} [-o NAME] [ARGUMENTS -- ] STATEMENT, or %%{tool} with a cell to run")
        with self._called(tool, given) as made:
            self._run(code)
        self._give(name, made)

    def _called(self, tool: str, arguments: str) -> Any:
        """The tool, called with arguments that are evaluated where the user is."""
        space = {**self.shell.user_ns, "_limpid_tool": getattr(importlib.import_module(_TOOLS), tool)}
        return eval(f"_limpid_tool({arguments})", space)

    def _give(self, name: str | None, result: Any) -> None:
        if name:
            self.shell.user_ns[name] = result
        else:
            display(result)

    def _run(self, code: str) -> None:
        """Run code as a cell is run, the value of its last expression displayed: in this context, where the tool is."""
        shell = self.shell
        source = shell.transform_cell(code)
        filename = shell.compile.cache(source, shell.execution_count, raw_code=code)
        tree = shell.transform_ast(shell.compile.ast_parse(source, filename))
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, filename, "exec"), shell.user_ns)
        if last is not None:
            exec(compile(ast.Interactive([last]), filename, "single"), shell.user_ns)


def _output(line: str) -> tuple[str | None, str]:
    """The name after `-o`, and the rest of the line."""
    found = re.match(r"\s*-o\s+(\w+)(?:\s+|$)", line)
    if found is None:
        return None, line.strip()
    if not found[1].isidentifier():
        raise UsageError(f"-o {found[1]}: expected the name of a variable")
    return found[1], line[found.end() :].strip()


def _split(line: str) -> tuple[str, str]:
    """Arguments and statement of a line: what is before ` -- `, and what is after it; without one, all is statement."""
    parts = re.split(r"(?:^|\s)--(?:\s|$)", line, maxsplit=1)
    return (parts[0], parts[1]) if len(parts) == 2 else ("", line)


def load_ipython_extension(shell: Any) -> None:
    """What `%load_ext debug` calls."""
    shell.register_magics(DebugMagics)
