"""Messages to prompt text by a model's own chat template, as transformers' `apply_chat_template` renders it."""

import json
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llm.errors import UserError

MAX_CHARACTERS = 16 * 2**20


def render(
    template: str,
    messages: list[dict[str, Any]],
    *,
    add_generation_prompt: bool = True,
    tools: list[dict[str, Any]] | None = None,
    bos_token: str = "",
    eos_token: str = "",
    **extra: Any,
) -> str:
    """The prompt for `messages`, each a dict with `role` and `content`, or whatever else the template reads.

    tools: JSON schemas. `extra` are further template variables (`enable_thinking`, `documents`); a `strftime_now`
    among them stands in for the clock. The template is not trusted: it runs in Jinja's immutable sandbox.

    Raises UserError, one line: the template refuses the messages, is wrong, or does what the sandbox forbids.
    """
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or "role" not in message:
            raise UserError(f"Message {i} is {message!r:.80}; expected an object with `role` and `content`.")
    variables = {"documents": None, "tools": tools, "bos_token": bos_token, "eos_token": eos_token, **extra}
    pieces, size = [], 0
    try:
        compiled = _compile(template)
        for piece in compiled.generate(messages=messages, add_generation_prompt=add_generation_prompt, **variables):
            pieces.append(piece)
            size += len(piece)
            if size > MAX_CHARACTERS:
                raise UserError(f"The chat template's output goes beyond {MAX_CHARACTERS} characters.")
    except UserError:
        raise
    except Exception as error:  # a template is a program: it can raise anything
        raise UserError(" ".join(_explain(error).split())) from error
    return "".join(pieces)


class _Refused(jinja2.TemplateError):
    """The template called raise_exception."""


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's text for training; here it is only a scope."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own attribute

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


@lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    del environment.globals["lipsum"]  # makes text without a bound
    return environment.from_string(template)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise _Refused(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _explain(error: Exception) -> str:
    if isinstance(error, _Refused):
        return f"The chat template refuses these messages: {error}"
    if isinstance(error, jinja2.TemplateSyntaxError):
        return f"The chat template is wrong at line {error.lineno}: {error.message}"
    where = f" at line {line}" if (line := _template_line(error)) else ""
    if isinstance(error, SecurityError):
        return f"The chat template does what is not allowed{where}: {error}"
    return f"The chat template failed{where}: {type(error).__name__}: {error}"


def _template_line(error: Exception) -> int | None:
    """The innermost line of the template in the traceback, which Jinja rewrites to the template's own lines."""
    line, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return line
