"""Source text that shows itself: as it is at a prompt, in colours in a notebook."""

from __future__ import annotations

from html import escape

_LEXERS = {
    "llvm": "llvm", "asm": "gas", "c": "c", "c++": "c++", "cuda": "cuda", "metal": "c++", "opencl": "c", "wgsl": "wgsl",
    "ptx": "ptx", "sass": "text", "tvmscript": "python", "python": "python", "triton": "python",
}  # fmt: skip
_STYLE = "solarized-light"  # whose colours are read on a light page and on a dark one


class Text(str):
    """Source text in a `language`; its repr is the text itself."""

    language: str

    def __new__(cls, text: str, language: str = "") -> Text:
        made = super().__new__(cls, text)
        made.language = language
        return made

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        from pygments import highlight
        from pygments.formatters import HtmlFormatter
        from pygments.lexers import get_lexer_by_name
        from pygments.util import ClassNotFound

        try:
            lexer = get_lexer_by_name(_LEXERS.get(self.language, "text"))
        except ClassNotFound:  # a version of pygments that does not know it
            return f"<pre>{escape(self)}</pre>"
        return highlight(str(self), lexer, HtmlFormatter(style=_STYLE, noclasses=True, nobackground=True))
