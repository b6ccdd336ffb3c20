"""Op, and the one seam: every op call of every model goes through `Op.__call__`.

    rule -> Call -> interceptors, when there are any -> launch

The rule is the decorated function itself: it checks shapes and dtypes and declares the outputs with `like`. Beside it
stand the NumPy reference, the op's living definition, and the kernel, a function from specs to TIR.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, Generic, NoReturn, ParamSpec, TypeVar, cast

from . import build, intercept, memory
from .call import Call, Use, as_tuple, raw
from .errors import KernelError, OpError, ShapeError, announce
from .op_tools import OpTools
from .parameters import kind_of, signature_line, type_name
from .plan import Plan
from .scope import active, current, pass_call
from .spec import Dim, Spec
from .tensor import Tensor, _wrap

Symbolic = Mapping[str, str | tuple[str | None, ...]]  # which sizes of which arguments stay open

P = ParamSpec("P")
R = TypeVar("R")

registry: dict[str, Op] = {}
_MEMO_LIMIT = 16384  # call shapes an op remembers, then it starts afresh
_new = object.__new__


def like(x: Any, shape: tuple | None = None, dtype: str | None = None) -> Tensor:
    """In a rule: declares an output like `x`, or with another shape or dtype. Nothing is allocated."""
    return cast(Tensor, (x if isinstance(x, Spec) else x.spec).like(shape, dtype))


class Op(OpTools, Generic[P, R]):
    """An op: call it with tensors. `reference`, `tir`, `source`, `spec` show what it is; `use` replaces its kernel."""

    def __init__(self, rule: Callable[P, R], symbolic: Symbolic, ranges: tuple[int, ...], writes: Collection[str]):
        self.name = rule.__name__
        self.rule = rule
        self.writes = tuple(writes)
        self.symbolic = {name: (sizes,) if isinstance(sizes, str) else tuple(sizes) for name, sizes in symbolic.items()}
        self.ranges = ranges
        self.__doc__, self.__name__, self.__qualname__ = rule.__doc__, rule.__name__, rule.__name__
        self.__module__ = rule.__module__
        self.__signature__ = inspect.signature(rule)
        parameters = self.__signature__.parameters
        self.parameters = tuple(n for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD)
        self._kinds = tuple(kind_of(self.name, parameters[name]) for name in self.parameters)
        unknown = {*self.writes, *self.symbolic} - {*self.parameters}
        if unknown:
            raise TypeError(f"{self.name}: writes= and symbolic= name {sorted(unknown)}, which are no arguments of it")
        self._reference: Callable | None = None
        self._kernel: Callable | None = None
        self._templates: dict[str, Callable] = {}
        self._composed: Callable | None = None
        self._examples: Callable | None = None
        self._uses: tuple[Use, ...] = ()
        self._plans: dict[tuple, Plan] = {}
        registry[self.name] = self

    def __call__(self, *args: P.args, **constants: P.kwargs) -> R:
        counts = current.get().counts
        name = self.name
        counts[name] = counts.get(name, 0) + 1
        specs: list[Any] = []
        data: list[Any] = []
        for each in args:
            if type(each) is Tensor:
                specs.append(each.spec)
                data.append(each.buffer.data)
            else:  # a number, or an argument left out
                specs.append(type(each))
                if each is not None:
                    data.append(each)
        key = (*specs, *constants.items())
        try:
            try:
                plan = self._plans.get(key)
            except TypeError as error:
                raise OpError(f"{self._here}: a constant is a number, a string or a tuple, not {error}") from None
            if plan is None:
                plan, args = self._first(key, args, constants)  # type: ignore[assignment]
                data = raw(args)
            if self._uses or intercept._installed or intercept._local.get():
                return self._observed(plan, args)
            try:
                spec = plan.output
                if spec is not None:
                    try:
                        buffer = spec.free.pop()  # memory.allocate, without its call
                    except IndexError:
                        buffer = memory.allocate(spec)
                    data.append(buffer.data)
                    plan.run(*data)
                    result = _new(Tensor)  # `_wrap`, without its call
                    result.spec, result.buffer, result.owner = spec, buffer, None
                    return result  # type: ignore[return-value]
                outputs: tuple[Tensor, ...] = ()
                if plan.outputs:
                    outputs = tuple([_wrap(spec, memory.allocate(spec)) for spec in plan.outputs])
                    data += [each.buffer.data for each in outputs]
                plan.run(*data)
            except Exception as error:
                self._fail(error, args, constants)
            return outputs or None  # type: ignore[return-value]
        except (OpError, KernelError) as error:
            announce(error, Call(self, args, constants, current.get(), counts[name] - 1))
            raise

    def _observed(self, plan: Plan, args: tuple) -> Any:
        """The same call when a tool looks on, or another kernel is in use. The rule has spoken already."""
        while args and args[-1] is None:
            args = args[:-1]
        scope = current.get()
        call = Call(self, args, dict(plan.constants), scope, scope.counts[self.name] - 1, plan)

        def launch(changed: Call) -> Any:
            if changed.args is args and changed.constants == plan.constants:
                return self._launch(plan, changed)
            bound, constants = self._bound(changed.args, changed.constants)
            return self._launch(self.plan(bound, constants), changed.replace(bound, constants))

        return pass_call(active(scope), call, launch)

    def used_for(self, call: Call) -> Use | None:
        """Which `use` computes a call of this op; None when it is the op's own kernel."""
        return next((use for use in reversed(self._uses) if use.applies(call)), None)

    def _launch(self, plan: Plan, call: Call) -> Any:
        use = self.used_for(call)
        try:
            outputs = tuple(_wrap(spec, memory.allocate(spec)) for spec in plan.outputs)
            if use is None:
                plan.run(*raw(call.args), *[each.buffer.data for each in outputs])
            else:
                use.launch(call, outputs)
        except Exception as error:
            self._fail(error, call.args, call.constants)
        return outputs[0] if len(outputs) == 1 else outputs or None

    def _first(self, key: tuple, args: tuple, constants: dict[str, Any]) -> tuple[Plan, tuple]:
        """The plan of a call shape not seen before, remembered under the key of the call as it was written."""
        bound, full = self._bound(args, constants)
        plan = self.plan(bound, full)
        # Neither a tensor given by name nor a default filled in is among the arguments that the key stands for.
        if len(bound) <= len(args) and constants.keys().isdisjoint(self.parameters):
            self._plans[key] = plan
        return plan, bound

    def plan(self, args: tuple, constants: dict[str, Any]) -> Plan:
        """The plan for bound arguments, made by the rule when their specs are new."""
        specs = self._specs(args)
        key = (*specs, *constants.items())
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= _MEMO_LIMIT:
                self._plans.clear()
            self._check_device(specs)
            plan = self._plans[key] = Plan(self, specs, constants, self._outputs(specs, constants))
        return plan

    def _check_device(self, specs: tuple) -> None:
        """Raise OpError for tensors of several devices."""
        given = [(n, each) for n, each in zip(self.parameters, specs, strict=False) if isinstance(each, Spec)]
        for name, each in given[1:]:
            if each.device != (device := given[0][1].device):
                raise OpError(
                    f"{self._here}: {given[0][0]} is on {device!r} and {name} on {each.device!r}; a call's tensors are "
                    f"on one device: {name}.to({device!r})"
                )

    def _specs(self, args: tuple) -> tuple:
        """What the rule gets for bound arguments: a spec for a tensor, the type for a scalar."""
        return tuple(
            each.spec if type(each) is Tensor else each if each is None or kind is Tensor else kind
            for each, (kind, _) in zip(args, self._kinds, strict=False)
        )

    def _bound(self, args: tuple, constants: Mapping[str, Any], also: type = Tensor) -> tuple[tuple, dict[str, Any]]:
        """Run-time arguments in order and all constants, defaults filled in; raises what the caller must mend.

        `also` is what may stand in a tensor's place.
        """
        try:
            bound = self.__signature__.bind(*args, **constants)
        except TypeError as error:
            raise OpError(f"{self.signature}: {error}") from None
        bound.apply_defaults()
        values = [bound.arguments.pop(name) for name in self.parameters]
        for name, value, (kind, optional) in zip(self.parameters, values, self._kinds, strict=True):
            kinds = (Tensor, also) if kind is Tensor else (int, float) if kind is float else (kind,)
            if not isinstance(value, kinds) and not (value is None and optional):
                expected = f"{kind.__name__}{' or None' if optional else ''}"
                hint = "; pass ops.tensor(...)" if kind is Tensor else ""
                raise OpError(f"{self._here}: {name} is {type_name(value)}, expected {expected}{hint}")
        for name, value in bound.arguments.items():
            if isinstance(value, (Tensor, Spec)):
                raise OpError(f"{self._here}: {name} is {type_name(value)}; it is a compile-time constant")
        while values and values[-1] is None:
            values.pop()
        return tuple(values), bound.arguments

    def _outputs(self, specs: tuple, constants: dict[str, Any]) -> tuple[Spec, ...]:
        try:
            return cast("tuple[Spec, ...]", as_tuple(self.rule(*specs, **constants)))  # type: ignore[call-arg]
        except OpError as error:
            raise type(error)(f"{self._here}: {error}") from None

    @property
    def _here(self) -> str:
        path = current.get().path
        return f"{self.name} in {path}" if path else self.name

    def _fail(self, error: Exception, args: tuple, constants: dict[str, Any]) -> NoReturn:
        """Raise the error of a launch as a KernelError that tells which call it was; its cause is chained."""
        if isinstance(error, (OpError, KernelError)):
            raise error
        shown = ", ".join(str(each.spec) if isinstance(each, Tensor) else repr(each) for each in args)
        more = "".join(f", {name}={value!r}" for name, value in constants.items())
        raise KernelError(f"{self._here}({shown}{more}): {str(error) or type(error).__name__}") from error

    def symbolic_specs(self, specs: tuple) -> tuple:
        """`specs` with the sizes that a kernel leaves open replaced by `Dim`, by the range they fall in."""
        sizes: dict[str, tuple[int, Dim | int]] = {}
        result = []
        for name, spec in zip(self.parameters, specs, strict=False):
            if not isinstance(spec, Spec):
                result.append(spec)
                continue
            shape = list(spec.shape)
            for axis, dim in enumerate(self.symbolic.get(name, ())[: spec.ndim]):
                if dim is None:
                    continue
                known, shape[axis] = sizes.setdefault(dim, (shape[axis], self._range(dim, shape[axis])))
                if known != spec.shape[axis]:
                    raise ShapeError(f"{self._here}: {name} is {spec}, expected {known} for its size {axis}")
            result.append(spec.like(tuple(shape)))
        return tuple(result)

    def _range(self, dim: str, size: int) -> Dim | int:
        """The range that `size` falls in. Only the first open size has several: the others make no variants."""
        if dim != next(each for sizes in self.symbolic.values() for each in sizes if each):
            return Dim(dim)
        lows = [low for low in self.ranges if low <= size] or [self.ranges[0]]
        above = [low for low in self.ranges if low > lows[-1]]
        high = above[0] - 1 if above else None
        return size if lows[-1] == high == size else Dim(dim, lows[-1], high)

    def spec(self, *args: Any, **constants: Any) -> Any:
        """Shapes and dtypes of the outputs for tensors or specs, symbolic sizes included; allocates nothing."""
        args, constants = self._bound(args, constants, also=Spec)
        outputs = self._outputs(self._specs(args), constants)
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
        arrays = [each.numpy() if isinstance(each, Tensor) else each for each in args]
        constants = {n: v.numpy() if isinstance(v, Tensor) else v for n, v in constants.items()}
        return self._reference(*arrays, **constants)

    def kernel(self, builder: Callable) -> Callable:
        """Registers the op's block definition: specs and constants to a PrimFunc of s_tir blocks."""
        self._kernel = builder
        self._plans.clear()
        return builder

    def template(self, device: str) -> Callable[[Callable], Callable]:
        """Registers a fast kernel for "cpu" or "gpu"; it may return None where it does not apply. "check": the checks
        of arguments' values that run in front of a GPU's kernel, where the block definition has none."""

        def register(builder: Callable) -> Callable:
            self._templates[device] = builder
            self._plans.clear()
            return builder

        return register

    @property
    def builders(self) -> tuple[Callable, ...]:
        """The functions that decide what the compiled kernel is."""
        return tuple(each for each in (self.rule, self._kernel, *self._templates.values()) if each is not None)

    def composed(self, function: Callable) -> Callable:
        """Registers the op written with other ops: the steps that `steps()` runs."""
        self._composed = function
        return function

    def examples(self, function: Callable) -> Callable:
        """Registers small calls at the edges of what the op takes: see `ops.examples`."""
        self._examples = function
        return function

    def _request(self, args: tuple, constants: dict[str, Any]) -> build.Request:
        return self.plan(*self._bound(args, constants, also=Spec)).request()

    @property
    def signature(self) -> str:
        return signature_line(self.name, self.rule)

    def __repr__(self) -> str:
        return f"ops.{self.signature}"


def op(
    *, symbolic: Symbolic | None = None, ranges: tuple[int, ...] = (1,), writes: Collection[str] = ()
) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Makes an op of a rule. Positional arguments are run-time values, keyword-only ones compile-time constants.

    The rule and the kernel's builder get a `Spec` for a tensor and the type, int or float, for a scalar: what they
    decide holds for every value.

    `symbolic` names the arguments whose leading size stays open in the kernel, by the name of that size: equal names,
    equal sizes. A tuple names the sizes in order, None for a fixed one: ("n", None, "t"). `ranges` are the first sizes
    of the ranges of the first open size that get a kernel each: (1, 2, 17) makes one for 1, one for 2-16, one for 17
    and more. `writes` names the arguments that the kernel writes.
    """
    return lambda rule: Op(rule, symbolic or {}, ranges, writes)
