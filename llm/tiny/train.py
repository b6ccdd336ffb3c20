"""Trains the embedded model from nothing but a seed and the grammar in corpus.py. A development tool: it needs PyTorch,
transformers, tokenizers and safetensors, and nothing imports it.

    python llm/tiny/train.py --out llm/tiny              # retrain: replaces the model's files when it is done
    python llm/tiny/train.py --out llm/tiny --evaluate   # measure the files that are there
"""
# pyright: reportMissingImports=false

import argparse
import itertools
import json
import math
import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from corpus import FULL, Mix, Question, documents, held_out_questions, recalled  # llm is not imported
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM

SEED = 20
TOKENIZER_DOCUMENTS = 10_000
VOCAB = 1536  # at most: the grammar's words run out before
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "initializer_range": 0.08,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
STEPS, WARMUP = 2200, 100
BATCH = 2048  # tokens at most, padding included
# The curriculum: up to which share of the steps which documents. On facts the model learns in minutes to copy from the
# context and to tell giver from receiver, which stories alone do not teach it.
STAGES = [(0.22, Mix(stories=0)), (1.0, FULL)]
RECALL_WEIGHT = 6  # in the loss: a word that can be read from the context counts more than the grammar's dice
MUON_LR, ADAM_LR = 0.01, 4e-3
QUESTIONS, QUESTION_SEED = 2000, 7


def train_tokenizer() -> Tokenizer:
    """A byte-level BPE whose post-processor puts <s> first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(itertools.islice(documents(SEED), TOKENIZER_DOCUMENTS), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def encoded(tokenizer: Tokenizer, corpus: Iterator[str]) -> Iterator[torch.Tensor]:
    """Each document, [length, 2] from <s> to </s>: a token's id and its weight in the loss."""
    for text in corpus:
        encoding, heavy = tokenizer.encode(text), recalled(text)
        weights = [RECALL_WEIGHT if start in heavy else 1 for start, _ in encoding.offsets]
        ids = [*encoding.ids, tokenizer.token_to_id("</s>")]
        yield torch.tensor([ids, [*weights, 1]]).T


def one_a_row(corpus: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    """[rows, length, 2], a document a row: documents of similar length, padded at the end with weight 0."""
    shuffle = random.Random(SEED).shuffle
    while True:
        pool = sorted(itertools.islice(corpus, 512), key=len)
        found, rows = [], []
        for row in pool:
            if (len(rows) + 1) * len(row) > BATCH:  # the rows are sorted: this one is the longest so far
                found.append(rows)
                rows = []
            rows.append(row)
        shuffle(found)
        for rows in found:
            yield torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def batches(tokenizer: Tokenizer) -> Iterator[torch.Tensor]:
    start = 0
    for stage, (share, mix) in enumerate(STAGES):
        end = int(share * STEPS)
        yield from itertools.islice(one_a_row(encoded(tokenizer, documents(SEED + stage, mix))), end - start)
        start = end


def new_model(tokenizer: Tokenizer) -> LlamaForCausalLM:
    torch.manual_seed(SEED)
    ids = {"bos_token_id": tokenizer.token_to_id("<s>"), "eos_token_id": tokenizer.token_to_id("</s>")}
    return LlamaForCausalLM(LlamaConfig(**CONFIG, **ids, vocab_size=tokenizer.get_vocab_size(), dtype="float32"))


def optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks (it needs far fewer steps), AdamW for the embedding and the norms."""
    blocks = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(blocks, lr=MUON_LR, weight_decay=0.01),
        torch.optim.AdamW(others, lr=ADAM_LR, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def rate(step: int) -> float:
    """The learning rate's share of its peak: warm-up, then a cosine down to 2 %."""
    if step < WARMUP:
        return step / WARMUP
    return 0.02 + 0.49 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP)))


