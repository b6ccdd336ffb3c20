"""Stopped: a call at which the prompt is open, and what its commands do: back, goto, rerun, edit, undo."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, Protocol

import ops
from ops import Call

from . import prompt
from .rewind import Edits, Pass, Place, Rewind, Step, Watched, fitting

__limpid_plumbing__ = True  # frames of this file pass calls on: the model's line is further out


class Asks(Protocol):
    """What is asked whether to stop: see `debug.stop.Stop`."""

    def means(self, call: Call, /) -> bool: ...
    def asked(self, call: Call, /) -> Any: ...
    def due(self, answer: Any, /) -> str: ...


class Stopped:
    """A call where the prompt may open, before the launch and after it, and what can be done there."""

    def __init__(self, run: Pass, step: Step | None):
        self.run, self.step = run, step
        self.again = False  # launch the call, once more when it was launched, and stop after that
        self._names: prompt.Names | None = None  # while the prompt is open
        self._phase = ""
        self._watched: Watched | None = None

    def make(self, call: Call, launch: Callable[[Call], Any], stops: Sequence[Asks]) -> Any:
        """Make the call, as often as it is asked for; stop where one of `stops` says so."""
        run, step, given = self.run, self.step, call
        assert step is not None
        start, place = run.mark(), run.place
        call = run.edited(step.key, given)
        here = place is None or place.key == step.key  # else a rewind is on its way, and stops nowhere before its place
        asked = [(each, each.asked(call)) for each in stops if here and each.means(call)]
        early = [] if place and place.phase == "after" else [each for each in asked if not callable(each[1])]
        reasons = [each.due(answer) for each, answer in early]
        if self._arrived("before") or any(reasons):
            call, _ = self._open("before", call, None, reasons)
            asked = [(each, each.asked(call)) for each, answer in asked if callable(answer)]
        while True:
            run.save(call)
            output = run.edited_output(step.key, call, launch(call))
            reasons = [each.due(answer(output)) for each, answer in asked if callable(answer)]
            if self.again or self._arrived("after") or any(reasons):
                call, output = self._open("after", call, output, reasons)
            if not self.again:
                break
            run.retry(step, start)
            call = run.edited(step.key, given)
            asked = [(each, each.asked(call)) for each, answer in asked if callable(answer)]
        run.end(step, output)
        return output

    def fail(self, call: Call, error: Exception, frame: FrameType) -> None:
        """Open the prompt where an op failed; the error goes on."""
        self._phase, self._names = "error", prompt.Names(frame, {"call": call, "error": error})
        commands = {name: getattr(self, name) for name in ("back", "goto", "rerun", "reload")}
        try:
            prompt.ask(frame, f"{type(error).__name__}: {error}", self._names, commands)
        finally:
            self._names = None

    def _arrived(self, phase: str) -> bool:
        """Whether this is where the rewind that is under way stops."""
        if self.run.place is None or self.step is None or self.run.place != Place(self.step.key, phase):
            return False
        self.run.place = None
        return True

    def _open(self, phase: str, call: Call, output: Any, reasons: list[str]) -> tuple[Call, Any]:
        """Open the prompt; gives call and output as they are afterwards."""
        frame, step = call.frame, self.step
        self.again = False
        if frame is None or step is None or not prompt.enabled():
            return call, output
        shown, self._phase = call.replace(constants=call.constants), phase
        self._names = prompt.Names(frame, {"call": shown})
        if call.outputs and phase == "after":
            self._names = prompt.Names(frame, {"call": shown, "output": output})
        self._watched = self.run.watch(call, output)
        when = "before its launch" if phase == "before" else "after its launch, before the model gets the output"
        text = ": ".join([f"Stop at {call.full_address}, {when}", *filter(None, reasons)])
        commands = {name: getattr(self, name) for name in ("back", "goto", "rerun", "edit", "undo", "reload")}
        try:
            prompt.ask(frame, text, self._names, commands)
        finally:
            shown = self._names["call"]
            if self._watched is not None:
                output = self._remember(call, shown, output)
            self._names = self._watched = None
        return shown, output

    def _remember(self, call: Call, shown: Call, output: Any) -> Any:
        """Remember what was edited at the prompt, for when the call is made again; gives the output as it is now."""
        assert self.step is not None and self._watched is not None and self._names is not None
        key, after = self.step.key, self._phase == "after"
        again = after and self.again
        for change in self.run.changed(self._watched):
            if not (again and change.kind == "output"):  # there will be another output
                place = Place(key, "before" if again else self._phase)
                self.run.edits.setdefault(place, Edits()).changes.append(change)
        args = {name: value for name, value in shown.inputs.items() if value is not call.inputs.get(name)}
        constants = {name: value for name, value in shown.constants.items() if value != call.constants.get(name)}
        if args or constants:
            self.run.edits.setdefault(Place(key, "before"), Edits()).replace(args, constants)
        if after and not again and call.outputs and self._names["output"] is not output:
            output = _fitted(self._names["output"], call)
            self.run.edits.setdefault(Place(key, "after"), Edits()).output = output
        return output

    # The commands at the prompt.

    def back(self, _: Any, argument: str) -> bool:
        """back [count]
        Go back to the previous call of this pass, or to the one `count` calls before, before its launch.
        """
        self._check()
        target = self.run.previous(int(argument or 1), self.step)
        raise Rewind(self.run, target, Place(target.key, "before"))

    def goto(self, _: Any, argument: str) -> bool:
        """goto ADDRESS
        Go back to the first call of this pass that a selector means, before its launch: `goto layers.3.self_attn` is
        the first call in that module. What was edited stays edited; what calls have written is put back.
        """
        self._check()
        if not argument:
            raise ops.OpError("goto takes an address, such as layers.3.self_attn or layers.3/add[0]")
        target = self.run.first(argument, self.step)
        raise Rewind(self.run, target, Place(target.key, "before"))

    def rerun(self, _: Any, argument: str) -> bool:
        """rerun [ADDRESS]
        Make this call again, with what was edited and with the kernel that is now in use, and stop after its launch.
        With an address: everything from the first call that it means.
        """
        failed = self._phase == "error"
        if not (argument or failed):
            if self._names is None:
                self._check()
            self.again = True
            return True
        self._check()
        if self.step is None:
            raise ops.OpError("this call failed before it was made: goto one before it")
        target = self.run.first(argument, self.step) if argument else self.step
        raise Rewind(self.run, target, Place(self.step.key, "after"))

    def edit(self, debugger: Any, argument: str) -> bool:
        """edit NAME = VALUE
        Replace an input of the call, or `output` after the launch, by a tensor, an array or a number; in this pass
        it stays so when the call is made again. An input of a call that was launched takes effect with `rerun`.
        """
        names = self._check(whole=False)
        call, (name, _, text) = names["call"], argument.partition("=")
        name, outputs = name.strip(), call.outputs
        known = [each for each, value in call.inputs.items() if value is not None]
        known += ["output"] if self._phase == "after" and len(outputs) == 1 and "output" not in known else []
        if name not in known or not text.strip():
            raise ops.OpError(f"edit takes NAME = VALUE, the name one of {', '.join(known)}; given {argument!r}")
        value = eval(text.strip(), debugger.curframe.f_globals, debugger.curframe_locals)
        if name in call.inputs:
            old = call.inputs[name]
            value = fitting(value, old.spec, name) if isinstance(old, ops.Tensor) else value
            call.args = tuple((call.inputs | {name: value}).values())
        else:
            names["output"] = fitting(value, outputs[0], name)
        return False

    def undo(self, _: Any, argument: str) -> bool:
        """undo
        Forget what was edited at this call, and stop before its launch.
        """
        self._check()
        assert self.step is not None and self._watched is not None
        self.run.changed(self._watched)
        self._watched = None
        for phase in ("before", "after"):
            self.run.edits.pop(Place(self.step.key, phase), None)
        raise Rewind(self.run, self.step, Place(self.step.key, "before"))

    def reload(self, debugger: Any, argument: str) -> bool:
        """reload
        Take the kernels of all swaps as their files have them now, where they are right; `rerun` uses them.
        """
        changed = ops.reload()
        debugger.message("\n".join(f"reloaded {each!r}" for each in changed) or "no swap's text has changed")
        return False

    def _check(self, whole: bool = True) -> prompt.Names:
        if self._names is None:
            raise ops.OpError("this works at a stop, while its call is under way: set one further on, debug.stop(...)")
        if whole and not self.run.whole:
            raise ops.OpError(
                "this pass cannot be gone back in: a stop must be set before it begins, and the call be a module's"
            )
        return self._names


def _fitted(output: Any, call: Call) -> Any:
    """What was assigned to `output`, as the op gives it."""
    if len(call.outputs) == 1:
        return fitting(output, call.outputs[0], "output")
    return tuple(fitting(each, spec, "output") for each, spec in zip(output, call.outputs, strict=True))
