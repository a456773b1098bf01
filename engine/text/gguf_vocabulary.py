"""The vocabulary in the metadata of a GGUF file, checked.

The metadata may be hostile. A value of a wrong type, size or range ends in a ModelError of one line that names the key.
The keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

from pitlane.engine.errors import ModelError
from pitlane.engine.models.config_file import short

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # values of tokenizer.ggml.token_type
MAX_TOKENS, MAX_LETTERS = 2**20, 2**24  # Gemma has 262,144 tokens with 1,476,602 letters
MAX_TOKEN_LETTERS = 512
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


def value_of(metadata: Mapping[str, object], key: str, kind: type[T], default: T | None = None) -> T:
    """The value of a key, of exactly this type. Without a default, the file must have the key."""
    value = metadata.get(key, default)
    if value is None:
        raise ModelError(f"the GGUF file lacks {key}; choose another file")
    if type(value) is not kind:  # not isinstance: a bool is no id
        raise ModelError(f"{key} must be of type {kind.__name__}, got {short(value)}")
    return value


def list_of(metadata: Mapping[str, object], key: str, kinds: tuple[type, ...], limit: int) -> list[Any]:
    """The list of a key, with values of these types, no longer than the limit."""
    values: list[Any] = value_of(metadata, key, list)
    if len(values) > limit:
        raise ModelError(f"{key} has {len(values):,} values, at most {limit:,} are supported")
    for value in values:
        if type(value) not in kinds:
            raise ModelError(f"{key} must hold values of type {kinds[0].__name__}, got {short(value)}")
    return values


def read_vocabulary(metadata: Mapping[str, object], defaults: Mapping[str, int]) -> Vocabulary:
    """defaults: ids by name, for a file that does not name these tokens. Raises ModelError."""
    tokens = _tokens(metadata)
    ids = {text: token_id for token_id, text in enumerate(tokens)}
    if len(ids) < len(tokens):
        first, text = next((token_id, text) for token_id, text in enumerate(tokens) if ids[text] != token_id)
        raise ModelError(f"tokenizer.ggml.tokens has {short(text)} twice, as {first} and {ids[text]}")
    types = [NORMAL] * len(tokens)
    if "tokenizer.ggml.token_type" in metadata:
        types = list(list_of(metadata, "tokenizer.ggml.token_type", (int,), MAX_TOKENS))
    if len(types) != len(tokens):
        raise ModelError(f"tokenizer.ggml.token_type has {len(types):,} values for {len(tokens):,} tokens")
    named = _named_ids(metadata, defaults, types)
    for token_id in {*named.values(), *(ids[text] for text in END_TEXTS & ids.keys())}:
        types[token_id] = CONTROL
    return Vocabulary(tokens, types, ids, named)


def _tokens(metadata: Mapping[str, object]) -> list[str]:
    tokens: list[str] = list_of(metadata, "tokenizer.ggml.tokens", (str,), MAX_TOKENS)
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
        token_id = value_of(metadata, key, int, defaults.get(name, -1))
        known = 0 <= token_id < len(types)
        if name in ("unknown", "padding") and (not known or types[token_id] == NORMAL):
            continue  # the engine needs neither; some files name an id that does not exist, or `!`
        if known:
            named[name] = token_id
        elif key in metadata:
            raise ModelError(f"{key} must be an id below {len(types):,}, got {token_id}")
    return named