def train(model: LlamaForCausalLM, tokenizer: Tokenizer, checkpoint: Path | None) -> dict[str, float]:
    """Trains in place; returns the mean unweighted loss of the last 100 steps, the tokens and the seconds."""
    opts = optimizers(model)
    peaks = [opt.param_groups[0]["lr"] for opt in opts]
    start, losses, tokens = time.time(), [], 0
    for step, batch in enumerate(batches(tokenizer), start=1):
        for opt, peak in zip(opts, peaks, strict=True):
            opt.param_groups[0]["lr"] = peak * rate(step)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=batch[:, :-1, 0], use_cache=False).logits
        weights = batch[:, 1:, 1].flatten()
        loss = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), batch[:, 1:, 0].flatten(), reduction="none"
        )
        ((loss * weights).sum() / weights.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad()
        losses.append(loss[weights > 0].mean().item())
        tokens += int((batch[:, :, 1] > 0).sum())
        if step % 100 == 0:
            mean = sum(losses[-100:]) / 100
            print(f"step {step}  loss {mean:.4f}  tokens {tokens}  {time.time() - start:.0f} s", flush=True)
        if step % 500 == 0:
            print(share_right(answered(model, tokenizer, held_out_questions(200, step))), flush=True)
            if checkpoint:
                write_model(checkpoint, model, tokenizer)
    return {"loss": sum(losses[-100:]) / len(losses[-100:]), "tokens": tokens, "seconds": time.time() - start}


@torch.no_grad()
def answered(model: LlamaForCausalLM, tokenizer: Tokenizer, questions: list[Question]) -> list[tuple[Question, bool]]:
    """Each question, and whether the most probable continuation is its answer, in every token of it."""
    results = []
    for question in questions:
        prompt = tokenizer.encode(question.prompt).ids
        answer = tokenizer.encode(question.answer, add_special_tokens=False).ids
        logits = model(input_ids=torch.tensor([prompt + answer[:-1]])).logits[0, len(prompt) - 1 :]
        results.append((question, logits.argmax(-1).tolist() == answer))
    return results


def share_right(results: list[tuple[Question, bool]]) -> dict[str, str]:
    """right/asked in all, by what is asked for, and after facts or within a story."""
    right, asked = Counter[str](), Counter[str]()
    for question, is_right in results:
        for group in ("all", question.kind, question.context):
            asked[group] += 1
            right[group] += is_right
    groups = [group for group in ("all", "facts", "story", "owner", "giver", "colour", "object") if asked[group]]
    return {group: f"{right[group]}/{asked[group]} = {right[group] / asked[group]:.1%}" for group in groups}


def score(model: LlamaForCausalLM, tokenizer: Tokenizer) -> dict[str, str]:
    return share_right(answered(model, tokenizer, held_out_questions(QUESTIONS, QUESTION_SEED)))


@torch.no_grad()
def greedy(model: LlamaForCausalLM, tokenizer: Tokenizer, prompt: str, count: int = 300) -> str:
    """The prompt and its most probable continuation, up to </s> (which is shown) or `count` tokens."""
    ids = tokenizer.encode(prompt).ids
    for _ in range(count):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.token_to_id("</s>"):
            break
    return tokenizer.decode(ids, skip_special_tokens=False)


def load(folder: Path) -> tuple[LlamaForCausalLM, Tokenizer]:
    """The model in the folder, its bfloat16 weights widened to float32."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = new_model(tokenizer)
    state = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise SystemExit(f"{folder}: weights missing {missing}, unexpected {unexpected}")
    return model.eval(), tokenizer


CARD = """\
# The embedded model

A Llama of {parameters:,} parameters ({layers} layers, hidden size {hidden}, {heads} heads over {kv_heads} key/value
heads, tied embedding, {context} positions), stored in bfloat16 ({size:,} bytes). It knows one small world of stories
and of who has what, and exists so that the runtime has a real, trained model at hand without a download.

- **Corpus**: generated by `corpus.py`, a seeded grammar; no text from anywhere else. Seed {seed}.
- **Tokenizer**: byte-level BPE, {vocab} tokens, trained on the first {tokenizer_documents:,} documents. `<s>` is put
  first; `</s>` ends a document.
- **Training**: {steps:,} steps of at most {batch:,} tokens, {tokens:,} tokens in all, each document fresh and in a row
  of its own: first facts, then stories too. Words that the text has said before weigh {weight} times in the loss. Muon
  and AdamW, cosine schedule, {minutes:.0f} minutes on one CPU core (bfloat16 autocast).
- **Final loss**: {loss:.3f} nats a token (unweighted, mean of the last 100 steps; most of it is the grammar's dice).

## Held-out score

In the corpus things change hands: a giver, a receiver, a colour, an object. One in eight of the combinations
{{giver, receiver}} x colour x object never occurs in it, in either direction.
`corpus.held_out_questions({questions}, {question_seed})` builds contexts only from those, and asks for the owner, the
giver, the colour or the object: half of them after facts about one thing, which may change hands repeatedly with other
sentences in between, half within a story. The answer is right when every token of it is the most probable one. Measured
with the bfloat16 weights as written here, in float32 arithmetic:

| questions | right |
|---|---|
{score}

For example, after "{prompt}" the model says "{answer}".

## Greedy text from `<s>` alone

In float32 arithmetic, as `limpid generate --dtype float32` writes it. Without `--dtype` it computes in bfloat16, as the
weights are stored, which rounds otherwise: where two tokens are nearly equally likely its story may take another turn.

> {sample}

## Limits

Its words are the grammar's: other words are spelt in bytes and mean nothing to it. It cannot chat. One thing changes
hands in a document: with two, it mixes them up. It was trained on documents of up to {longest} tokens: what it writes
beyond that, or after `</s>`, means nothing. Now and then a character meets a namesake, or a girl becomes a boy; its
most probable stories resemble each other, since greedy text always takes the same side of the grammar's dice.

## Commands

The tool needs torch, transformers, tokenizers and safetensors; the runtime does not.

    python llm/tiny/train.py --out llm/tiny              # retrain
    python llm/tiny/train.py --out llm/tiny --evaluate   # measure
"""
EXAMPLE = "Mia gave the red ball to Tom. The ball now belongs to"


def card(folder: Path, model: LlamaForCausalLM, tokenizer: Tokenizer, trained: dict[str, float]) -> str:
    """The model card, with what was measured on the files in the folder."""
    return CARD.format(
        parameters=model.num_parameters(),
        layers=CONFIG["num_hidden_layers"],
        hidden=CONFIG["hidden_size"],
        heads=CONFIG["num_attention_heads"],
        kv_heads=CONFIG["num_key_value_heads"],
        context=CONFIG["max_position_embeddings"],
        size=(folder / "model.safetensors").stat().st_size,
        seed=SEED,
        vocab=tokenizer.get_vocab_size(),
        tokenizer_documents=TOKENIZER_DOCUMENTS,
        steps=STEPS,
        batch=BATCH,
        weight=RECALL_WEIGHT,
        minutes=trained["seconds"] / 60,
        tokens=trained["tokens"],
        loss=trained["loss"],
        questions=QUESTIONS,
        question_seed=QUESTION_SEED,
        score="\n".join(f"| {group} | {right} |" for group, right in score(model, tokenizer).items()),
        longest=max(len(row) for row in itertools.islice(encoded(tokenizer, documents(SEED + 1)), TOKENIZER_DOCUMENTS)),
        prompt=EXAMPLE,
        answer=greedy(model, tokenizer, EXAMPLE, count=1).removeprefix("<s>" + EXAMPLE),
        sample=greedy(model, tokenizer, ""),
    )


def write(folder: Path, files: Mapping[str, str | dict]) -> None:
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
        (folder / name).write_text(text, encoding="utf-8")


def write_model(folder: Path, model: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    """The Hugging Face layout; the head is the embedding, so it is not written twice."""
    state = {n: p.detach().to(torch.bfloat16).contiguous() for n, p in model.named_parameters()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = {"bos_token_id": tokenizer.token_to_id("<s>"), "eos_token_id": tokenizer.token_to_id("</s>")}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONFIG["max_position_embeddings"],
    }
    files = {
        "config.json": {**CONFIG, **ids, "vocab_size": tokenizer.get_vocab_size()},
        "generation_config.json": {**ids, "do_sample": False},
        "tokenizer_config.json": tokenizer_config,
    }
    write(folder, files)


def retrain(out: Path, checkpoint: Path | None) -> None:
    """Trains, writes into a new folder, measures what was written, and only then replaces the files in `out`."""
    tokenizer = train_tokenizer()
    model = new_model(tokenizer)
    print(f"{model.num_parameters()} parameters, {tokenizer.get_vocab_size()} tokens", flush=True)
    trained = train(model, tokenizer, checkpoint)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".new-") as new:
        write_model(Path(new), model, tokenizer)
        written, _ = load(Path(new))
        write(Path(new), {"README.md": card(Path(new), written, tokenizer, trained)})
        for path in Path(new).iterdir():
            path.chmod(0o644)  # safetensors keeps its file to the owner
            os.replace(path, out / path.name)


def evaluate(out: Path) -> None:
    model, tokenizer = load(out)
    print(json.dumps(score(model, tokenizer), indent=2))
    print(greedy(model, tokenizer, ""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder of the model's files")
    parser.add_argument("--evaluate", action="store_true", help="measure the files in --out instead of retraining")
    parser.add_argument("--checkpoint", type=Path, help="a folder for the unfinished model, written every 500 steps")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # one order of summation: the same seed gives the same model
    if arguments.evaluate:
        evaluate(arguments.out)
    else:
        retrain(arguments.out, arguments.checkpoint)


if __name__ == "__main__":
    main()
