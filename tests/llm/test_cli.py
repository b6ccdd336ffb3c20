"""The command line as a person meets it: text on stdout, everything else on stderr, errors in one line."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llm
import ops
from llm import cli, terminal
from llm.weights import pack_all

from . import small

STORIES = Path(__file__).resolve().parents[2] / "../shared/data/stories260K"


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory with a model that has a chat template."""
    model = small.model(np.random.default_rng(1))
    model.tokenizer = small.tokenizer(chat_template=small.TEMPLATE)
    return str(model.save(tmp_path_factory.mktemp("models") / "chatty"))


# A process that was started in the background may ignore Ctrl-C, and passes that on.
COMMAND = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("llm", run_name="__main__", alter_sys=True)
"""


@contextlib.contextmanager
def started(*arguments: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """The command in a process of its own, which does not outlive the test."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", COMMAND, *arguments], text=True, **pipes | options) as process:
        try:
            yield process
        finally:
            process.kill()


def test_generate(limpid, chatty):
    wanted = llm.load(chatty).generate("Begin", max_tokens=8)
    for arguments in (("Begin",), ("--prompt", "Begin"), ("-p", "Begin")):
        code, out, err = limpid("generate", *arguments, "--model", chatty, "--max-tokens", "8")
        assert (code, out) == (0, f"Begin{wanted}\n")
        assert err.count("\n") == 1
        assert err.startswith(f"6 prompt tokens, {len(wanted.tokens)} generated, prefill ")
        assert "tokens/s, decode " in err
    options = ("--model", chatty, "-n", "8", "--temp", "1.2", "--top-k", "50", "--top-p", "0.9", "--min-p", "0.01")
    more = ("--seed", "7", "--dtype", "float32", "--device", "cpu", "--repetition-penalty", "1.1")
    sampled = limpid("generate", "Begin", *options, *more)
    assert sampled[1] == limpid("generate", "Begin", *options, *more)[1]


@pytest.mark.parametrize("stdin", ["Begin", "Begin\n"])
def test_the_prompt_may_be_piped_in(limpid, chatty, stdin):
    piped = limpid("generate", "-", "--model", chatty, "-n", "8", stdin=stdin)
    assert piped[:2] == limpid("generate", "Begin", "--model", chatty, "-n", "8")[:2]
    assert piped[:2] == limpid("generate", "--prompt", "-", "--model", chatty, "-n", "8", stdin=stdin)[:2]


def test_a_trained_model_tells_its_story(limpid):
    if not STORIES.is_dir():
        pytest.skip("needs stories260K in ../shared/data")
    path = str(STORIES / "stories260K.bin")
    code, out, _ = limpid("generate", "--model", path, "--temp", "0", "--max-tokens", "256", "--dtype", "float32")
    assert code == 0
    assert out == (STORIES / "greedy.txt").read_text() + "\n"


def test_without_arguments_it_tells_a_story(limpid):
    code, out, err = limpid("generate", "--max-tokens", "12")
    assert code == 0
    assert len(out.strip()) > 10
    assert "12 generated" in err


