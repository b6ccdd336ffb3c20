"""What the command line says and reads: text as it comes, Ctrl-C, a closing line, a file given by name."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from .errors import UserError


def printed(stream: Any, prompt: str = "") -> str:
    """Print the prompt and the pieces as they come; Ctrl-C ends the text, not the program."""
    said, waiting = "", prompt  # the prompt waits for the first piece: until then a progress bar has the line
    with _ctrl_c() as pressed:
        try:
            for piece in stream:
                said += piece
                text, waiting = waiting + piece, ""  # first, so that an interrupted write does not say it again
                sys.stdout.write(text)
                sys.stdout.flush()
                if pressed:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            stream.finish_reason = "interrupted"
    sys.stdout.write(waiting + "\n")
    sys.stdout.flush()
    return said


@contextlib.contextmanager
def _ctrl_c() -> Iterator[list[int]]:
    """Ctrl-C raises KeyboardInterrupt, and is noted: Python drops, and tells of, what is raised in a finalizer."""
    pressed: list[int] = []
    handler, tell = signal.getsignal(signal.SIGINT), sys.unraisablehook

    def interrupt(number: int, frame: Any) -> None:
        pressed.append(number)
        signal.default_int_handler(number, frame)

    def dropped(what: Any) -> None:
        if not isinstance(what.exc_value, KeyboardInterrupt):
            tell(what)

    if handler is not signal.default_int_handler:  # ignored, as under nohup, or another's
        yield pressed
        return
    signal.signal(signal.SIGINT, interrupt)
    sys.unraisablehook = dropped
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, handler)
        sys.unraisablehook = tell


def closing_line(stream: Any) -> None:
    """Speed of prefill and decode, on standard error, so that a pipe carries the text alone."""
    decoded = max(len(stream.tokens) - 1, 0)
    read = stream.prompt_tokens
    parts = [f"{read} prompt token{'' if read == 1 else 's'}", f"{len(stream.tokens)} generated"]
    if stream.prefill_seconds:
        parts.append(f"prefill {read / stream.prefill_seconds:.1f} tokens/s")
    if decoded and stream.decode_seconds:
        parts.append(f"decode {decoded / stream.decode_seconds:.1f} tokens/s")
    if stream.finish_reason == "interrupted":
        parts.append("interrupted")
    typer.echo(", ".join(parts), err=True)


def piped_in() -> str:
    """What is piped in, without the newline at its end."""
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not {error.encoding} text: {error.reason} at byte {error.start}") from None


def text_of(file: str) -> str:
    """The text in a file. Raises UserError where it cannot be read as UTF-8."""
    try:
        return Path(file).expanduser().read_text("utf-8")
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text: {error.reason} at byte {error.start}") from None
