"""The command `limpid`: generate, chat, info, bench, cache, ... What it prints is for people; errors are one line."""

from __future__ import annotations

import io
import os
import sys
from typing import Annotated, Any, NoReturn

import typer

from ops import KernelError, OpError, store, target

from .errors import UserError
from .terminal import closing_line, piped_in, printed, text_of
from .tree import size

app = typer.Typer(
    help="An LLM runtime you can step through.",
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _option(*names: str, metavar: str, help: str, **more: Any) -> Any:
    return typer.Option(*names, metavar=metavar, help=help, **more)


Model = Annotated[
    str, _option("--model", "-m", metavar="NAME", help="tiny, a folder, a .gguf or llama2.c .bin, or a Hub name")
]
Tokens = Annotated[int, _option("--max-tokens", "-n", metavar="N", help="at most this many tokens")]
Temperature = Annotated[float, _option("--temp", metavar="T", help="0: always the likeliest token")]
TopK = Annotated[int, _option("--top-k", metavar="K", help="only among the K likeliest; 0: all")]
TopP = Annotated[float, _option("--top-p", metavar="P", help="only among the likeliest that make up P")]
MinP = Annotated[float, _option("--min-p", metavar="P", help="only above this share of the likeliest")]
Penalty = Annotated[float, _option("--repetition-penalty", metavar="R", help="above 1: less of what was there")]
Seed = Annotated[int | None, _option("--seed", metavar="N", help="the same seed gives the same text")]
DType = Annotated[str | None, _option("--dtype", metavar="TYPE", help="float32, float16, bfloat16; default: as stored")]
Weights = Annotated[
    str | None, _option("--weights", metavar="TYPE", help="matrices as q4, q8 or a float type; default: as stored")
]
CacheDType = Annotated[
    str | None, _option("--cache-dtype", metavar="TYPE", help="keys and values as float32, float16 or bfloat16")
]
Device = Annotated[
    str, _option("--device", metavar="NAME", help="where to run: cpu, cuda, or emulate, a GPU's kernels on the CPU")
]
Revision = Annotated[str | None, _option("--revision", metavar="REV", help="branch, tag or commit on the Hub")]


@app.callback()
def settings() -> None:
    """Check what the environment says, so that a wrong value is one line and not a surprise later."""
    try:
        store.kernels.limit(), store.weights.limit(), target.machine(), target.threads()
    except (OpError, KernelError) as error:
        raise UserError(str(error)) from None


@app.command()
def generate(
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="the beginning of the text; - reads it from stdin")
    ] = None,
    model: Model = "tiny",
    prompt_option: Annotated[
        str | None, _option("--prompt", "-p", metavar="TEXT", help="the same as the argument")
    ] = None,
    max_tokens: Tokens = 200,
    temp: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = None,
    dtype: DType = None,
    weights: Weights = None,
    cache_dtype: CacheDType = None,
    device: Device = "cpu",
    revision: Revision = None,
    adapter: Annotated[
        list[str] | None, _option("--adapter", metavar="DIR", help="a LoRA adapter in PEFT's layout; may be repeated")
    ] = None,
) -> None:
    """Write a text that goes on from PROMPT. Without arguments: a story from the embedded model."""
    from .adapters import load_adapter

    if prompt is not None and prompt_option is not None:
        raise UserError("the prompt is given twice, as an argument and by --prompt: give it once")
    text = prompt if prompt is not None else prompt_option
    text = piped_in() if text == "-" else text or ""
    loaded = _load(model, dtype, weights, device, revision)
    for each in adapter or ():
        load_adapter(loaded, each)
    options = _sampling(temp, top_k, top_p, min_p, repetition_penalty, seed)
    stream = loaded.stream(text, max_tokens=max_tokens, cache_dtype=cache_dtype, **options)
    printed(stream, text)
    closing_line(stream)


