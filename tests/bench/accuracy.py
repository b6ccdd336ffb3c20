"""What packed weights cost in accuracy: `python -m tests.bench.accuracy` prints tables; `--card` puts the embedded
model's score into its card.

The error after each layer is the root of the mean squared difference from the float32 model's hidden state, over the
root of the mean square of that. The score is that of the card: the share of held-out questions answered right.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import llm
from llm.bench import SHAPES
from llm.load import build, randomize
from llm.tiny import corpus
from ops import tensor
from ops.quantize import FORMATS

CARD = Path(llm.__file__).parent / "tiny" / "README.md"
_HEADING = "## With packed weights"
_GROUPS = ("all", "facts", "story", "owner", "giver", "colour", "object")
_QUESTIONS, _SEED = 2000, 7  # as in the card


def states(model: Any, ids: list[int]) -> dict[str, np.ndarray]:
    """The hidden state after each layer and the logits, float64 [n, width]."""
    found: dict[str, np.ndarray] = {}
    for i, layer in enumerate(model.layers):
        forward = type(layer).forward

        def noted(*args: Any, i: int = i, layer: Any = layer, forward: Any = forward) -> Any:
            result = forward(layer, *args)
            found[f"layer {i}"] = result.numpy().astype("float64")
            return result

        layer.forward = noted
    try:
        logits = model(ids).numpy().astype("float64")
    finally:
        for layer in model.layers:
            del layer.forward
    return found | {"logits": logits}


def errors(plain: Any, packed: Any, ids: list[int]) -> dict[str, float]:
    """By layer, and of the logits: how far `packed` is from `plain`."""
    expected, given = states(plain, ids), states(packed, ids)
    return {
        name: float(np.sqrt(np.mean((given[name] - value) ** 2) / np.mean(value**2)))
        for name, value in expected.items()
    }


def answers(model: Any, question: corpus.Question) -> bool:
    """Whether every token of the answer is the likeliest one."""
    prompt = model.tokenizer.encode(question.prompt)
    answer = model.tokenizer.encode(question.answer, bos=False)
    logits = model(prompt + answer[:-1], logits_to_keep=len(answer)).numpy()
    return logits.argmax(axis=-1).tolist() == answer


def score(model: Any) -> dict[str, str]:
    """By group of held-out questions, how many are answered right."""
    asked, right = Counter[str](), Counter[str]()
    for question in corpus.held_out_questions(_QUESTIONS, _SEED):
        is_right = answers(model, question)
        for group in ("all", question.kind, question.context):
            asked[group] += 1
            right[group] += is_right
    return {group: f"{right[group]}/{asked[group]} = {right[group] / asked[group]:.1%}" for group in _GROUPS}


def section(scores: dict[str, dict[str, str]], found: dict[str, dict[str, float]]) -> str:
    """The card's section."""
    lines = [
        _HEADING,
        "",
        "The same questions, with matrices in 8 or 4 bits, activations in 8, and a float16 cache",
        "(`python -m tests.bench.accuracy --card` measures it anew):",
        "",
        f"| questions | {' | '.join(scores)} |",
        f"|---|{'---|' * len(scores)}",
        *(f"| {group} | {' | '.join(each[group] for each in scores.values())} |" for group in _GROUPS),
        "",
        "The error of the hidden state after each layer and of the logits, relative to float32 (root mean square),",
        "over the greedy text below:",
        "",
        f"| after | {' | '.join(found)} |",
        f"|---|{'---|' * len(found)}",
        *(
            f"| {place} | {' | '.join(f'{each[place]:.2%}' for each in found.values())} |"
            for place in next(iter(found.values()))
        ),
    ]
    return "\n".join(lines)


def put_into_card(text: str) -> None:
    """Replace the section in the card, or put it before the next one."""
    card = CARD.read_text("utf-8")
    card = re.sub(rf"{_HEADING}\n.*?(?=\n## )", "", card, flags=re.DOTALL).replace("\n\n\n", "\n\n")
    before, after = card.split("## Greedy text", 1)
    CARD.write_text(f"{before}{text}\n\n## Greedy text{after}", "utf-8")


def same_values(model: Any, shape: str, form: str) -> Any:
    """A packed twin of a model of random weights."""
    twin = build(SHAPES[shape], "float32", form)
    for name, weight in list(model.parameters()):
        packed = name.endswith("weight") and weight.ndim == 2
        twin.set_parameter(name, tensor(weight.numpy(), form) if packed else weight)
    return twin


def show(title: str, found: dict[str, dict[str, Any]]) -> None:
    table = Table(title=title, box=None)
    table.add_column("")
    for name in found:
        table.add_column(name, justify="right")
    for row in next(iter(found.values())):
        values = (each[row] for each in found.values())
        table.add_row(row, *(f"{value:.2%}" if isinstance(value, float) else value for value in values))
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", action="store_true", help="put the embedded model's figures into its card")
    parser.add_argument("--shape", choices=list(SHAPES), default="135m", help="whose layers to look at besides")
    options = parser.parse_args()
    plain = llm.load("tiny", dtype="float32")
    packed = {form: llm.load("tiny", weights=form) for form in sorted(FORMATS, reverse=True)}
    ids = plain.tokenizer.encode("") + plain.generate("", max_tokens=150).tokens
    scores = {name: score(model) for name, model in {"float32": plain, **packed}.items()}
    found = {name: errors(plain, model, ids) for name, model in packed.items()}
    show("held-out questions, embedded model", scores)
    show("error after each layer, embedded model", found)
    if options.card:
        put_into_card(section(scores, found))
    model = randomize(build(SHAPES[options.shape], "float32"))
    twins = {form: same_values(model, options.shape, form) for form in packed}
    random = np.random.default_rng(0).integers(0, SHAPES[options.shape]["vocab_size"], 128).tolist()
    show(
        f"error after each layer, random {options.shape}",
        {form: errors(model, twin, random) for form, twin in twins.items()},
    )


if __name__ == "__main__":
    main()
