"""What people do with an op besides calling it: replace its kernel, race kernels, look at what was generated."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, cast

from . import build, intercept
from .call import Call, Kernel, Use, uses_lock
from .errors import OpError
from .scope import current
from .select import Selector
from .steps import Steps

if TYPE_CHECKING:
    from .op import Op
    from .race import Race
    from .swap import Swap
    from .table import Table


class OpTools:
    """Methods of `Op`."""

    @property
    def _op(self) -> Op:
        return cast("Op", self)

    def steps(self) -> AbstractContextManager[None]:
        """`with ops.attention.steps():` the op runs as separate calls of its steps, each seen by every tool."""
        if self._op._composed is None:
            raise OpError(f"{self._op.name} has no steps; it is one kernel")
        return intercept.intercepted(Steps(self._op, self._op._composed))

    def use(self, kernel: Any, where: Any = None) -> Use:
        """Use another kernel for the calls that `where` means (all, when None); the last one in use wins.

        `kernel`: a `Kernel`, a TIR PrimFunc over the inputs and then the outputs, or a Python function with the
        signature of the op's reference. Gives a handle with `hits` and `remove()`, also usable in `with`.
        """
        if not isinstance(kernel, Kernel):
            if build.is_primfunc(kernel):
                kernel = Kernel.from_compiled(f"{self._op.name} (PrimFunc)", build.compiled(kernel, self._op.name))
            elif callable(kernel):
                kernel = Kernel.from_python(kernel)
            else:
                given = type(kernel).__name__
                raise OpError(f"{self._op.name}.use takes a Kernel, a PrimFunc or a function, not {given}")
        use = Use(self._op, kernel, Selector(where))
        with uses_lock:
            self._op._uses = (*self._op._uses, use)
        return use

    def swap(self, language: str, **options: Any) -> Callable[[Any], Swap]:
        """Decorator: replaces the op's kernel by hand-written source, for some calls or all; gives a `Swap`.

        `language`: "c", "c++", "cuda", "metal", "wgsl", "opencl" (the text is the function's docstring, what it
        returns, or in `file=`), "python", "tvmscript", "triton" (what is decorated is the kernel). Options:

        where       a selector: which calls (all, when None)
        check       which calls are compared with the reference: "first 8, then 1/64", "always", "never"
        edge_cases  False: not compared with the reference on the op's edge cases first
        grid, block, shared
                    blocks, threads of a block, bytes of shared memory: numbers, tuples, functions of the call's tensors
        dims        more names for parameters: {"heads": lambda q, *_: q.shape[1]}
        file        where the text is
        device      "emulate": on the CPU
        flags       for the compiler
        sandbox     False: it runs in this process at once
        active      False: only in `with swap.active():`

        Raises SwapRefused for a kernel that does not fit the op or is wrong, SourceError for one that does not compile.
        """
        from .swap import decorator

        return decorator(self._op, language, **options)

    def eject(self, language: str, *args: Any, path: Any = None, **constants: Any) -> build.Text:
        """The kernel that TVM generates for such arguments, with the decorator around it, which swaps in unchanged.

        `language`: "c", "tvmscript", "cuda", "metal", "wgsl" or "opencl". Gives the text, and writes it to `path`,
        where no file may be yet.
        """
        from .eject import eject

        return eject(self._op, language, args, constants, path)

    def race(self, *args: Any, **constants: Any) -> Race:
        """All known kernels of the op on these arguments: time, share of what the machine can do, error. A table."""
        from .race import race

        bound, full = self._op._bound(args, constants)
        return race(Call(self._op, bound, full, current.get(), 0))

    @property
    def swaps(self) -> Table:
        """The swaps of this op, the first to be asked at the top."""
        from .swap import Swap, table

        return table([use for use in self._op._uses if isinstance(use, Swap)])

    def tir(self, *args: Any, **constants: Any) -> build.Text:
        """The TVMScript of the op's block definition at these arguments' shapes."""
        return build.tir(self._op._request(args, constants))

    def source(self, language: str, *args: Any, **constants: Any) -> build.Text:
        """Generated code for these arguments' shapes, in one of `ops.source.LANGUAGES`; needs no GPU."""
        from .source import source

        return source(self._op._request(args, constants), language)
