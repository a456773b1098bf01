"""Write the tokenizer of a GGUF file as files of a Hugging Face folder: tokenizer.json and tokenizer_config.json.

The metadata holds a vocabulary of one of two kinds. `gpt2`: byte-level BPE with a list of merges. `llama`: BPE of SentencePiece,
with a score for each piece, and one token for each byte of the letters that no piece covers. The metadata may be hostile: a value
of a wrong type, size or range ends in a ModelError of one line. Knows no file format: the metadata is a plain mapping.

Control tokens become special tokens, so `Tokenizer.defuse` protects them. User-defined tokens are cut out of a text as well, but
a user may write them. The keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pitlane.engine.errors import ModelError, UnsupportedModel
from pitlane.engine.models.config_file import short
from pitlane.engine.text.pretokenizers import PreTokenizer, pre_tokenizer

log = logging.getLogger("pitlane")
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # values of tokenizer.ggml.token_type
MAX_TOKENS, MAX_MERGES, MAX_ADDED = 2**20, 2**21, 2**16  # Gemma has 262,144 tokens, 514,847 merges, 6,414 added tokens
MAX_LETTERS, MAX_TOKEN_LETTERS = 2**24, 512  # in all tokens or in all merges
SPACE = "▁"
# These tokens end an answer. Some files give them the type of an ordinary token.
END_TEXTS = {"<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>"}
T = TypeVar("T")


class Vocabulary(NamedTuple):
    """tokens, types: by id. ids: the id of each text. named: ids of `bos`, `eos`, ..., as far as the model has them."""

    tokens: list[str]
    types: list[int]
    ids: dict[str, int]
    named: dict[str, int]

    def text(self, name: str) -> str | None:
        return self.tokens[self.named[name]] if name in self.named else None


def write_tokenizer(metadata: Mapping[str, object], folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json into `folder`, which exists. Raises ModelError.

    metadata: values by key, as a GGUF file has them: int, float, bool, str, or a list of these.
    """
    kind = _value(metadata, "tokenizer.ggml.model", str)
    if kind not in ("gpt2", "llama"):
        raise UnsupportedModel(f"tokenizer.ggml.model {short(kind)} is not supported; known: gpt2, llama")
    pre = _pre_tokenizer(metadata) if kind == "gpt2" else None
    vocabulary = _vocabulary(metadata, {} if pre else {"bos": 1, "eos": 2, "unknown": 0})
    settings = _settings(metadata, vocabulary, pre is None or pre.adds_bos)
    try:
        inner = _byte_level(metadata, vocabulary, pre) if pre else _sentence_piece(metadata, vocabulary)
        _add_tokens(inner, vocabulary)
        _add_ends(inner, vocabulary, settings)
        texts = {"tokenizer.json": inner.to_str(), "tokenizer_config.json": json.dumps(settings, indent=1)}
    except ModelError:
        raise
    except Exception as error:  # tokenizers raises bare exceptions
        words = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(
            f"the tokenizer of the GGUF file is damaged: {short(words)}; download the file again"
        ) from None
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def _value(metadata: Mapping[str, object], key: str, kind: type[T], default: T | None = None) -> T:
    value = metadata.get(key, default)
    if value is None:
        raise ModelError(f"the GGUF file lacks {key}; choose another file")
    if type(value) is not kind:  # not isinstance: a bool is no id
        raise ModelError(f"{key} must be of type {kind.__name__}, got {short(value)}")
    return value


def _list(metadata: Mapping[str, object], key: str, kinds: tuple[type, ...], limit: int) -> list[Any]:
    values: list[Any] = _value(metadata, key, list)
    if len(values) > limit:
        raise ModelError(f"{key} has {len(values):,} values, at most {limit:,} are supported")
    wrong = next((value for value in values if type(value) not in kinds), None)
    if wrong is not None:
        raise ModelError(f"{key} must hold values of type {kinds[0].__name__}, got {short(wrong)}")
    return values


def _pre_tokenizer(metadata: Mapping[str, object]) -> PreTokenizer:
    name = _value(metadata, "tokenizer.ggml.pre", str, "")
    if not name:  # files older than May 2024
        log.warning("the GGUF file lacks tokenizer.ggml.pre; reading it as `default`, which may cost quality")
    return pre_tokenizer(name or "default", metadata.get("general.architecture"))