WRONG = [
    (("generate", "--model", "tine"), "no file or directory 'tine' here|'tine' is not in the cache|'tine' could not"),
    (("generate", "--model", "./nowhere/model"), "no model at './nowhere/model': "),
    (("generate", "--model", "README.md"), "'README.md' is not a model file"),
    (("generate", "--model", "a b/c"), "not a repository id|no model at"),
    (("generate", "--model", ""), "no model given"),
    (("generate", "--model", "tests"), "has neither model.safetensors nor|has no config.json"),
    (("generate", "--model", "tiny", "--revision", "main"), "'tiny' is local and has no revision 'main'"),
    (("generate", "--dtype", "float64"), "dtype 'float64' is not supported; choose one of float32, float16, bfloat16"),
    (("generate", "--device", "tpu"), "no device 'tpu'; there are cpu, cuda, emulate"),
    (("bench", "ops", "--device", "emulate"), "bench ops measures the CPU; on a device there are decode and prefill"),
    (("generate", "--max-tokens", "-1"), "max_tokens is -1, expected an integer, 0 or above"),
    (("generate", "--max-tokens", "many"), "--max-tokens.*valid integer"),
    (("generate", "--temp", "-1"), "temperature is -1.0"),
    (("generate", "--temp", "nan"), "temperature is nan"),
    (("generate", "--temp", "hot"), "--temp.*valid number"),
    (("generate", "--top-p", "0"), "top_p is 0.0"),
    (("generate", "--top-k", "-3"), "top_k is -3"),
    (("generate", "--min-p", "1.5"), "min_p is 1.5"),
    (("generate", "--repetition-penalty", "0"), "repetition_penalty is 0.0"),
    (("generate", "--seed", "-1"), "seed is -1"),
    (("generate", "--tokens", "5"), "No such option: --tokens"),
    (("generate", "one", "two"), "unexpected extra argument"),
    (("generate", "one", "--prompt", "two"), "the prompt is given twice"),
    (("generate", "word " * 3000), "do not fit: this model's context holds"),
    (("generate", "a\udcff"), "not valid Unicode"),
    (("info", "tine.bin"), "no model at 'tine.bin'"),
    (("cache", "empty"), "cache empty: expected show or clear"),
    (("bench", "speed"), "bench speed: expected dispatch, ops, gemv, decode, prefill"),
    (("bench", "decode", "--shape", "70b"), "shape '70b' is not known; choose tiny, 135m, llama-1b, 3b"),
    (("bench", "decode", "--dtype", "int4"), "dtype 'int4' is not supported"),
    (("talk",), "No such command 'talk'"),
    (("--version",), "No such option: --version"),
]


@pytest.mark.parametrize(("arguments", "expected"), WRONG, ids=[" ".join(each)[:40] for each, _ in WRONG])
def test_a_mistake_is_one_line(limpid, monkeypatch, arguments, expected):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, out, err = limpid(*arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("limpid: ")
    assert err.count("\n") == 1
    assert re.search(expected, err), err


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"model_type": "mistral", "sliding_window": 0}, "'sliding_window' is 0, expected at least 1"),
        ({"rms_norm_eps": -1}, "'rms_norm_eps' is -1, expected no negative number"),
    ],
)
def test_a_config_that_contradicts_itself_is_one_line(limpid, chatty, tmp_path, changes, expected):
    path = shutil.copytree(chatty, tmp_path / "changed") / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    code, out, err = limpid("generate", "--model", str(path.parent))
    assert (code, out, err.count("\n")) == (2, "", 1) and expected in err


@pytest.mark.parametrize("error", [ops.KernelError("no\nlinker"), ops.ShapeError("no\nshape")])
def test_what_nobody_can_put_right_is_one_line_too(limpid, monkeypatch, error):
    def fails(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(cli, "_load", fails)
    code, out, err = limpid("info")
    assert (code, out, err) == (1, "", f"limpid: no {str(error).split()[1]}\n")


def test_stdin_that_is_no_text(limpid, chatty):
    code, out, err = limpid("generate", "-", "--model", chatty, stdin=b"\xff\xfe")
    assert (code, out) == (2, "")
    assert err == "limpid: standard input is not utf-8 text: invalid start byte at byte 0\n"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("LIMPID_CACHE_LIMIT", "much", "a number of MiB"),
        ("LIMPID_WEIGHTS_LIMIT", "much", "a number of MiB"),
        ("LIMPID_THREADS", "all", "a number of threads, 1 or more"),
        ("LIMPID_THREADS", "0", "a number of threads, 1 or more"),
        ("LIMPID_CPU", "6502", "native, portable, "),
    ],
)
def test_the_environment_is_checked(name, value, expected):
    with started("cache", "show", env=os.environ | {name: value}) as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert err.startswith(f"limpid: {name} is '{value}', expected {expected}") and err.count("\n") == 1