@app.command()
def chat(
    model: Model = "tiny",
    system: Annotated[str | None, _option("--system", metavar="TEXT", help="a message that sets the scene")] = None,
    max_tokens: Tokens = 1024,
    temp: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = None,
    dtype: DType = None,
    weights: Weights = None,
    cache_dtype: CacheDType = None,
    device: Device = "cpu",
    revision: Revision = None,
) -> None:
    """Talk with a chat model. Ctrl-C stops an answer, Ctrl-D or "exit" ends the conversation."""
    from .generate import Chat

    loaded = _load(model, dtype, weights, device, revision)
    options = _sampling(temp, top_k, top_p, min_p, repetition_penalty, seed)
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    conversation = Chat(loaded, cache_dtype)
    conversation.answer([*messages, {"role": "user", "content": ""}], max_tokens=0)  # says at once when it cannot chat
    while True:
        try:
            said = input("> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            typer.echo("", nl=sys.stdin.isatty())  # the shell's prompt begins a line of its own
            break
        if said.strip().lower() in ("exit", "quit"):
            break
        if not said.strip():
            continue
        messages.append({"role": "user", "content": said})
        stream = conversation.answer(messages, max_tokens=max_tokens, **options)
        messages.append({"role": "assistant", "content": printed(stream).strip()})
        closing_line(stream)


@app.command()
def info(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="tiny, a folder, a config.json, a .gguf or .bin file, or a Hub name")
    ] = "tiny",
    weights: Weights = None,
    revision: Revision = None,
) -> None:
    """Show a model's tree, what it needs, its tokenizer. Its config.json is enough: weights need not be there."""
    from .info import show
    from .load import outline

    found = outline(model, weights) if model != "tiny" and revision is None else None
    show(found or _load(model, None, weights, "cpu", revision), model)


@app.command()
def bench(
    what: Annotated[
        str, typer.Argument(metavar="WHAT", help="dispatch, ops, gemv, decode, prefill, debug or swap")
    ] = "decode",
    shape: Annotated[str, _option("--shape", metavar="NAME", help="tiny, 135m, llama-1b or 3b")] = "tiny",
    dtype: Annotated[str, _option("--dtype", metavar="TYPE", help="float32, float16 or bfloat16")] = "float32",
    weights: Weights = None,
    device: Device = "cpu",
    json: Annotated[bool, typer.Option("--json", help="JSON on stdout, and nothing else there")] = False,
) -> None:
    """Measure this machine: medians over interleaved repetitions."""
    from .bench import run

    run(what, shape, dtype, weights, device, json, _tools)


@app.command()
def doctor(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="tiny, a folder, a .gguf or llama2.c .bin, or a Hub name")
    ] = "tiny",
    ref: Annotated[
        str, _option("--ref", metavar="REF", help="hf (transformers), float64, or a folder or file of right weights")
    ] = "float64",
    html: Annotated[str | None, _option("--html", metavar="FILE", help="write a page, too")] = None,
    seconds: Annotated[float, _option("--seconds", metavar="N", help="about how long to look")] = 60.0,
    dtype: DType = None,
    weights: Weights = None,
    revision: Revision = None,
) -> None:
    """Find what is wrong with a model, by a reference: exit code 0 when nothing is, 1 with the culprit's name."""
    from debug.diagnosis import doctor as diagnose

    loaded = _load(model, dtype, weights, "cpu", revision)
    found = diagnose(loaded, _reference(model, ref, revision), seconds=seconds)
    if html is not None:
        found.save_html(html)
    typer.echo(str(found))
    if not found.ok:
        raise typer.Exit(1)


def _reference(model: str, ref: str, revision: str | None) -> Any:
    """What `doctor` compares with: its own "float64", a model of transformers, or weights by name."""
    from debug import huggingface

    from .weights import read_directory, read_file, resolve

    if ref == "float64":
        return ref
    if ref == "hf":
        folder = resolve(model, revision)
        if not folder.is_dir():
            raise UserError(f"--ref hf: transformers does not read {folder}: give a folder in Hugging Face's layout")
        try:
            return huggingface.load(folder)
        except OpError as error:
            raise UserError(f"--ref hf: {error}") from None
    if os.path.isdir(ref):
        return read_directory(ref)
    if os.path.isfile(ref):
        return read_file(ref)
    raise UserError(f"--ref {ref}: expected hf, float64, or a folder or file of safetensors weights")


