"""Where a call is made from: the path of the module that runs, and which outermost forward this is.

The runtime keeps one `Scope` per running module call. A module call passes through `run`, an op call through
`pass_call`: both go through the interceptors that are switched on, outermost first.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from . import intercept, threads
from .errors import OpError
from .intercept import Interceptor
from .tensor import Tensor

if TYPE_CHECKING:
    from .call import Call

_passes = itertools.count(1)
_NOBODY: frozenset[int] = frozenset()


class Scope:
    """One running module call: its path (`layers.3.self_attn`), its pass, and how often each op was called in it."""

    __slots__ = ("_path", "args", "busy", "constants", "counts", "module", "name", "number", "parent", "tools")

    def __init__(
        self, name: str, number: int, parent: Scope | None = None, module: Any = None, args=(), constants=None
    ):
        self.name = name  # in the parent; without a parent, the whole path
        self.number = number  # of the pass: 1 for the first outermost forward of the process
        self.parent = parent
        self.module = module
        self._path: str | None = None  # put together when it is first asked for
        self.args: tuple = args
        self.constants: dict[str, Any] = {} if constants is None else constants
        self.counts: dict[str, int] = {}
        self.busy: frozenset[int] = parent.busy if parent else _NOBODY  # interceptors whose own code runs, by id
        self.tools: dict[str, dict[str, int]] | None = None  # counts of the ops that interceptors call here themselves

    @property
    def path(self) -> str:
        """Where in the model, such as `layers.3.self_attn`."""
        if self._path is None:
            self._path = self.parent.below(self.name) if self.parent else self.name
        return self._path

    def of_tool(self, tool: Interceptor) -> Scope:
        """Where `tool` makes op calls of its own: it does not see them, and the model's ordinals do not move."""
        scope = Scope(tool.name, self.number, self, self.module)
        self.tools = self.tools or {}
        scope.counts = self.tools.setdefault(tool.name, scope.counts)
        scope.busy = self.busy | {id(tool)}
        return scope

    def below(self, name: str) -> str:
        """The path of what is called `name` in here."""
        path = self.path
        return f"{path}.{name}" if path and name else path or name

    def __repr__(self) -> str:
        return f"<{self.path or 'model'} in pass {self.number}>"


_root = Scope("", 0)
current: ContextVar[Scope] = ContextVar("limpid_scope", default=_root)


def run(module: Any, name: str, forward: Callable, args: tuple, kwargs: dict) -> Any:
    """Call `forward(*args, **kwargs)` in the scope of `module`, called `name` in the module around it."""
    outer = current.get()
    if outer is _root:
        threads.settle()
        scope = Scope("", next(_passes), outer, module, args, kwargs)
    else:
        scope = Scope(name, outer.number, outer, module, args, kwargs)
    if intercept._installed or intercept._local.get():
        return _pass_scope(active(scope), scope, forward)
    token = current.set(scope)
    try:
        return forward(*args, **kwargs)
    finally:
        current.reset(token)


def active(scope: Scope) -> tuple[Interceptor, ...]:
    """The interceptors that see what happens in `scope`: all that are on, but for those at work around it."""
    chain = intercept.chain()
    return tuple(each for each in chain if id(each) not in scope.busy) if scope.busy else chain


def pass_call(chain: tuple[Interceptor, ...], call: Call, launch: Callable[[Call], Any]) -> Any:
    """Take `call` through the interceptors, then `launch` it."""
    if not chain:
        return launch(call)
    first, rest, scope = chain[0], chain[1:], call.scope

    asked = [call]

    def proceed(changed: Call) -> Any:
        output = _inside(scope, pass_call, rest, changed, launch)  # below `first` it is the model's own call again
        if changed is not call:
            asked.append(changed)
        return output

    return _checked(_inside(scope.of_tool(first), first.call, call, proceed), asked, first)


def _pass_scope(chain: tuple[Interceptor, ...], scope: Scope, forward: Callable[..., Any]) -> Any:
    """Take a module call through the interceptors, then run its `forward`."""
    if not chain:
        return _inside(scope, forward, *scope.args, **scope.constants)
    first, rest = chain[0], chain[1:]

    def proceed(*args: Any, **kwargs: Any) -> Any:
        given = scope.args, scope.constants
        scope.counts.clear()  # a second run numbers its calls from 0 again
        scope.args, scope.constants = args, kwargs
        try:
            return _pass_scope(rest, scope, forward)
        finally:
            scope.args, scope.constants = given

    return _inside(scope.of_tool(first), first.scope, scope, proceed)


def _inside(scope: Scope, function: Callable, /, *args: Any, **kwargs: Any) -> Any:
    token = current.set(scope)
    try:
        return function(*args, **kwargs)
    finally:
        current.reset(token)


def _checked(output: Any, asked: list[Call], tool: Interceptor) -> Any:
    """What an interceptor gives must be what the op declares for the call, or for one that was passed on instead."""
    call, wanted = asked[0], asked[0].outputs
    given = output if isinstance(output, tuple) and len(wanted) != 1 else () if output is None else (output,)
    specs = tuple(each.spec if isinstance(each, Tensor) else None for each in given)
    if specs == wanted or any(specs == other.outputs for other in asked[1:]):
        return output
    shown = ", ".join(str(s or repr(type(each).__name__)) for s, each in zip(specs, given, strict=True)) or "None"
    expected = ", ".join(map(str, wanted)) or "None"
    raise OpError(f"{call.full_address}: {tool.name}.call gave {shown}, expected {expected}; return launch(call)")
