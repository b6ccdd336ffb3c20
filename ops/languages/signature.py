"""Signatures of C-like languages: which functions a text has, and what the parameters of one of them are.

It reads declarations, not expressions: comments, strings and the preprocessor's lines count as blanks, bodies are
skipped. What differs from language to language is a `Dialect`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from .base import Parameter, Source

_CONTROL = frozenset(("if", "for", "while", "switch", "do", "else", "return", "case", "catch", "sizeof"))
_ATTRIBUTES = frozenset(("__attribute__", "__declspec", "__launch_bounds__", "alignas", "noexcept", "__align__"))
_INTEGERS = frozenset(("signed", "unsigned", "char", "short", "int", "long"))
_BLANK = re.compile(
    r"""//(?:\\\n|[^\n])* | /\*.*?\*/ | "(?:\\.|[^"\\\n])*" | (?<![0-9A-Fa-f])'(?:\\.|[^'\\\n])*'
    | ^[ \t]*\#(?:\\\n|[^\n])*""",
    re.VERBOSE | re.DOTALL | re.MULTILINE,
)
_THROUGH = re.compile(r'\s*(extern\s*"\s*"|(inline\s+)?namespace)\s*')  # braces whose inside is still the top


@dataclass(frozen=True)
class Dialect:
    """What a language adds to, or takes from, the declarations of C.

    types: spellings of the dtypes that arrays and numbers have; numbers: types that only numbers have; qualifiers:
    words before a parameter that say nothing here; constant: words that make an array read only; kernel: the word that
    the entry must have, such as `__global__`.
    """

    name: str
    types: Mapping[str, str]
    numbers: frozenset[str] = frozenset()
    qualifiers: frozenset[str] = field(
        default=frozenset(("restrict", "__restrict", "__restrict__", "volatile", "register", "struct"))
    )
    constant: frozenset[str] = frozenset(("const",))
    kernel: str | None = None


@dataclass(frozen=True)
class Function:
    """A function that a text defines. `before`: the words before its name; `offset`: where its parameters begin."""

    name: str
    before: str
    parameters: str
    offset: int


def blanked(text: str) -> str:
    """The text with blanks for comments, for what is in strings and for the preprocessor; each offset stays."""

    def blank(match: re.Match[str]) -> str:
        inside = re.sub(r"[^\n]", " ", match[0])
        return f'"{inside[1:-1]}"' if match[0][0] == '"' else inside

    return _BLANK.sub(blank, text)


def functions(source: Source) -> list[Function]:
    """The functions that are defined at the top of a text, in their order."""
    return [*_functions(source, blanked(source.text))]


def _functions(source: Source, text: str) -> Iterator[Function]:
    start, parens, braces = 0, 0, []  # braces: (offset, whether its inside is still the top)
    for match in re.finditer(r"[{}();]", text):
        what = match[0]
        if what in "()":
            parens = max(0, parens + (1 if what == "(" else -1))
        elif parens:
            continue
        elif what == "{":
            head, top = text[start : match.start()], all(through for _, through in braces)
            function = _function(head, start) if top else None
            if function is not None:
                yield function
            braces.append((match.start(), bool(top and _THROUGH.fullmatch(head))))
            start = match.end()
        elif what == "}":
            if braces:
                braces.pop()
            start = match.end()
        elif all(through for _, through in braces):
            start = match.end()
    if braces:
        raise source.complaint(braces[0][0], "this brace is never closed")


def _function(head: str, start: int) -> Function | None:
    """The function that a text before a brace begins; None for a loop, a struct, an initialiser."""
    head = _without_attributes(head)
    match = re.search(r"([A-Za-z_]\w*)\s*\(", head)
    if match is None:
        return None
    before = head[: match.start()]
    words = re.findall(r"[A-Za-z_]\w*", before)
    if not words or _CONTROL & {match[1], *words} or re.search(r"[-=?!+/%|^\[.(]", before):
        return None
    return Function(match[1], before, head[match.end() : _closing(head, match.end())], start + match.end())


def _without_attributes(text: str) -> str:
    """The text without `__attribute__((...))`, `[[...]]` and the like; offsets stay."""
    text = re.sub(r"\[\[.*?\]\]", lambda match: " " * len(match[0]), text, flags=re.DOTALL)
    for match in re.finditer(r"([A-Za-z_]\w*)\s*\(", text):
        if match[1] in _ATTRIBUTES and text[match.start()] != " ":
            end = _closing(text, match.end()) + 1
            text = text[: match.start()] + " " * (end - match.start()) + text[end:]
    return text


def _closing(text: str, start: int) -> int:
    """Where the parenthesis closes whose inside begins at `start`."""
    depth = 1
    for match in re.finditer(r"[()]", text[start:]):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return start + match.start()
    return len(text)


def parse(source: Source, dialect: Dialect) -> tuple[Parameter, ...] | None:
    """The parameters of the function `source.entry`; None where the text defines no function: it is only a body.

    Raises SourceError, with file and line, for an entry that is not there, and a parameter that nothing can be given
    to.
    """
    entry = entry_of(source, dialect.kernel)
    return entry and tuple(parameter(source, each, offset, dialect) for offset, each in pieces(entry))


