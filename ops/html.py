"""Pieces of HTML for notebooks: they need no network and no library, and take their colours from the page around them.

A table sorts by a click on its head, tabs open by a click; both by a handler inside the element, so that copies of a
cell's output do not get into each other's way. Everything that comes from outside is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

# Three times the class: a notebook's own rules for tables weigh less.
_STYLE = """
.limpid.limpid.limpid{font:13px/1.5 ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace;color:inherit;
max-width:100%}
.limpid.limpid.limpid .head{font-weight:600;margin:0 0 6px}
.limpid.limpid.limpid .note{opacity:.72;font-size:12px;margin:4px 0 10px}
.limpid.limpid.limpid .scroll{overflow:auto;max-height:480px;margin:0 0 10px}
.limpid.limpid.limpid table{border-collapse:collapse;border:none;margin:0;font-size:12px;color:inherit;
table-layout:auto;width:auto}
.limpid.limpid.limpid th,.limpid.limpid.limpid td{padding:2px 14px 2px 0;border:none;background:none;text-align:left;
vertical-align:top;white-space:nowrap;max-width:none}
.limpid.limpid.limpid tr{background:none;border:none}
.limpid.limpid.limpid tbody tr:hover{background:rgba(128,128,128,.18)}
.limpid.limpid.limpid thead{border-bottom:1px solid rgba(128,128,128,.6)}
.limpid.limpid.limpid th{font-weight:600;cursor:pointer;user-select:none}
.limpid.limpid.limpid .number{text-align:right;font-variant-numeric:tabular-nums}
.limpid.limpid.limpid th:not(.number)::after,.limpid.limpid.limpid th.number::before{content:'\\00a0'}
.limpid.limpid.limpid th[aria-sort=ascending]:not(.number)::after,
.limpid.limpid.limpid th.number[aria-sort=ascending]::before{content:'\\25b4'}
.limpid.limpid.limpid th[aria-sort=descending]:not(.number)::after,
.limpid.limpid.limpid th.number[aria-sort=descending]::before{content:'\\25be'}
.limpid.limpid.limpid pre{margin:0;padding:8px 0;overflow:auto;max-height:480px;font:12px/1.45 ui-monospace,Menlo,
Consolas,'DejaVu Sans Mono',monospace;color:inherit;background:none;border:none;white-space:pre;tab-size:4}
.limpid.limpid.limpid .tabs{display:flex;flex-wrap:wrap;gap:4px 18px;border-bottom:1px solid rgba(128,128,128,.6)}
.limpid.limpid.limpid button{font:inherit;color:inherit;background:none;border:none;border-bottom:2px solid transparent;
padding:2px 0;cursor:pointer}
.limpid.limpid.limpid button[aria-selected=true]{font-weight:600;border-bottom-color:currentColor}
.limpid.limpid.limpid svg{display:block;max-width:100%;height:auto;color:inherit}
"""

# Numbers go from large to small first, texts the other way; a cell without a value comes last.
_SORT = """
var h=event.target.closest('th');
if(h&&(event.type=='click'||event.key=='Enter')){
var t=h.closest('table'),b=t.tBodies[0],i=h.cellIndex,n=h.classList.contains('number'),
s=h.getAttribute('aria-sort'),up=s?s=='descending':!n,
v=function(r){return n?r.cells[i].dataset.value:r.cells[i].textContent},
c=function(x,y){return n?x-y:x.localeCompare(y,undefined,{numeric:true})};
t.querySelectorAll('th').forEach(function(x){x.removeAttribute('aria-sort')});
h.setAttribute('aria-sort',up?'ascending':'descending');
Array.from(b.rows).sort(function(p,q){var x=v(p),y=v(q);
return !x||!y?(x?-1:y?1:0):up?c(x,y):c(y,x)}).forEach(function(r){b.appendChild(r)})}
"""

_OPEN = """
var b=event.target.closest('button');
if(b){var r=b.closest('.limpid'),p=r.querySelectorAll('pre');
r.querySelectorAll('button').forEach(function(x,i){x.setAttribute('aria-selected',x==b);p[i].hidden=x!=b})}
"""


def box(*parts: str) -> str:
    """A piece of a page with the style of all of them."""
    return f"<div class='limpid'><style>{_STYLE}</style>{''.join(parts)}</div>"


def head(text: str) -> str:
    return f"<div class='head'>{escape(text)}</div>"


def note(text: str) -> str:
    return f"<div class='note'>{escape(text)}</div>" if text else ""


def number(value: float) -> str:
    """A number for people: four digits, no exponent between 0.001 and a million."""
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if 1000 <= size < 1e15:
        return f"{value:,.0f}"
    return f"{value:.4g}" if size >= 1e-3 or not value else f"{value:.3e}"


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], shares: Sequence[str] = ()) -> str:
    """A table that sorts by a click on its head. Cells are texts, numbers, or None; columns in `shares`, per cent, get
    a bar."""
    numeric = [any(isinstance(row[i], (int, float)) for row in rows) for i in range(len(columns))]
    heads = "".join(
        f"<th scope='col' tabindex='0'{_kind(is_number)}>{escape(name)}</th>"
        for name, is_number in zip(columns, numeric, strict=True)
    )
    barred = [name in shares for name in columns]
    body = "".join(f"<tr>{''.join(map(_cell, row, numeric, barred))}</tr>" for row in rows)
    sort = escape(" ".join(_SORT.split()))
    return (
        f"<div class='scroll'><table><thead onclick='{sort}' onkeydown='{sort}'><tr>{heads}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _kind(is_number: bool) -> str:
    return " class='number'" if is_number else ""


def _cell(value: Any, is_number: bool, barred: bool) -> str:
    if not is_number:
        return f"<td>{escape('' if value is None else str(value))}</td>"
    if value is None:
        return "<td class='number'></td>"
    bar = ""
    if barred:
        end = f"{min(max(value, 0), 100):.1f}%"
        bar = f" style='background:linear-gradient(90deg,rgba(47,111,237,.28) {end},transparent {end})'"
    return f"<td class='number' data-value='{value!r}'{bar}>{f'{value:.1f}' if barred else number(value)}</td>"


def tabs(contents: dict[str, str]) -> str:
    """Texts of which one is seen at a time, by name."""
    buttons = "".join(
        f"<button type='button' role='tab' aria-selected='{str(i == 0).lower()}'>{escape(name)}</button>"
        for i, name in enumerate(contents)
    )
    panes = "".join(
        f"<pre role='tabpanel' aria-label='{escape(name)}'{' hidden' if i else ''}>{escape(text)}</pre>"
        for i, (name, text) in enumerate(contents.items())
    )
    return f"<div class='tabs' role='tablist' onclick='{escape(' '.join(_OPEN.split()))}'>{buttons}</div>{panes}"
