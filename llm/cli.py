"""The command `limpid`: generate, chat, info, bench, cache. What it prints is for people; errors are one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import UserError

app = typer.Typer(
    help="An LLM runtime you can step through.",
    add_completion=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Option("--model", "-m", help="tiny, a directory, a llama2.c .bin, or a Hugging Face name")]
Tokens = Annotated[int, typer.Option("--max-tokens", "-n", min=0, help="at most this many tokens")]
Temperature = Annotated[float, typer.Option("--temp", help="0 always takes the likeliest token")]
TopK = Annotated[int, typer.Option("--top-k", help="sample among the k likeliest; 0: all")]
TopP = Annotated[float, typer.Option("--top-p", help="sample among the likeliest that make up this probability")]
MinP = Annotated[float, typer.Option("--min-p", help="drop tokens below this share of the likeliest one")]
Penalty = Annotated[
    float, typer.Option("--repetition-penalty", help="above 1: tokens already there become less likely")
]
Seed = Annotated[int | None, typer.Option("--seed", help="the same seed gives the same text")]
DType = Annotated[str | None, typer.Option("--dtype", help="float32, float16 or bfloat16; default: as stored")]
Device = Annotated[str, typer.Option("--device", help="where to run")]
Revision = Annotated[str | None, typer.Option("--revision", help="branch, tag or commit of a Hugging Face repository")]


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="the beginning of the text", show_default=False)] = None,
    prompt_option: Annotated[
        str | None, typer.Option("--prompt", "-p", help="the same, as a flag; - reads stdin")
    ] = None,
    model: Model = "tiny",
    max_tokens: Tokens = 200,
    temp: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = None,
    dtype: DType = None,
    device: Device = "cpu",
    revision: Revision = None,
) -> None:
    """Write a text that goes on from PROMPT. Without arguments: a story from the embedded model."""
    if prompt is not None and prompt_option is not None:
        raise UserError("the prompt is given twice, as an argument and by --prompt: give it once")
    text = prompt if prompt is not None else prompt_option
    text = sys.stdin.read() if text == "-" else text or ""
    loaded = _load(model, dtype, device, revision)
    options = _sampling(temp, top_k, top_p, min_p, repetition_penalty, seed)
    stream = loaded.stream(text, max_tokens=max_tokens, **options)
    sys.stdout.write(text)
    _print(stream)
    _closing_line(stream)


@app.command()
def chat(
    model: Model = "tiny",
    system: Annotated[str | None, typer.Option("--system", help="a message that sets the scene")] = None,
    max_tokens: Tokens = 1024,
    temp: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = None,
    dtype: DType = None,
    device: Device = "cpu",
    revision: Revision = None,
) -> None:
    """Talk with a chat model. Ctrl-C stops an answer, Ctrl-D or "exit" ends the conversation."""
    loaded = _load(model, dtype, device, revision)
    options = _sampling(temp, top_k, top_p, min_p, repetition_penalty, seed)
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    loaded.chat([*messages, {"role": "user", "content": ""}], max_tokens=0)  # says at once when it cannot chat
    while True:
        try:
            said = input("> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            break
        if said.strip().lower() in ("exit", "quit"):
            break
        if not said.strip():
            continue
        messages.append({"role": "user", "content": said})
        stream = loaded.chat(messages, max_tokens=max_tokens, **options)
        messages.append({"role": "assistant", "content": _print(stream).strip()})
        _closing_line(stream)


@app.command()
def info(model: Annotated[str, typer.Argument(help="as for --model")] = "tiny", revision: Revision = None) -> None:
    """Show what a model is: its tree with shapes, dtypes and sizes, its tokenizer, and what it needs."""
    from .info import show

    show(_load(model, None, "cpu", revision), model)


@app.command()
def bench(
    what: Annotated[str, typer.Argument(help="dispatch, ops, gemv, decode or prefill")] = "decode",
    shape: Annotated[str, typer.Option("--shape", help="tiny, 135m, llama-1b or 3b")] = "tiny",
    dtype: Annotated[str, typer.Option("--dtype", help="float32, float16 or bfloat16")] = "float32",
    json: Annotated[bool, typer.Option("--json", help="JSON on standard output, and nothing else there")] = False,
) -> None:
    """Measure this machine: medians over interleaved repetitions."""
    from .bench import run

    run(what, shape, dtype, json)


@app.command()
def cache(
    action: Annotated[str, typer.Argument(help="show or clear")] = "show",
) -> None:
    """Show or clear the compiled kernels that are kept on disk."""
    from .info import show_kernels

    from ops import store

    if action == "clear":
        typer.echo(f"removed {store.clear()} kernels from {store.directory()}")
    elif action == "show":
        show_kernels()
    else:
        raise UserError(f"limpid cache {action}: expected show or clear")


def _load(model: str, dtype: str | None, device: str, revision: str | None) -> Any:
    from .load import load

    return load(model, dtype=dtype, device=device, revision=revision)


def _sampling(temp: float, top_k: int, top_p: float, min_p: float, penalty: float, seed: int | None) -> dict[str, Any]:
    return {
        "temperature": temp,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": penalty,
        "seed": seed,
    }


def _print(stream: Any) -> str:
    """Print the pieces as they come; Ctrl-C ends the text, not the program."""
    said = ""
    try:
        for piece in stream:
            said += piece
            sys.stdout.write(piece)
            sys.stdout.flush()
    except KeyboardInterrupt:
        stream.finish_reason = "interrupted"
    sys.stdout.write("\n")
    sys.stdout.flush()
    return said


def _closing_line(stream: Any) -> None:
    """Speed of prefill and decode, on standard error, so that a pipe carries the text alone."""
    decoded = max(len(stream.tokens) - 1, 0)
    parts = [f"{stream.prompt_tokens} prompt tokens", f"{len(stream.tokens)} generated"]
    if stream.prefill_seconds:
        parts.append(f"prefill {stream.prompt_tokens / stream.prefill_seconds:.1f} tokens/s")
    if decoded and stream.decode_seconds:
        parts.append(f"decode {decoded / stream.decode_seconds:.1f} tokens/s")
    if stream.finish_reason == "interrupted":
        parts.append("interrupted")
    typer.echo(", ".join(parts), err=True)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; what a person can put right is one line and exit code 2."""
    _exit(lambda: app(args=arguments, prog_name="limpid", standalone_mode=False))


def _exit(run: Callable[[], Any]) -> None:
    import click

    try:
        code = run()
    except click.ClickException as error:
        typer.echo(f"limpid: {error.format_message()}", err=True)
        sys.exit(2)
    except UserError as error:
        typer.echo(f"limpid: {' '.join(str(error).split())}", err=True)
        sys.exit(2)
    except (KeyboardInterrupt, click.exceptions.Abort):
        sys.exit(130)
    except BrokenPipeError:  # the reader of a pipe has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
