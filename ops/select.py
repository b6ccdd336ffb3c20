"""Selectors: which calls a trace, a stop, a patch or a swap means. One small language for all of them.

    layers.3                       every call inside the module `layers.3` (its subtree)
    layers.0-3                     the same for layers 0 to 3, both included
    layers.*.self_attn             a glob: `*` stands for anything, dots included; no subtree is implied
    layers.0.self_attn/rope[1]     the second `rope` call of that module
    /linear                        every call of the op `linear`, wherever it is made
    layers.0-3.*/linear@2          in the second pass only
    /linear dtype=bfloat16 rows=1  further words narrow by the first input: dtype, device, rows (first size), shape=1x64
    layers.0, layers.7             a comma means "or"

A function of the `Call`, an op, a list of selectors, or None (every call) also serve.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from .errors import SelectorError, place
from .spec import DTYPES, Spec

if TYPE_CHECKING:
    from .call import Call

_ADDRESS = re.compile(r"(?P<path>[\w.*?-]*)(?P<slash>/(?P<op>[\w*?]+)(\[(?P<ordinal>\d+)\])?)?(@(?P<number>\d+))?")
_WORDS = {
    "dtype": re.compile("|".join(DTYPES)), "rows": re.compile(r"\d+"), "shape": re.compile(r"\d+(x\d+)*"),
    "device": re.compile(r"\w+"),
}  # fmt: skip


class Selector:
    """A compiled selector; `matches(call)` tells. `fits(call)` looks only at the call's arguments, not at its place."""

    def __init__(self, where: Any = None):
        self.where = where
        self.matches: Callable[[Call], bool] = _compile(where)
        self.fits: Callable[[Call], bool] = _compile(where, anywhere=True)

    def nearest(self, addresses: Iterable[str], count: int = 5) -> list[str]:
        """Of the addresses of calls, and the modules they are made in, those that are spelt most like the selector."""
        if not isinstance(self.where, str):
            return []
        known = dict.fromkeys(each for address in addresses for each in (address, address.partition("/")[0]) if each)
        return difflib.get_close_matches(self.where, known, count, 0.4)

    def same(self, other: Selector) -> bool:
        """Whether both mean the same calls, as far as that can be told: functions do when they stand in one place."""
        return type(self) is type(other) and _same(self.where, other.where)

    def __repr__(self) -> str:
        return "every call" if self.where is None else repr(self.where)


class Inside(Selector):
    """The calls made inside a module that `where` means: of this very module, whatever its path."""

    def __init__(self, module: Any, where: Any = None):
        super().__init__(where)
        self._module, self._meant = module, self.matches
        self.matches = self._matches

    def same(self, other: Selector) -> bool:
        return isinstance(other, Inside) and self._module is other._module and _same(self.where, other.where)

    def _matches(self, call: Call) -> bool:
        scope = call.scope
        while scope is not None and scope.module is not self._module:
            scope = scope.parent
        return scope is not None and self._meant(call)

    def __repr__(self) -> str:
        kind = type(self._module).__name__
        return f"inside this {kind}" + ("" if self.where is None else f", {self.where!r}")


def _same(a: Any, b: Any) -> bool:
    if callable(a) and callable(b) and hasattr(a, "__code__") and hasattr(b, "__code__"):
        return a.__qualname__ == b.__qualname__ and a.__code__.co_code == b.__code__.co_code
    return bool(a == b)


def _compile(where: Any, anywhere: bool = False) -> Callable[[Call], bool]:
    if where is None:
        return lambda call: True
    if isinstance(where, Selector):
        return where.fits if anywhere else where.matches
    if isinstance(where, str):
        return _any([_one(part.strip(), anywhere) for part in where.split(",")])
    if hasattr(where, "rule") and hasattr(where, "name"):
        return lambda call: call.op is where
    if isinstance(where, (list, tuple, set, frozenset)):
        if not where:
            raise SelectorError("an empty list of selectors means no call; pass None for every call")
        return _any([_compile(each, anywhere) for each in where])
    if callable(where):
        return lambda call: _asked(where, call)
    raise SelectorError(f"a selector is a string, a function of the call, an op or a list of these, not {where!r}")


def _asked(where: Callable[[Call], Any], call: Call) -> bool:
    """What a function of the user's says. Raises SelectorError that names it."""
    try:
        return bool(where(call))
    except Exception as error:
        raise SelectorError(
            f"the selector {place(where)} raised {type(error).__name__}, asked of {call!r}: {error}"
        ) from error


def _any(tests: list[Callable[[Call], bool]]) -> Callable[[Call], bool]:
    return tests[0] if len(tests) == 1 else lambda call: any(test(call) for test in tests)


def _one(text: str, anywhere: bool) -> Callable[[Call], bool]:
    words = text.split()
    address = _ADDRESS.fullmatch(words[0]) if words and "=" not in words[0] else _ADDRESS.fullmatch("")
    if not words or address is None:
        raise SelectorError(
            f"selector {text!r} is not understood; examples: 'layers.0-3', 'layers.0/linear[0]', '/rope'"
        )
    tests = [_word(word, text) for word in (words if "=" in words[0] else words[1:])]
    path, op = path_pattern(address["path"]), _glob(address["op"] or "*")
    ordinal, number = address["ordinal"], address["number"]
    if anywhere:
        return lambda call: all(test(call) for test in tests)

    def matches(call: Call) -> bool:
        return (
            (ordinal is None or call.ordinal == int(ordinal))
            and (number is None or call.scope.number == int(number))
            and op.fullmatch(call.op.name) is not None
            and path.fullmatch(call.path) is not None
            and all(test(call) for test in tests)
        )

    return matches


def path_pattern(path: str) -> re.Pattern[str]:
    """The pattern for the path part of a selector: a glob, else the module and its subtree."""
    if not path:
        return re.compile(".*")
    segments = [_segment(segment) for segment in path.split(".")]
    globbed = "*" in path or "?" in path
    return re.compile(r"\.".join(segments) + ("" if globbed else r"(\..*)?"))


def _segment(segment: str) -> str:
    numbers = re.fullmatch(r"(\d+)-(\d+)", segment)
    if not numbers:
        return _glob(segment).pattern
    low, high = int(numbers[1]), int(numbers[2])
    if low > high:
        raise SelectorError(f"the range {segment} is empty; write it as {high}-{low}")
    return "(" + "|".join(str(i) for i in range(low, high + 1)) + ")"


def _glob(text: str) -> re.Pattern[str]:
    return re.compile(re.escape(text).replace(r"\*", ".*").replace(r"\?", "."))


def _word(word: str, text: str) -> Callable[[Call], bool]:
    key, _, value = word.partition("=")
    if key not in _WORDS or not _WORDS[key].fullmatch(value):
        raise SelectorError(
            f"selector {text!r}: {word!r} is not understood; further words are as rows=1, shape=1x64, dtype=float32 "
            f"(the dtypes are {', '.join(DTYPES)})"
        )

    def matches(call: Call) -> bool:
        specs = (getattr(each, "spec", each) for each in call.args)  # of a recorded call they are all that is left
        first = next((each for each in specs if isinstance(each, Spec)), None)
        if first is None:
            return False
        given = {"dtype": first.dtype, "device": first.device, "rows": str(first.shape[0] if first.shape else 1)}
        return given.get(key, "x".join(map(str, first.shape))) == value

    return matches