@app.command()
def quantize(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="tiny, a folder, a .gguf or llama2.c .bin, or a Hub name")
    ],
    out: Annotated[str, _option("--out", "-o", metavar="DIR", help="a folder that is not there yet")],
    to: Annotated[str, _option("--to", metavar="TYPE", help="q4, q8 or a float type")] = "q4",
    keep: Annotated[
        list[str] | None,
        _option("--keep", metavar="PATH=TYPE", help="otherwise for some: 'layers.0-3=q8'; without =TYPE: as stored"),
    ] = None,
    text: Annotated[str | None, _option("--text", metavar="FILE", help="what errors are measured on")] = None,
    rows: Annotated[int, _option("--rows", metavar="N", help="how many layers to list")] = 20,
    revision: Revision = None,
) -> None:
    """Pack a model's matrices into DIR, in Hugging Face's layout, and say what that does to each layer."""
    from .calibration import show
    from .quantise import quantise
    from .writing import check_new

    check_new(out)  # said before a large model is read
    calibration = None if text is None else text_of(text)
    found = quantise(_load(model, None, None, "cpu", revision), to, out, keep or (), calibration)
    show(found, max(rows, 0))
    typer.echo(f"wrote {out}, {size(found['bytes'])} of weights")


@app.command()
def convert(
    source: Annotated[
        str, typer.Argument(metavar="IN", help="tiny, a folder, a .gguf or llama2.c .bin, or a Hub name")
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help="a new file, NAME.gguf, or else a new folder")],
    type: Annotated[
        str | None,
        _option("--type", metavar="TYPE", help="matrices as f32, f16, bf16, q8_0 or q4_0; default: as stored"),
    ] = None,
) -> None:
    """Write a model as a GGUF file, or in Hugging Face's layout, with its tokenizer and chat template."""
    from .convert import convert as run

    typer.echo(f"wrote {run(source, out, type)}")


@app.command()
def cache(
    action: Annotated[str, typer.Argument(metavar="ACTION", help="show or clear")] = "show",
) -> None:
    """Show or clear the compiled kernels and packed weights that are kept on disk."""
    from .info import counted, show_cache

    if action not in ("show", "clear"):
        raise UserError(f"cache {action}: expected show or clear")
    if action == "show" or store.kernels.directory() is None:
        show_cache()
    else:
        for each in (store.kernels, store.weights):
            typer.echo(f"removed {counted(each.clear(), each)} from {each.directory()}")


@app.command()
def watch(
    file: Annotated[str, typer.Argument(metavar="FILE", help="a Python file with kernels: @ops.rms_norm.swap('c')")],
    model: Model = "tiny",
    prompt: Annotated[
        str, _option("--prompt", "-p", metavar="TEXT", help="what the model runs on")
    ] = "Once upon a time",
    once: Annotated[bool, typer.Option("--once", help="only once, not at every save")] = False,
    dtype: DType = "float32",
    weights: Weights = None,
) -> None:
    """Keep a model loaded, and verify, race and use the kernels of a file at every save. Runs the file."""
    import debug

    from .watch import watch as run

    run(file, _load(model, dtype, weights, "cpu", None), prompt, debug.race, typer.echo, once)


@app.command()
def replay(
    bundle: Annotated[str, typer.Argument(metavar="BUNDLE", help="a file that debug.repro or crash capture left")],
    trust: Annotated[bool, typer.Option("--trust", help="run the kernel source that came with it")] = False,
) -> None:
    """Run a recorded call again, in a process of its own: exit code 0 when it does the same, 1 when it does not."""
    from debug import verdict

    try:
        found = verdict.replay(bundle, trust)
    except OpError as error:
        raise UserError(str(error)) from None
    typer.echo(str(found))
    raise typer.Exit(found.code)


def _tools() -> Any:
    from debug import overhead

    return overhead.tools()


def _load(model: str, dtype: str | None, weights: str | None, device: str, revision: str | None) -> Any:
    from .load import load

    return load(model, dtype=dtype, weights=weights, device=device, revision=revision)


def _sampling(temp: float, top_k: int, top_p: float, min_p: float, penalty: float, seed: int | None) -> dict[str, Any]:
    return {
        "temperature": temp,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": penalty,
        "seed": seed,
    }


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; an error is one line: with exit code 2 what a person can put right, with 1 the rest."""
    given = sys.argv[1:] if arguments is None else arguments
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # what a terminal cannot show is no reason to stop
    try:
        code = app(given or ["--help"], prog_name="limpid", standalone_mode=False)  # 130 for Ctrl-C
        sys.stdout.flush()
    except typer.TyperException as error:
        _fail(error.format_message())
    except UserError as error:
        _fail(str(error))
    except (OpError, KernelError) as error:
        _fail(str(error), code=1)
    except BrokenPipeError:  # the reader of a pipe has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int = 2) -> NoReturn:
    typer.echo(f"limpid: {' '.join(message.split())}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
