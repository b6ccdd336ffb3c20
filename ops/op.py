"""Op, and the one seam: every op call of every model goes through `Op.__call__`.

    rule -> Call -> interceptors, when there are any -> launch

The rule is the decorated function itself: it checks shapes and dtypes and declares the outputs with `like`. Beside it
stand the NumPy reference, the op's living definition, and the kernel, a function from specs to TIR.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from typing import Any, Generic, ParamSpec, TypeVar, cast

import numpy as np

from . import build, intercept, memory
from .call import Call, Kernel, as_tuple, raw, signature_line
from .errors import KernelError, OpError, ShapeError
from .scope import current
from .select import Selector
from .spec import Dim, Spec
from .tensor import Tensor, _wrap

P = ParamSpec("P")
R = TypeVar("R")

registry: dict[str, Op] = {}
_MEMO_LIMIT = 16384  # call shapes an op remembers, then it starts afresh


def like(x: Any, shape: tuple | None = None, dtype: str | None = None) -> Tensor:
    """In a rule: declares an output like `x`, or with another shape or dtype. Nothing is allocated."""
    return cast(Tensor, (x if isinstance(x, Spec) else x.spec).like(shape, dtype))


class Plan:
    """What an op does for one combination of specs and constants: its outputs and its compiled kernel."""

    __slots__ = ("constants", "op", "outputs", "run", "specs")

    def __init__(self, op: Op, specs: tuple, constants: dict[str, Any], outputs: tuple[Spec, ...]):
        self.op, self.specs, self.constants, self.outputs = op, specs, constants, outputs
        empty = bool(outputs) and all(spec.size == 0 for spec in outputs)
        self.run: Callable[..., Any] = (lambda *_: None) if empty else self._build_and_run

    def request(self) -> build.Request:
        """What to compile: the op at symbolic sizes."""
        return build.Request(self.op, self.op.symbolic_specs(self.specs), self.constants)

    def _build_and_run(self, *data: Any) -> None:
        self.run = build.function(self.request())
        self.run(*data)


class Use:
    """A kernel in use for the calls that a selector means. `hits` counts them; `remove()` ends it."""

    def __init__(self, op: Op, kernel: Kernel, where: Selector):
        self.op, self.kernel, self.where, self.hits = op, kernel, where, 0

    def remove(self) -> None:
        """The kernel from before is back. Removing twice is harmless."""
        self.op._uses = tuple(use for use in self.op._uses if use is not self)

    def __enter__(self) -> Use:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"<{self.op.name} by {self.kernel} where {self.where}, {self.hits} hits>"


class Op(Generic[P, R]):
    """An op: call it with tensors. `reference`, `tir`, `source` and `spec` show what it is; `use` replaces its kernel."""

    def __init__(self, rule: Callable[P, R], symbolic: Mapping[str, str], ranges: tuple[int, ...], writes: Collection[str]):
        self.name = rule.__name__
        self.rule = rule
        self.writes = tuple(writes)
        self.symbolic = dict(symbolic)
        self.ranges = ranges
        self.__doc__, self.__name__, self.__qualname__ = rule.__doc__, rule.__name__, rule.__name__
        self.__module__ = rule.__module__
        self.__signature__ = inspect.signature(rule)
        parameters = self.__signature__.parameters
        self.parameters = tuple(n for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD)
        unknown = {*self.writes, *self.symbolic} - {*self.parameters}
        if unknown:
            raise TypeError(f"{self.name}: writes= and symbolic= name {sorted(unknown)}, which are no arguments of it")
        self._reference: Callable | None = None
        self._kernel: Callable | None = None
        self._templates: dict[str, Callable] = {}
        self._composed: Callable | None = None
        self._uses: tuple[Use, ...] = ()
        self._plans: dict[tuple, Plan] = {}
        registry[self.name] = self

    def __call__(self, *args: P.args, **constants: P.kwargs) -> R:
        counts = current.get().counts
        name = self.name
        counts[name] = counts.get(name, 0) + 1
        if self._uses or intercept._installed or intercept._local.get():
            return self._observed(args, constants)
        key = (*[each.spec if type(each) is Tensor else type(each) for each in args], *constants.items())
        plan = self._plans.get(key)
        if plan is None:
            plan, args = self._first(key, args, constants)
        try:
            if len(plan.outputs) == 1:
                spec = plan.outputs[0]
                buffer = spec.free.pop() if spec.free else memory.allocate(spec)
                plan.run(*[a.buffer.data if type(a) is Tensor else a for a in args if a is not None], buffer.data)
                return cast(R, _wrap(spec, buffer))
            outputs = tuple(_wrap(spec, memory.allocate(spec)) for spec in plan.outputs)
            plan.run(*raw(args), *[each.buffer.data for each in outputs])
        except Exception as error:
            raise self._explained(error, args, constants) from error
        return cast(R, outputs or None)

    def _observed(self, args: tuple, constants: dict[str, Any]) -> Any:
        """The same call when a tool looks on, or another kernel is in use."""
        args, constants = self._bound(args, constants)
        self.plan(args, constants)  # the rule speaks first: an interceptor never sees a malformed call
        scope = current.get()
        call = Call(self, args, constants, scope, scope.counts[self.name] - 1)
        return intercept.through_call(intercept.active(), call, self._launch)

    def _launch(self, call: Call) -> Any:
        args, constants = self._bound(call.args, call.constants)
        plan = self.plan(args, constants)
        outputs = tuple(_wrap(spec, memory.allocate(spec)) for spec in plan.outputs)
        use = next((use for use in reversed(self._uses) if use.where.matches(call)), None)
        try:
            if use is None:
                plan.run(*raw(args), *[each.buffer.data for each in outputs])
            else:
                use.hits += 1
                use.kernel.launch(call, outputs)
        except Exception as error:
            raise self._explained(error, args, constants) from error
        return outputs[0] if len(outputs) == 1 else outputs or None

    def _first(self, key: tuple, args: tuple, constants: dict[str, Any]) -> tuple[Plan, tuple]:
        """The plan of a call shape not seen before, remembered under the key of the call as it was written."""
        bound, full = self._bound(args, constants)
        plan = self.plan(bound, full)
        if constants.keys().isdisjoint(self.parameters):  # a tensor given by name is not part of a key
            self._plans[key] = plan
        return plan, bound

    def plan(self, args: tuple, constants: dict[str, Any]) -> Plan:
        """The plan for bound arguments, made by the rule when their specs are new."""
        specs = tuple(each.spec if type(each) is Tensor else each for each in args)
        key = (*[each if type(each) is Spec else type(each) for each in specs], *constants.items())
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= _MEMO_LIMIT:
                self._plans.clear()
            plan = self._plans[key] = Plan(self, specs, constants, self._outputs(specs, constants))
        return plan

    def _bound(self, args: tuple, constants: Mapping[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Run-time arguments in order and all constants, defaults filled in; raises what the caller must mend."""
        try:
            bound = self.__signature__.bind(*args, **constants)
        except TypeError as error:
            raise OpError(f"{self.signature}: {error}") from None
        bound.apply_defaults()
        values = [bound.arguments[name] for name in self.parameters]
        for name, value in zip(self.parameters, values, strict=True):
            wanted = str(self.__signature__.parameters[name].annotation)
            kinds = {"int": int, "float": (int, float)}.get(wanted, (Tensor, Spec))
            if not isinstance(value, kinds) and not (value is None and "None" in wanted):
                given = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
                hint = "; pass ops.tensor(...)" if "Tensor" in wanted else ""
                raise OpError(f"{self._here}: {name} is {given}, expected {wanted}{hint}")
        while values and values[-1] is None:
            values.pop()
        return tuple(values), {n: v for n, v in bound.arguments.items() if n not in self.parameters}

    def _outputs(self, specs: tuple, constants: dict[str, Any]) -> tuple[Spec, ...]:
        try:
            return cast("tuple[Spec, ...]", as_tuple(self.rule(*specs, **constants)))  # type: ignore[call-arg]
        except OpError as error:
            raise type(error)(f"{self._here}: {error}") from None

    @property
    def _here(self) -> str:
        path = current.get().path
        return f"{self.name} in {path}" if path else self.name

    def _explained(self, error: Exception, args: tuple, constants: dict[str, Any]) -> Exception:
        """The error of a launch, with the call it happened in. What the user's own code raised keeps its type."""
        if isinstance(error, (OpError, KernelError)):
            return error
        shown = ", ".join(str(each.spec) if isinstance(each, Tensor) else repr(each) for each in args)
        more = "".join(f", {name}={value!r}" for name, value in constants.items())
        return KernelError(f"{self._here}({shown}{more}): {error}")

    def symbolic_specs(self, specs: tuple) -> tuple:
        """`specs` with the leading sizes that a kernel leaves open replaced by `Dim`, by the range they fall in."""
        sizes: dict[str, tuple[int, Dim | int]] = {}
        result = []
        for name, spec in zip(self.parameters, specs, strict=False):
            dim = self.symbolic.get(name)
            if dim is None or not isinstance(spec, Spec):
                result.append(spec)
                continue
            size = spec.shape[0]
            known, open_size = sizes.setdefault(dim, (size, self._range(dim, size)))
            if known != size:
                raise ShapeError(f"{self._here}: {name} is {spec}, expected {known} for its first size")
            result.append(spec.like((open_size, *spec.shape[1:])))
        return tuple(result)

    def _range(self, dim: str, size: int) -> Dim | int:
        lows = [low for low in self.ranges if low <= size] or [self.ranges[0]]
        above = [low for low in self.ranges if low > lows[-1]]
        high = above[0] - 1 if above else None
        return size if lows[-1] == high == size else Dim(dim, lows[-1], high)

    def spec(self, *args: Any, **constants: Any) -> Any:
        """Shapes and dtypes of the outputs for tensors or specs, symbolic sizes included; allocates nothing."""
        args, constants = self._bound(args, constants)
        outputs = self._outputs(tuple(a.spec if isinstance(a, Tensor) else a for a in args), constants)
        return outputs[0] if len(outputs) == 1 else outputs

    def reference(self, *args: Any, **constants: Any) -> Any:
        """Run the NumPy definition on tensors or arrays, in float32 or float64: outputs, then written arguments.

        With a function as the only argument, before there is a reference: registers it (`@my_op.reference`).
        """
        if self._reference is None:
            if len(args) == 1 and inspect.isfunction(args[0]):
                self._reference = args[0]
                return args[0]
            raise OpError(f"{self.name} has no reference; register one with @{self.name}.reference")
        arrays = [np.asarray(each) if isinstance(each, Tensor) else each for each in args]
        constants = {n: np.asarray(v) if isinstance(v, Tensor) else v for n, v in constants.items()}
        return self._reference(*arrays, **constants)

    def kernel(self, builder: Callable) -> Callable:
        """Registers the op's block definition: specs and constants to a PrimFunc of s_tir blocks."""
        self._kernel = builder
        return builder

    def template(self, device: str) -> Callable[[Callable], Callable]:
        """Registers a fast kernel for a kind of device; it may return None where it does not apply."""

        def register(builder: Callable) -> Callable:
            self._templates[device] = builder
            return builder

        return register

    def composed(self, function: Callable) -> Callable:
        """Registers the op written with other ops: the steps that `steps()` runs."""
        self._composed = function
        return function

    def steps(self) -> AbstractContextManager[None]:
        """`with ops.attention.steps():` the op runs as separate calls of its steps, each seen by every tool."""
        if self._composed is None:
            raise OpError(f"{self.name} has no steps; it is one kernel")
        return intercept.intercepted(_Steps(self, self._composed))

    def use(self, kernel: Any, where: Any = None) -> Use:
        """Use another kernel for the calls that `where` means (all, when None); the last one in use wins.

        `kernel`: a `Kernel`, a TIR PrimFunc over the inputs and then the outputs, or a Python function with the
        signature of the op's reference. Gives a handle with `hits` and `remove()`, also usable in `with`.
        """
        if not isinstance(kernel, Kernel):
            if build.is_primfunc(kernel):
                kernel = Kernel.from_compiled(f"{self.name} (PrimFunc)", build.compiled(kernel, self.name))
            elif callable(kernel):
                kernel = Kernel.from_python(kernel)
            else:
                raise OpError(f"{self.name}.use takes a Kernel, a PrimFunc or a function, not {type(kernel).__name__}")
        use = Use(self, kernel, Selector(where))
        self._uses = (*self._uses, use)
        return use

    def tir(self, *args: Any, **constants: Any) -> build.Text:
        """The TVMScript of the op's block definition at these arguments' shapes."""
        return build.tir(self._request(args, constants))

    def source(self, language: str, *args: Any, **constants: Any) -> build.Text:
        """Generated code for these arguments' shapes: "llvm", "asm" or "c"."""
        return build.source(self._request(args, constants), language)

    def _request(self, args: tuple, constants: dict[str, Any]) -> build.Request:
        args, constants = self._bound(args, constants)
        return self.plan(args, constants).request()

    @property
    def signature(self) -> str:
        return signature_line(self.name, self.rule)

    def __repr__(self) -> str:
        return f"ops.{self.signature}"


class _Steps(intercept.Interceptor):
    def __init__(self, op: Op, composed: Callable):
        self._op, self._composed = op, composed

    def call(self, call: Call, launch: Callable[[Call], Any]) -> Any:
        return self._composed(*call.args, **call.constants) if call.op is self._op else launch(call)


def op(
    *, symbolic: Mapping[str, str] | None = None, ranges: tuple[int, ...] = (1,), writes: Collection[str] = ()
) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Makes an op of a rule. Positional arguments are run-time values, keyword-only ones compile-time constants.

    `symbolic` names the arguments whose leading size stays open in the kernel, by the name of that size: equal names,
    equal sizes. `ranges` are the first sizes of the ranges that get a kernel each: (1, 2, 17) makes one for 1, one for
    2-16, one for 17 and more. `writes` names the arguments that the kernel writes.
    """
    return lambda rule: Op(rule, symbolic or {}, ranges, writes)
