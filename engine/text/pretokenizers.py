r"""How byte-level tokenizers cut a text into words before they merge bytes. A GGUF file names the way in `tokenizer.ggml.pre`.

The names and their groups are those of llama.cpp (src/llama-vocab.cpp). The regular expressions are those of the models' own
tokenizer.json. llama.cpp approximates some of them, so its ids differ from these: `qwen2` composes letters and accents (NFC),
`tekken` and `gpt-4o` know letters, cases and accents of all scripts, `'ſ` is a contraction as `'s` is, and the range of
`deepseek-coder` contains U+2000 to U+206F. Knows no vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

from pitlane.engine.errors import UnsupportedModel
from pitlane.engine.models.config_file import short

DIGIT = r"\p{N}"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORD, SPACES = r"[^\r\n\p{L}\p{N}]?\p{L}+", r"\s*[\r\n]+|\s+(?!\S)|\s+"
SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
QWEN2 = rf"{CONTRACTION}|{WORD}|\p{{N}}|{SYMBOLS}|{SPACES}"
LLAMA3 = rf"{CONTRACTION}|{WORD}|\p{{N}}{{1,3}}|{SYMBOLS}|{SPACES}"
SEED_CODER = rf"{CONTRACTION}|{WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{SPACES}"
# Words that change from capitals to small letters at most once: `HTTPServer` is one word, `httpServer` is two.
CAPITALS, SMALL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
WORDS = rf"[^\r\n\p{{L}}\p{{N}}]?{CAPITALS}*{SMALL}+", rf"[^\r\n\p{{L}}\p{{N}}]?{CAPITALS}+{SMALL}*"
PATHS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
TEKKEN = rf"{WORDS[0]}|{WORDS[1]}|\p{{N}}|{PATHS}|{SPACES}"
GPT4O = rf"{WORDS[0]}{CONTRACTION}?|{WORDS[1]}{CONTRACTION}?|\p{{N}}{{1,3}}|{PATHS}|{SPACES}"
ASIAN = "[一-龥ࠀ-一가-\ud7ff]+"


class PreTokenizer(NamedTuple):
    """patterns: cut the text, one after the other. A match and the text between two matches become words.

    whole_words: a word that is a token stays whole, even if no merges lead to it. adds_bos: the default of
    `tokenizer.ggml.add_bos_token`. nfc: composes letters and accents first.
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    adds_bos: bool = False
    nfc: bool = False


GROUPS = {
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "gpt-2 phi-2 mellum exaone4 mpt trillion granite-docling": PreTokenizer((GPT2,)),
    "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2": PreTokenizer((DIGIT, GPT2)),
    "llama-bpe llama3 llama-v3 falcon3 pixtral midm-2.0": PreTokenizer((LLAMA3,), whole_words=True, adds_bos=True),
    "smaug-bpe dbrx": PreTokenizer((LLAMA3,)),
    "qwen2": PreTokenizer((QWEN2,), nfc=True),
    "deepseek-r1-qwen megrez kormo stablelm2": PreTokenizer((QWEN2,)),
    "tekken": PreTokenizer((TEKKEN,), whole_words=True, adds_bos=True),
    "gpt-4o llama4 kanana2": PreTokenizer((GPT4O,)),
    "seed-coder": PreTokenizer((SEED_CODER,)),
    "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", ASIAN, DIGIT)),
}
PRE_TOKENIZERS = {name: group for names, group in GROUPS.items() for name in names.split()}


def pre_tokenizer(name: str, architecture: object) -> PreTokenizer:
    """The pre-tokenizer of this name. Refuses an unknown name: other words give other ids, and the model answers worse in silence.

    architecture: `general.architecture`. Raises UnsupportedModel.
    """
    if name not in PRE_TOKENIZERS:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise UnsupportedModel(f"tokenizer.ggml.pre {short(name)} is not supported; known: {known}")
    chosen = PRE_TOKENIZERS[name]
    if architecture == "qwen2" and chosen.patterns != (
        QWEN2,
    ):  # transformers ignores the tokenizer.json of such a model
        raise UnsupportedModel(f"tokenizer.ggml.pre {name} is not supported for qwen2; choose a file with qwen2")
    return chosen