def _vocabulary(metadata: Mapping[str, object], defaults: Mapping[str, int]) -> Vocabulary:
    """defaults: ids by name, for a file that does not name these tokens."""
    tokens = _tokens(metadata)
    ids = {text: token_id for token_id, text in enumerate(tokens)}
    if len(ids) < len(tokens):
        first, text = next((token_id, text) for token_id, text in enumerate(tokens) if ids[text] != token_id)
        raise ModelError(f"tokenizer.ggml.tokens has {short(text)} twice, as {first} and {ids[text]}")
    types = [NORMAL] * len(tokens)
    if "tokenizer.ggml.token_type" in metadata:
        types = list(_list(metadata, "tokenizer.ggml.token_type", (int,), MAX_TOKENS))
    if len(types) != len(tokens):
        raise ModelError(f"tokenizer.ggml.token_type has {len(types):,} values for {len(tokens):,} tokens")
    named = _named_ids(metadata, defaults, types)
    for token_id in {*named.values(), *(ids[text] for text in END_TEXTS & ids.keys())}:
        types[token_id] = CONTROL
    return Vocabulary(tokens, types, ids, named)


def _tokens(metadata: Mapping[str, object]) -> list[str]:
    tokens: list[str] = _list(metadata, "tokenizer.ggml.tokens", (str,), MAX_TOKENS)
    lengths = [len(text) for text in tokens]
    if not any(lengths):
        raise ModelError("tokenizer.ggml.tokens has no text; choose another file")
    if max(lengths) > MAX_TOKEN_LETTERS or sum(lengths) > MAX_LETTERS:
        raise ModelError(
            f"tokenizer.ggml.tokens has {sum(lengths):,} letters, {max(lengths):,} in one token; "
            f"at most {MAX_LETTERS:,} and {MAX_TOKEN_LETTERS:,} are supported"
        )
    return [text or f"[EMPTY_{token_id}]" for token_id, text in enumerate(tokens)]  # as llama.cpp names them


def _named_ids(metadata: Mapping[str, object], defaults: Mapping[str, int], types: list[int]) -> dict[str, int]:
    named = {}
    for name in ("bos", "eos", "eot", "eom", "unknown", "padding"):
        key = f"tokenizer.ggml.{name}_token_id"
        token_id = _value(metadata, key, int, defaults.get(name, -1))
        known = 0 <= token_id < len(types)
        if name in ("unknown", "padding") and (not known or types[token_id] == NORMAL):
            continue  # the engine needs neither; some files name an id that does not exist, or `!`
        if known:
            named[name] = token_id
        elif key in metadata:
            raise ModelError(f"{key} must be an id below {len(types):,}, got {token_id}")
    return named


def _settings(metadata: Mapping[str, object], vocabulary: Vocabulary, adds_bos: bool) -> dict[str, object]:
    """The values of tokenizer_config.json."""
    settings: dict[str, object] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name, token in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        if token in vocabulary.named:
            settings[f"{name}_token"] = vocabulary.text(token)
    for name, default in (("bos", adds_bos), ("eos", False)):
        key = f"tokenizer.ggml.add_{name}_token"
        adds = _value(metadata, key, bool, default)
        if adds and key in metadata and name not in vocabulary.named:
            raise ModelError(f"{key} is true, but the GGUF file lacks tokenizer.ggml.{name}_token_id")
        settings[f"add_{name}_token"] = adds and name in vocabulary.named
    if template := _value(metadata, "tokenizer.chat_template", str, ""):
        settings["chat_template"] = template
    return settings


def _byte_level(metadata: Mapping[str, object], vocabulary: Vocabulary, pre: PreTokenizer) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pairs = [_pair(merge, vocabulary.ids) for merge in _list(metadata, "tokenizer.ggml.merges", (str,), MAX_MERGES)]
    merges = list(dict.fromkeys(pairs))  # the first of two equal merges counts; tokenizers would take the second
    inner = Tokenizer(models.BPE(vocab=vocabulary.ids, merges=merges, ignore_merges=pre.whole_words))
    if pre.nfc:
        inner.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.pre_tokenizer = pre_tokenizers.Sequence([*splits, letters])
    inner.decoder = decoders.ByteLevel()
    return inner