def test_help(limpid, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = limpid()
    assert (code, out) == limpid("--help")[:2]
    for command in ("generate", "chat", "info", "bench", "cache"):
        assert f"\n  {command} " in out
        assert limpid(command, "-h")[1].startswith(f"Usage: limpid {command} ")
    out = limpid("generate", "--help")[1]
    flags = [
        "--model",
        "--prompt",
        "--max-tokens",
        "--temp",
        "--top-k",
        "--top-p",
        "--min-p",
        "--seed",
        "--dtype",
        "--device",
    ]
    places = [out.index(f"{flag} ") for flag in flags]
    assert places == sorted(places)
    assert max(map(len, out.splitlines())) <= 80


def test_chat(limpid, chatty):
    code, out, err = limpid("chat", "--model", chatty, "-n", "6", stdin="Hi\n\nMore\nexit\nnever read\n")
    model = llm.load(chatty)
    messages = [{"role": "user", "content": "Hi"}]
    first = model.chat(messages, max_tokens=6).finish()
    messages += [{"role": "assistant", "content": first.strip()}, {"role": "user", "content": "More"}]
    second = model.chat(messages, max_tokens=6).finish()
    assert code == 0
    assert out == f"{first}\n{second}\n"
    assert err.count("6 generated") == 2
    code, out, _ = limpid("chat", "--model", chatty, "-n", "6", "--system", "Be brief.", stdin="Hi")
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert (code, out) == (0, f"{model.chat(system, max_tokens=6).finish()}\n")


def test_chat_needs_a_template(limpid, chatty, tmp_path):
    silent = shutil.copytree(chatty, tmp_path / "silent")
    (silent / "chat_template.jinja").unlink()
    code, out, err = limpid("chat", "--model", str(silent), stdin="Hi")
    assert (code, out) == (2, "")
    assert err == "limpid: this model has no chat template: it is not made for chat; use generate\n"


@pytest.mark.parametrize("form", ["q4", "q8"])
def test_packed_weights(limpid, quick, form):
    code, out, err = limpid("generate", "--weights", form, "-n", "5", "Once")
    assert code == 0 and out.startswith("Once upon a time")
    assert re.search(rf"weights +\d+ kB as {form} and float32", limpid("info", "--weights", form)[1])
    for what in ("gemv", "decode", "prefill"):
        assert json.loads(limpid("bench", what, "--weights", form, "--json")[1])["weights"] == form
    for arguments in (("generate",), ("info",), ("bench", "gemv")):
        code, _, err = limpid(*arguments, "--weights", "q3")
        assert (code, err.count("\n")) == (2, 1) and "choose one of q4, q8, float32" in err


def test_info(limpid, chatty):
    code, out, err = limpid("info", chatty)
    assert (code, err) == (0, "")
    assert "layers.0-2: 3 x Block" in out
    for line in ("weights +159 kB as float32", "context +400 tokens", "chat template +yes", "vocabulary +258, "):
        assert re.search(f"^{line}", out, re.MULTILINE), line
    code, out, _ = limpid("info")
    assert code == 0
    assert out.startswith("Llama  ")
    assert re.search(r"^peak memory +[\d.]+ [MG]B", out, re.MULTILINE)


def test_cache(limpid, monkeypatch, tmp_path):
    monkeypatch.setenv("LIMPID_CACHE", str(tmp_path / "cache"))
    assert limpid("cache")[1].splitlines() == [
        f"0 kernels, 0 B of at most 1.07 GB, in {tmp_path}/cache/kernels",
        f"0 files of packed weights, 0 B of at most 68.7 GB, in {tmp_path}/cache/weights",
    ]
    eps = float(np.random.default_rng().random())  # a kernel that nobody has built
    ops.rms_norm(ops.zeros((1, 4)), ops.zeros((4,)), eps=eps)
    code, out, err = limpid("cache", "show")
    assert (code, err) == (0, "")
    assert out.splitlines()[0].endswith(f"B  rms_norm(x=float32[1, 4], weight=float32[4], eps={eps}, plus_one=False)")
    assert out.splitlines()[1].startswith("1 kernel, ")
    pack_all({"w": ops.Spec((3, 5), "q4")}, {"w": np.ones((3, 5), "float32")}, [Path(__file__)])
    assert "q4 of llm\n1 file of packed weights, " in limpid("cache")[1]
    assert limpid("cache", "clear")[1].splitlines() == [
        f"removed 1 kernel from {tmp_path}/cache/kernels",
        f"removed 1 file of packed weights from {tmp_path}/cache/weights",
    ]
    assert not any(path.is_file() for path in (tmp_path / "cache").rglob("*"))
    monkeypatch.setenv("LIMPID_CACHE", "off")
    assert limpid("cache", "show")[1] == "the disk cache is off (LIMPID_CACHE=off)\n"
    assert limpid("cache", "clear")[:2] == (0, "the disk cache is off (LIMPID_CACHE=off)\n")


def test_ctrl_c_ends_the_text_and_not_with_a_traceback(tmp_path):
    # It would go on for minutes: the end's logit is 0, and the largest of the others is above that.
    model = small.model(np.random.default_rng(1), max_position_embeddings=100_000)
    head = model.lm_head.weight.numpy().copy()
    head[small.EOS] = 0
    model.set_parameter("lm_head.weight", ops.tensor(head))
    talker = str(model.save(tmp_path / "talker"))
    written = tmp_path / "text"
    arguments = ("generate", "Begin", "--model", talker, "--max-tokens", "99000", "--temp", "0")
    with written.open("w") as file, started(*arguments, stdout=file) as process:
        while process.poll() is None and written.stat().st_size < 50:  # until it is running
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    text = written.read_text(errors="replace")
    assert process.returncode == 0, err
    assert text.startswith("Begin")
    assert text.count("Begin") == 1
    assert text.endswith("\n")
    assert "Traceback" not in err
    assert err.splitlines()[-1].endswith(", interrupted")


class Finalized:
    """Ctrl-C while Python runs a finalizer, which drops the exception."""

    def __del__(self):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.skipif(signal.getsignal(signal.SIGINT) is not signal.default_int_handler, reason="Ctrl-C is not Python's")
def test_ctrl_c_that_python_drops_ends_the_text_too(capsys):
    class Stream:
        finish_reason = ""

        def __iter__(self):
            for i in range(9):
                if i == 3:
                    Finalized()
                yield str(i)

    stream = Stream()
    assert terminal.printed(stream, "text ") == "0123" and stream.finish_reason == "interrupted"
    assert capsys.readouterr().out == "text 0123\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_closed_pipe_is_no_error(chatty):
    with started("generate", "Begin", "--model", chatty, "--max-tokens", "390") as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(6)
        process.stdout.close()
        err = process.stderr.read()
        assert process.wait(60) == 1
    assert err == ""


def test_text_that_the_terminal_cannot_show(chatty):
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii"}
    with started("generate", "é🙂", "--model", chatty, "-n", "3", env=ascii_only) as process:
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out.startswith("??")


SECOND_START = """
import sys
import llm, ops
model = llm.load(sys.argv[1])
text = model.generate("Hi", max_tokens=80)
model.generate("A longer prompt, of more than seventeen tokens", max_tokens=2)
print(len(ops.build.log), text.tokens)
"""


def test_a_second_start_compiles_nothing(chatty, tmp_path):
    outputs = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", SECOND_START, chatty],
            capture_output=True, text=True, env=os.environ | {"LIMPID_CACHE": str(tmp_path)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout.split(" ", 1))
    (first, text), (second, again) = outputs
    assert int(first) > 20
    assert int(second) == 0
    assert text == again
