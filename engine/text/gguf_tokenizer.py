"""Write the tokenizer of a GGUF file as files of a Hugging Face folder: tokenizer.json and tokenizer_config.json.

The metadata holds a vocabulary of one of two kinds. `gpt2`: byte-level BPE with a list of merges. `llama`: BPE of SentencePiece,
with a score for each piece, and one token for each byte of the letters that no piece covers. The ids are those of llama.cpp, apart
from a few pre-tokenizers (`pretokenizers.py`). Knows no file format: the metadata is a plain mapping.

Control tokens become special tokens, so `Tokenizer.defuse` protects them. User-defined tokens are cut out of a text as well, but
a user may write them.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from pitlane.engine.errors import ModelError, UnsupportedModel
from pitlane.engine.models.config_file import short
from pitlane.engine.text.gguf_vocabulary import (
    BYTE,
    CONTROL,
    MAX_LETTERS,
    MAX_TOKENS,
    UNKNOWN,
    USER_DEFINED,
    Vocabulary,
    list_of,
    read_vocabulary,
    value_of,
)
from pitlane.engine.text.pretokenizers import PreTokenizer, pre_tokenizer

log = logging.getLogger("pitlane")
MAX_MERGES, MAX_ADDED = 2**21, 2**16  # Gemma has 514,847 merges and 6,414 added tokens
SPACE = "▁"  # SentencePiece writes a space so


def write_tokenizer(metadata: Mapping[str, object], folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json into `folder`, which exists. Raises ModelError.

    metadata: values by key, as a GGUF file has them: int, float, bool, str, or a list of these.
    """
    kind = value_of(metadata, "tokenizer.ggml.model", str)
    if kind not in ("gpt2", "llama"):
        raise UnsupportedModel(f"tokenizer.ggml.model {short(kind)} is not supported; known: gpt2, llama")
    if (
        kind == "llama" and metadata.get("general.architecture") == "qwen2"
    ):  # transformers ignores the tokenizer.json of such a model
        raise UnsupportedModel("tokenizer.ggml.model llama is not supported for qwen2, only gpt2; choose another file")
    pre = _pre_tokenizer(metadata) if kind == "gpt2" else None
    vocabulary = read_vocabulary(metadata, {} if pre else {"bos": 1, "eos": 2, "unknown": 0})
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


def _pre_tokenizer(metadata: Mapping[str, object]) -> PreTokenizer:
    name = value_of(metadata, "tokenizer.ggml.pre", str, "")
    if not name:  # files older than May 2024
        log.warning("the GGUF file lacks tokenizer.ggml.pre; reading it as `default`, which may cost quality")
    return pre_tokenizer(name or "default", metadata.get("general.architecture"))


def _settings(metadata: Mapping[str, object], vocabulary: Vocabulary, adds_bos: bool) -> dict[str, object]:
    """The values of tokenizer_config.json."""
    settings: dict[str, object] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name, token in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        if token in vocabulary.named:
            settings[f"{name}_token"] = vocabulary.text(token)
    for name, default in (("bos", adds_bos), ("eos", False)):
        key = f"tokenizer.ggml.add_{name}_token"
        adds = value_of(metadata, key, bool, default)
        if adds and key in metadata and name not in vocabulary.named:
            raise ModelError(f"{key} is true, but the GGUF file lacks tokenizer.ggml.{name}_token_id")
        settings[f"add_{name}_token"] = adds and name in vocabulary.named
    if template := value_of(metadata, "tokenizer.chat_template", str, ""):
        settings["chat_template"] = template
    return settings


def _byte_level(metadata: Mapping[str, object], vocabulary: Vocabulary, pre: PreTokenizer) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pairs = [_pair(merge, vocabulary.ids) for merge in list_of(metadata, "tokenizer.ggml.merges", (str,), MAX_MERGES)]
    merges = list(dict.fromkeys(pairs))  # the first of two equal merges counts; tokenizers would take the second
    inner = Tokenizer(models.BPE(vocab=vocabulary.ids, merges=merges, ignore_merges=pre.whole_words))
    if pre.nfc:
        inner.normalizer = normalizers.NFC()
    steps: list[Any] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    if absent := sorted(set(pre_tokenizers.ByteLevel.alphabet()) - vocabulary.ids.keys()):
        # a byte without a token is left out, and the bytes around it do not merge
        steps.append(pre_tokenizers.Split(Regex("|".join(map(re.escape, absent))), "removed"))
    inner.pre_tokenizer = pre_tokenizers.Sequence(steps)
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
    if value_of(metadata, "tokenizer.ggml.add_space_prefix", bool, True):
        before.insert(0, normalizers.Prepend(SPACE))
        after.append(decoders.Strip(" ", 1, 0))
    inner.normalizer, inner.decoder = normalizers.Sequence(before), decoders.Sequence(after)
    return inner


def _merges(metadata: Mapping[str, object], vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """All pairs of pieces that form a piece, the best score of the formed piece first, as SentencePiece merges.

    Of pieces with equal scores, the lower id comes first. SentencePiece takes the leftmost in the text then, which a list of merges
    cannot express. Scores of real vocabularies differ.
    """
    scores: list[float] = list_of(metadata, "tokenizer.ggml.scores", (float, int), MAX_TOKENS)
    if len(scores) != len(vocabulary.tokens) or not all(map(isfinite, scores)):
        raise ModelError(
            f"tokenizer.ggml.scores must be {len(vocabulary.tokens):,} finite numbers; choose another file"
        )
    never_spelled = (CONTROL, UNKNOWN, BYTE)
    spelled = [token_id for token_id, kind in enumerate(vocabulary.types) if kind not in never_spelled]
    ranked = [vocabulary.tokens[token_id] for token_id in sorted(spelled, key=lambda token_id: -scores[token_id])]
    pieces, merges, num_letters = set(ranked), [], 0
    for text in ranked:
        for cut in range(1, len(text)):
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