def _pair(merge: str, ids: Mapping[str, int]) -> tuple[str, str]:
    middle = merge.find(" ", 1)
    left, right = merge[:middle], merge[middle + 1 :]
    if middle < 0 or not {left, right, left + right} <= ids.keys():
        raise ModelError(f"tokenizer.ggml.merges has {short(merge)}, which does not join two tokens to a token")
    return left, right


def _sentence_piece(metadata: Mapping[str, object], vocabulary: Vocabulary) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    unknown = vocabulary.text("unknown")
    lacking = next((name for name in map("<0x{:02X}>".format, range(256)) if name not in vocabulary.ids), None)
    if lacking and not unknown:
        raise ModelError(f"tokenizer.ggml.tokens has neither {lacking} nor an unknown token; choose another file")
    merges = _merges(metadata, vocabulary)
    bpe = models.BPE(vocab=vocabulary.ids, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    inner = Tokenizer(bpe)
    before: list[Any] = [normalizers.Replace(" ", SPACE)]
    after: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if _value(metadata, "tokenizer.ggml.add_space_prefix", bool, True):
        before.insert(0, normalizers.Prepend(SPACE))
        after.append(decoders.Strip(" ", 1, 0))
    inner.normalizer, inner.decoder = normalizers.Sequence(before), decoders.Sequence(after)
    return inner


def _merges(metadata: Mapping[str, object], vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """All pairs of pieces that form a piece, the best score of the formed piece first, as SentencePiece merges.

    Of pairs with one score, SentencePiece merges the leftmost in the text. A list of merges cannot say so. Here the pair with the
    longer left piece comes first: in a run of equal letters, merges from the left leave the shorter piece on the right.
    """
    scores: list[float] = _list(metadata, "tokenizer.ggml.scores", (float, int), MAX_TOKENS)
    if len(scores) != len(vocabulary.tokens) or not all(map(isfinite, scores)):
        raise ModelError(
            f"tokenizer.ggml.scores must be {len(vocabulary.tokens):,} finite numbers; choose another file"
        )
    never_spelled = (CONTROL, UNKNOWN, BYTE)
    spelled = [token_id for token_id, kind in enumerate(vocabulary.types) if kind not in never_spelled]
    ranked = [vocabulary.tokens[token_id] for token_id in sorted(spelled, key=lambda token_id: -scores[token_id])]
    pieces, merges, num_letters = set(ranked), [], 0
    for text in ranked:
        for cut in range(len(text) - 1, 0, -1):
            if text[:cut] in pieces and text[cut:] in pieces:
                merges.append((text[:cut], text[cut:]))
                num_letters += len(text)
        if num_letters > MAX_LETTERS:
            raise ModelError(f"the merges of tokenizer.ggml.tokens have more than {MAX_LETTERS:,} letters")
    return merges


def _add_tokens(inner: Any, vocabulary: Vocabulary) -> None:
    """Name the tokens that are cut out of a text before all else."""
    from tokenizers import AddedToken

    texts: dict[int, list[str]] = {kind: [] for kind in (CONTROL, UNKNOWN, USER_DEFINED)}
    for text, kind in zip(vocabulary.tokens, vocabulary.types, strict=True):
        texts.get(kind, []).append(text)
    special, plain = texts[CONTROL] + texts[UNKNOWN], texts[USER_DEFINED]
    if len(special) + len(plain) > MAX_ADDED:
        raise ModelError(
            f"the GGUF file has {len(special) + len(plain):,} special tokens, at most {MAX_ADDED:,} are supported"
        )
    inner.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    inner.add_tokens([AddedToken(text, special=False, normalized=False) for text in plain])


def _add_ends(inner: Any, vocabulary: Vocabulary, settings: Mapping[str, object]) -> None:
    """Set the tokens before and after a text. transformers makes the same template from the settings."""
    from tokenizers import processors

    ends = {name: vocabulary.text(name) for name in ("bos", "eos") if settings[f"add_{name}_token"]}
    before, after = (f"{ends[name]}:0" if name in ends else "" for name in ("bos", "eos"))
    special = [(text, vocabulary.ids[text]) for text in ends.values() if text]
    inner.post_processor = processors.TemplateProcessing(
        single=f"{before} $A:0 {after}".strip(), special_tokens=special
    )
