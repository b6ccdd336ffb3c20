"""Plain: what rich would show, as text."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console


def plain(shown: Any, width: int) -> str:
    """The lines of something that rich knows, without colours or markup and spaces at their ends.

    Also in a notebook, where rich would put it on the page at once instead of giving it.
    """
    out = io.StringIO()
    console = Console(
        file=out, width=width, highlight=False, markup=False, no_color=True, force_jupyter=False, force_terminal=False
    )
    console.print(shown)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())