def entry_of(source: Source, kernel: str | None) -> Function | None:
    """The function `source.entry`, which has the word `kernel` before it; None where the text defines no function."""
    found = functions(source)
    if not found:
        return None
    entries = [each for each in found if each.name == source.entry]
    if kernel is not None:
        marked = [each for each in entries if kernel in re.findall(r"\w+", each.before)]
        if entries and not marked:
            raise source.complaint(entries[0].offset, f"{source.entry} is no kernel: write {kernel} before it")
        entries = marked
    if not entries:
        names = ", ".join(dict.fromkeys(each.name for each in found))
        raise source.complaint(
            found[0].offset, f"there is no function {source.entry}, by which the kernel is called; there is {names}"
        )
    entry = entries[0]
    if re.search(r"\btemplate\b", entry.before):
        raise source.complaint(entry.offset, f"{entry.name} is a template; a kernel is a plain function")
    if not re.search(r"\bvoid\s*$", entry.before):
        raise source.complaint(entry.offset, f"{entry.name} gives a result; a kernel is void, and writes to arrays")
    return entry


def pieces(entry: Function) -> Iterator[tuple[int, str]]:
    """The text of each parameter, and where it begins in the source."""
    text = entry.parameters
    if text.strip() in ("", "void"):
        return
    start, depth = 0, 0
    for match in re.finditer(r"[,()\[\]<>]|\Z", text):
        if match[0] in ("(", "[", "<"):
            depth += 1
        elif match[0] in (")", "]", ">"):
            depth -= 1
        elif match[0] == "" or depth == 0:
            yield entry.offset + start, text[start : match.start()]
            start = match.end()


def parameter(source: Source, text: str, offset: int, dialect: Dialect) -> Parameter:
    """The parameter that a text declares, which begins at `offset` of the source."""
    offset += len(text) - len(text.lstrip())
    written = " ".join(text.split())
    declared = text.split("=", 1)[0]  # without a default, which nobody would use
    tokens = re.findall(r"[A-Za-z_][\w:]*|\[[^\]]*\]|\S", declared)
    arrays = [token for token in tokens if token[0] == "["]
    words = [t.removeprefix("std::") for t in tokens if re.match(r"\w", t)]
    odd = [t for t in tokens if not re.match(r"[\w*\[]", t)]
    if odd:
        raise source.complaint(offset, f"{written!r} is not understood: a parameter is a number, or a pointer to them")
    before = tokens[: tokens.index("*")] if "*" in tokens else tokens
    const = bool(dialect.constant & {*before})
    plain = [word for word in words if word not in dialect.constant | dialect.qualifiers]
    whole = _canonical(plain)
    if len(plain) < 2 or whole in {*dialect.types, *dialect.numbers}:
        known = not plain or whole in {*dialect.types, *dialect.numbers}
        raise source.complaint(offset, f"{written!r} has no {'name' if known else 'type'}")
    kind, pointers = _canonical(plain[:-1]), tokens.count("*") + len(arrays)
    if pointers > 1:
        raise source.complaint(offset, f"{written!r} is a pointer to pointers; an array comes as one pointer")
    _understood(source, offset, written, kind, bool(pointers), dialect)
    return Parameter(plain[-1], kind, dialect.types.get(kind), bool(pointers), const and bool(pointers))


def _understood(source: Source, offset: int, written: str, kind: str, pointer: bool, dialect: Dialect) -> None:
    """Raises SourceError for a type that neither an array nor a number has."""
    if kind in dialect.types or (not pointer and kind in dialect.numbers):
        return
    known = ", ".join(_one_spelling_each(dialect.types))
    if kind in dialect.numbers:
        raise source.complaint(offset, f"{written!r}: no tensor is of {kind}; arrays are of {known}")
    if kind == "void":
        raise source.complaint(offset, f"{written!r} says nothing of what it points to; arrays are of {known}")
    raise source.complaint(offset, f"{written!r}: {kind} is not a type that is passed; {dialect.name} has {known}")


def _one_spelling_each(types: Mapping[str, str]) -> list[str]:
    """The first spelling of each dtype."""
    first: dict[str, str] = {}
    for spelled, dtype in types.items():
        first.setdefault(dtype, spelled)
    return [*first.values()]


def _canonical(words: Sequence[str]) -> str:
    """One spelling for `long int`, `int long`, `char unsigned` and the like."""
    if not words or not _INTEGERS.issuperset(words):
        return " ".join(words)
    size = "long " * list(words).count("long") or ("short" if "short" in words else "")
    size = "char" if "char" in words else size.strip() or "int"
    if "unsigned" in words:
        return f"unsigned {size}"
    return f"signed {size}" if size == "char" and "signed" in words else size


def enclosed(source: Source, parameters: Sequence[Parameter], before: str = "") -> Source:
    """A body with a function around it; `before` are words before `void`. Its lines and columns stay what they were."""
    head = f"{before}void {source.entry}({', '.join(map(str, parameters))}) {{"
    return replace(source, text=f"{head}\n{source.text}\n}}", line=source.line - 1)
