"""The embedded model: what it promises in its card, measured by this runtime."""

import re
from pathlib import Path

import numpy as np
import pytest

import llm
from llm.tiny import corpus

TINY = Path(llm.__file__).parent / "tiny"
QUESTIONS = 200


@pytest.fixture(scope="module", params=[None, "float32"], ids=["as stored", "float32"])
def model(request):
    return llm.load("tiny", dtype=request.param)


def answers(model, question) -> bool:
    """Whether every token of the answer is the likeliest one."""
    prompt = model.tokenizer.encode(question.prompt)
    answer = model.tokenizer.encode(question.answer, bos=False)
    logits = model(prompt + answer[:-1], logits_to_keep=len(answer)).numpy()
    return logits.argmax(axis=-1).tolist() == answer


@pytest.mark.parametrize("weights", ["q8", "q4"])
def test_it_answers_with_packed_weights(seed, weights):
    packed, questions = llm.load("tiny", weights=weights), corpus.held_out_questions(QUESTIONS, seed)
    right = np.mean([answers(packed, question) for question in questions])
    assert right >= 0.95, f"{right:.1%} of {QUESTIONS} held-out questions"


def test_it_answers_for_a_reason(model, seed):
    questions = corpus.held_out_questions(QUESTIONS, seed)
    right = np.mean([answers(model, question) for question in questions])
    assert right >= 0.95, f"{right:.1%} of {QUESTIONS} held-out questions"


def test_the_ball_belongs_to_tom(model):
    text = model.generate("Mia gave the red ball to Tom. The ball now belongs to", max_tokens=1)
    assert text == " Tom"


def test_its_story_is_one_story():
    text = llm.load("tiny").generate("", max_tokens=200)
    sentences = re.findall(r"[^.!?]+[.!?]", text)
    assert len(sentences) >= 10
    long = [sentence for sentence in sentences if len(sentence.split()) >= 5]
    assert len(set(long)) == len(long)  # it does not go round in circles
    assert not re.search(r"(\w+) (?:gave|handed) (?:the \w+ \w+ to )?\1\b", text)  # nobody gives to themselves
    people = re.findall(r"(?:named|is) ([A-Z]\w+)", text)
    assert people and text.count(people[0]) >= 3


def test_it_is_small():
    model = llm.load("tiny")
    assert sum(weight.size for _, weight in model.parameters()) <= 4_000_000
    assert sum(path.stat().st_size for path in TINY.iterdir() if path.is_file()) <= 8_000_000
    card = (TINY / "README.md").read_text("utf-8")
    for word in ("Seed", "Corpus", "steps", "loss", "Held-out score", "With packed weights", "--evaluate"):
        assert word in card
