r"""How byte-level BPE vocabularies cut text into pieces before merging: `tokenizer.ggml.pre` of a GGUF file.

The patterns are those of each model's tokenizer.json, taken one after another: each cuts what the last left whole.
"""

# ruff: noqa: RUF001 - the patterns name letters and marks of all scripts
from __future__ import annotations

from typing import NamedTuple


class Pre(NamedTuple):
    """`whole`: a piece that is a token is taken whole, whatever merges would make. `bos`: whether it is put first."""

    patterns: tuple[str, ...]
    whole: bool = False
    bos: bool = False


_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s+(?!\S)|\s+"
_GPT2 = rf"'s|'t|'re|'ve|'m|'ll|'d| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|{_SPACES}"


def _words(letters: str, digits: str, others: str = r" ?[^\s\p{L}\p{N}]+[\r\n]*") -> str:
    """The shape of the patterns since GPT-4's: words, runs of digits, runs of others, newlines, spaces."""
    return rf"{letters}|{digits}|{others}|\s*[\r\n]+|{_SPACES}"


_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = tuple(rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}{a}{_LOWER}{b}" for a, b in (("*", "+"), ("+", "*")))
_SLASHED = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_LLAMA3 = _words(rf"{_SHORT}|{_LETTERS}", r"\p{N}{1,3}")
_QWEN2 = _words(rf"{_SHORT}|{_LETTERS}", r"\p{N}")
_TEKKEN = _words("|".join(_CASED), r"\p{N}", _SLASHED)
_GPT4O = _words("|".join(f"{each}{_SHORT}?" for each in _CASED), r"\p{N}{1,3}", _SLASHED)
_CJK = "[一-龥\u3040-ゟ゠-ヿ]+"
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    _CJK,
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_DEEPSEEK_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ"
    "\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ"
    "𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?[{_DEEPSEEK_LETTERS}]+",
    r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
    r"\s+$",
    "[一-龥ࠀ-一가-\ud7ff]+",
    r"\p{N}+",
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+", r"\p{N}")
_WORDS_AND_MARKS = r" ?[^(\s|.,!?…。，、।۔،)]+"

_BY_PATTERN: dict[str, Pre] = {
    "default": Pre((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "gpt-2 phi-2 jina-es jina-de jina-v2-es jina-v2-de gigachat a.x-4.0 mellum modern-bert mpt olmo jais trillion "
    "granite-docling exaone4": Pre((_GPT2,)),
    "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2": Pre((_LLAMA3,), whole=True, bos=True),
    "dbrx smaug-bpe glm4 chatglm-bpe": Pre((_LLAMA3,)),
    "qwen2 deepseek-r1-qwen kormo megrez stablelm2 hunyuan solar-open grok-2": Pre((_QWEN2,)),
    "qwen35": Pre(
        (_words(rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+", r"\p{N}", r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"),)
    ),
    "starcoder refact command-r smollm codeshell exaone minerva-7b mellum2": Pre((r"\p{N}", _GPT2)),
    "falcon": Pre((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
    "deepseek-llm": Pre(_DEEPSEEK_LLM),
    "deepseek-coder": Pre(_DEEPSEEK_CODER),
    "deepseek-v3 hunyuan-dense joyai-llm hy_v4": Pre(_DEEPSEEK3),
    "tekken": Pre((_TEKKEN,), whole=True, bos=True),
    "gpt-4o llama4 kanana2 minimax-m2 talkie": Pre((_GPT4O,)),
    "bloom gpt3-finnish poro-chat": Pre((_WORDS_AND_MARKS,)),
    "viking": Pre((_WORDS_AND_MARKS, r"\p{N}")),
    "seed-coder": Pre((_words(rf"{_SHORT}|{_LETTERS}", r"\p{N}", r" ?[^\s\p{L}\p{N}\r\n]+"),)),
    "tiny_aya cohere2moe": Pre((r"\d{1,3}(?=(?:\d{3})*\b)", _GPT4O)),
}
PRE: dict[str, Pre] = {name: each for names, each in _BY_PATTERN.items() for name in names.split()}
