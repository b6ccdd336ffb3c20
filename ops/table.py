"""Table: rows under named columns, as text in a terminal, as HTML that sorts in a notebook."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import html

_ROWS = 60  # of a longer table, as many are shown as text
_HTML_ROWS = 2000  # and as HTML


class Table:
    """`rows` of texts, numbers and None under `columns`; `shares` are columns of per cents that get a bar as HTML."""

    def __init__(
        self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], note: str = "",
        shares: Sequence[str] = (), most: int = _ROWS,
    ):  # fmt: skip
        self.title, self.columns, self.rows, self.note = title, list(columns), [tuple(row) for row in rows], note
        self.shares, self.most = tuple(shares), most

    def __len__(self) -> int:
        return len(self.rows)

    def column(self, name: str) -> list[Any]:
        """The cells of one column."""
        return [row[self.columns.index(name)] for row in self.rows]

    def __repr__(self) -> str:
        from rich.table import Table as RichTable

        from .plain import plain

        made = RichTable(box=None, pad_edge=False)
        for i, name in enumerate(self.columns):
            numeric = any(isinstance(row[i], (int, float)) for row in self.rows)
            made.add_column(name, justify="right" if numeric else "left", no_wrap=True)
        head, tail = _ends(len(self.rows), self.most)
        for row in self.rows[:head]:
            made.add_row(*self._texts(row))
        if tail:
            made.add_row(*["..."] * len(self.columns))
            for row in self.rows[-tail:]:
                made.add_row(*self._texts(row))
        return "\n".join([self.title, plain(made, 1000)] + [self.note] * bool(self.note))

    def _texts(self, row: Sequence[Any]) -> list[str]:
        return [
            "" if value is None else value if isinstance(value, str)
            else f"{value:.1f}" if name in self.shares else html.number(value)
            for name, value in zip(self.columns, row, strict=True)
        ]  # fmt: skip

    def _repr_html_(self) -> str:
        return html.box(self.html())

    def html(self) -> str:
        """The table as a part of a page."""
        head, tail = _ends(len(self.rows), _HTML_ROWS)
        shown = self.rows[:head] + (self.rows[-tail:] if tail else [])
        left = f"the first {head} and the last {tail} of {len(self.rows)} rows; " if tail else ""
        return html.head(self.title) + html.table(self.columns, shown, self.shares) + html.note(left + self.note)


def _ends(size: int, most: int) -> tuple[int, int]:
    """How many rows of the beginning and of the end are shown."""
    return (size, 0) if size <= most else (most - most // 2, most // 2)
