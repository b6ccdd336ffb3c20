"""Real chat templates against their expected texts; templates that are wrong, or mean harm."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from llm import chat
from llm.chat import render
from llm.errors import UserError

DATA = Path(__file__).resolve().parents[2] / "../shared/data/chat"
HELLO: list[dict[str, Any]] = [{"role": "user", "content": "Hello"}]
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "wetter", "description": "für <Köln>"}}


def shared(name: str) -> str:
    if not (DATA / name).exists():
        pytest.skip(f"needs {name} in ../shared/data/chat")
    return (DATA / name).read_text(encoding="utf-8")


def cases() -> list[dict[str, Any]]:
    """The cases that Jinja itself renders as expected; the others' texts are llama.cpp's own approximations."""
    file = DATA / "cases.json"
    found = json.loads(file.read_text(encoding="utf-8"))["cases"] if file.exists() else []
    return [case for case in found if case["plain_jinja2_matches"]]


@pytest.mark.skipif(not DATA.exists(), reason="needs ../shared/data/chat")
@pytest.mark.parametrize("case", cases(), ids=lambda case: case["name"])
def test_expected_texts(case: dict[str, Any]) -> None:
    messages = json.loads(shared("cases.json"))["messages"]
    text = render(case["template_str"], messages, bos_token=case["bos_token"], eos_token=case["eos_token"])
    assert text == (case["expected_output_jinja"] or case["expected_output"])


def test_llama_dates_and_tools() -> None:
    """Llama 3.1 writes today's date, and its tools indented by 4 with nothing escaped."""
    template = shared("meta-llama-Llama-3.1-8B-Instruct.jinja")
    text = render(template, HELLO, bos_token="<|begin_of_text|>", date_string="01 Feb 2025")
    assert text == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 01 Feb 2025\n\n<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert json.dumps(TOOL, indent=4, ensure_ascii=False) in render(template, HELLO, tools=[TOOL])


def test_qwen_thinking() -> None:
    template = shared("Qwen-Qwen3-0.6B.jinja")
    start = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert render(template, HELLO) == start
    assert render(template, HELLO, enable_thinking=False) == start + "<think>\n\n</think>\n\n"
    assert render(template, HELLO, add_generation_prompt=False) == "<|im_start|>user\nHello<|im_end|>\n"
    assert '"für <Köln>"' in render(template, HELLO, tools=[TOOL])


def test_strftime() -> None:
    template = "{{ strftime_now('%d %B %Y') }}"
    assert render(template, HELLO, strftime_now=lambda format: f"<{format}>") == "<%d %B %Y>"
    assert datetime.strptime(render(template, HELLO), "%d %B %Y")


def test_smollm_and_phi() -> None:
    text = render(shared("HuggingFaceTB-SmolLM3-3B.jinja"), HELLO, enable_thinking=False)
    assert "Reasoning Mode: /no_think\n" in text
    assert text.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n")
    text = render(shared("microsoft-Phi-3.5-mini-instruct.jinja"), HELLO, eos_token="</s>", add_generation_prompt=False)
    assert text == "<|user|>\nHello<|end|>\n</s>"


def test_gemma_refuses_a_system_message() -> None:
    template = shared("google-gemma-2-2b-it.jinja")
    with pytest.raises(UserError, match=r"^The chat template refuses these messages: System role not supported$"):
        render(template, [{"role": "system", "content": "x"}, *HELLO])
    text = render(template, HELLO, bos_token="<bos>")
    assert text == "<bos><start_of_turn>user\nHello<end_of_turn>\n<start_of_turn>model\n"


@pytest.mark.parametrize(
    ("template", "want"),
    [
        ("  {% if true %}\n  a\n  {% endif %}\nb\n", "  a\nb"),  # trim_blocks and lstrip_blocks
        ("{% for i in 'abc' %}{% if i == 'a' %}{% continue %}{% endif %}{{ i }}{% break %}{% endfor %}", "b"),
        ("{{ {'b': 'é<', 'a': 1} | tojson }}", '{"b": "é<", "a": 1}'),
        ("{{ {'b': 1, 'a': 'é'} | tojson(true, none, (',', ':'), true) }}", '{"a":"\\u00e9","b":1}'),
        ("a{% generation %}{{ messages[0].content }}{% endgeneration %}b", "aHellob"),
        ("{% for m in messages %}{%- generation -%} {{ m.content }} {%- endgeneration -%} {% endfor %}", "Hello"),
        ("{{ tools is none }}{{ documents is none }}{{ nowhere is defined }}{{ bos_token }}.", "TrueTrueFalse."),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "1"),
        ("{{ strftime_now('%Y') | length }}", "4"),
    ],
)  # fmt: skip
def test_language(template: str, want: str) -> None:
    assert render(template, HELLO) == want


def fails(template: str, messages: list[dict[str, Any]] = HELLO) -> str:
    with pytest.raises(UserError) as error:
        render(template, messages)
    text = str(error.value)
    assert len(text.splitlines()) == 1
    return text


def test_errors_name_the_line() -> None:
    assert fails("a\n{% if %}").startswith("The chat template is wrong at line 2: ")
    assert fails("a\n\n{{ 1 + 'x' }}").startswith("The chat template failed at line 3: TypeError: unsupported operand")
    assert fails("{{ nowhere.x }}").endswith("line 1: UndefinedError: 'nowhere' is undefined")
    assert fails("{{ raise_exception('Only\nuser') }}") == "The chat template refuses these messages: Only user"
    assert "expected an object with `role`" in fails("", [{"content": "x"}])
    assert "Message 0 is 'Hello'" in fails("", ["Hello"])  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''['__class__']['__mro__'] }}",
        "{{ (''|attr('__class__')).mro() }}",
        "{{ raise_exception.__globals__ }}{{ raise_exception.__globals__['json'] }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(content='x') }}",
        "{{ (messages|map(attribute='__class__')|list)[0].mro() }}",
        "{% include 'pyproject.toml' %}",
        "{% import 'os' as os %}",
    ],
)
def test_sandbox(template: str) -> None:
    messages = [dict(HELLO[0])]
    fails(template, messages)
    assert messages == HELLO


def test_sandbox_says_so() -> None:
    text = fails("{{ ''.__class__.__mro__ }}")
    assert text == (
        "The chat template does what is not allowed at line 1: "
        "access to attribute '__class__' of 'str' object is unsafe."
    )


def test_output_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Range too big" in fails("{% for i in range(10**9) %}{% endfor %}")
    assert "'lipsum' is undefined" in fails("{{ lipsum(n=10**9) }}")
    monkeypatch.setattr(chat, "MAX_CHARACTERS", 1000)
    assert fails("{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}") == (
        "The chat template's output goes beyond 1000 characters."
    )
    assert fails("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}").count("RecursionError") == 1
