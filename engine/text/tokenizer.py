"""Convert text to token ids and back, and lay out prompts.

Wraps the tokenizer of transformers; reads local files only and runs no code of the model. Documents come first, at the
head of a system message. The same documents always give the same bytes, so their KV can be shared. A user's text cannot
become a special token: a zero-width joiner splits it. This holds too if only the tokenizer's normaliser makes the special token
(from full width letters, capitals).
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from pitlane.engine.errors import BadOption, ModelError
from pitlane.engine.text.chat_template import apply_template
from pitlane.engine.text.prompt import Segment

if TYPE_CHECKING:
    from pathlib import Path

    from pitlane.engine.models.source import ModelSource
    from pitlane.storage.types import Document

JOINER = "\u200d"
UNREADABLE = "\ufffd"
PROBE = "pitlane-system-probe"
PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
PLAIN = {"llama", "mistral", "smollm3", "qwen3"}  # without qwen2: transformers has another tokenizer for it


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt for the model. segments: per document, the tokens wholly inside it. text: the prompt before encoding."""

    token_ids: list[int]
    segments: tuple[Segment, ...]
    text: str


class Tokenizer:
    """Encodes and decodes text and lays out prompts for one model. specials: matches the text of any special token."""

    def __init__(self, source: ModelSource) -> None:
        self._inner = _load(source)
        self._inner.model_max_length = 10**9  # silences the tokenizer's own warning: the engine checks lengths
        specials = {token.content for token in self._inner.added_tokens_decoder.values() if token.special}
        specials.update(self._inner.all_special_tokens)
        self.specials = _any_of(specials)
        self._special_ids = set(self._inner.convert_tokens_to_ids(sorted(specials)))
        folded = specials | set(map(self._folded, specials))
        self._folded_specials = _any_of(folded)
        # A template puts spaces or newlines around a text. Together they may form a special token, so test these edges too.
        self._edges = ("", " ", "\n") if any(text != text.strip(" \n▁") for text in folded) else ("",)
        self._system_role: bool | None = None

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added tokens included."""
        return len(self._inner)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """End-of-text ids in the tokenizer's files. The model's config may add more ids."""
        end = self._inner.eos_token_id
        return () if end is None else (end,)

    @property
    def has_chat_template(self) -> bool:
        return bool(self._inner.chat_template)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids: list[int] = self._inner.encode(_clean(text), add_special_tokens=add_special_tokens)
        return ids

    def decode(self, token_ids: SequenceOf[int], skip_special_tokens: bool = True) -> str:
        text: str = self._inner.decode(
            list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text

    def to_json(self) -> str:
        """Return the tokenizer in the format of `tokenizer.json`, for libraries that need the bytes of every token."""
        return str(self._inner.backend_tokenizer.to_str())

    def fingerprint(self) -> str:
        """Hex digest of the serialised tokenizer and the chat template. Together they determine the ids of a prompt."""
        text = self.to_json() + str(self._inner.chat_template)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    def render_chat(
        self,
        messages: list[dict[str, str]],
        documents: SequenceOf[Document] = (),
        *,
        system: str | None = None,
        thinking: bool | None = None,
        date: datetime.date | None = None,
    ) -> Prompt:
        """Lay out a conversation: a system message with documents and system text, the turns, the head of the answer.

        The content of leading system messages in `messages` follows `system`. thinking: for templates with such a switch.
        date: for templates that print a date (default: today). Without a template, the prompt is all contents, separated
        by empty lines.
        """
        turns = [{name: self.defuse(text) for name, text in _checked(message).items()} for message in messages]
        texts = [self.defuse(document.text) for document in documents]
        head = [self.defuse(system)] if system else []
        while turns and turns[0]["role"] == "system":
            head.append(turns.pop(0)["content"])
        if not self.has_chat_template:
            contents = [*texts, *head, *(turn["content"] for turn in turns)]
            return self._prompt("\n\n".join(contents), texts, documents, True)
        if texts or head:
            turns = self._with_system("\n\n".join(texts + head), turns)
        day = date or datetime.date.today()
        return self._prompt(self._apply(turns, thinking, day), texts, documents, False)

    def render_raw(self, text: str, documents: SequenceOf[Document] = ()) -> Prompt:
        """Lay out documents, an empty line and the text. Special tokens in the text stay special tokens."""
        texts = [self.defuse(document.text) for document in documents]
        return self._prompt("\n\n".join([*texts, _clean(text)]), texts, documents, True)

    def defuse(self, text: str) -> str:
        """Return the text with a zero-width joiner inside every special token.

        If a joiner does not break the special token, try a space, then remove the special token. U+FFFD replaces a special
        token of one letter: nothing fits inside it.
        """
        text = self.specials.sub(lambda match: _broken(match[0], JOINER), _clean(text))
        marks = iter((JOINER, " "))
        while spans := self._forged(text):
            mark = next(marks, None)
            pieces, num_copied = [], 0
            for begin, end in spans:
                pieces += [text[num_copied:begin], _broken(text[begin:end], mark) if mark else ""]
                num_copied = end
            text = "".join([*pieces, text[num_copied:]])
        return text

    def _forged(self, text: str) -> list[tuple[int, int]]:
        """Character ranges `[begin, end)` that the tokenizer reads as special tokens. A regex skips most texts without encoding."""
        for edge in self._edges:
            padded = f"{edge}{text}{edge}"
            if self._folded_specials.search(self._folded(padded)):
                spans = ((begin - len(edge), end - len(edge)) for begin, end in self._special_spans(padded))
                inside = [(max(begin, 0), min(end, len(text))) for begin, end in spans]
                if inside := [(begin, end) for begin, end in inside if begin < end]:
                    return inside
        return []

    def _special_spans(self, text: str) -> list[tuple[int, int]]:
        encoded = self._inner(text, add_special_tokens=False, return_offsets_mapping=True)
        pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        spans = [(begin, max(end, begin + 1)) for token_id, (begin, end) in pairs if token_id in self._special_ids]
        # A letter that the vocabulary lacks also becomes a special token, `<unk>`, but its text is harmless: drop its span.
        return [span for span in spans if self._folded_specials.search(self._folded(text[slice(*span)]))]

    def _folded(self, text: str) -> str:
        """The text after the tokenizer's normaliser."""
        normalizer = self._inner.backend_tokenizer.normalizer
        return str(normalizer.normalize_str(text)) if normalizer else text

    def _with_system(self, content: str, turns: list[dict[str, str]]) -> list[dict[str, str]]:
        if self._system_role is None:
            self._system_role = self._knows_system_role()
        if self._system_role:
            return [{"role": "system", "content": content}, *turns]
        first = next((index for index, turn in enumerate(turns) if turn["role"] == "user"), None)
        if first is None:
            return [{"role": "user", "content": content}, *turns]
        merged = {**turns[first], "content": f"{content}\n\n{turns[first]['content']}"}
        return [*turns[:first], merged, *turns[first + 1 :]]

    def _knows_system_role(self) -> bool:
        probe = [{"role": "system", "content": PROBE}, {"role": "user", "content": "x"}]
        try:
            return PROBE in self._apply(probe, None, datetime.date(2000, 1, 1))
        except ModelError:
            return False

    def _apply(self, turns: list[dict[str, str]], thinking: bool | None, date: datetime.date) -> str:
        return _clean(apply_template(self._inner, turns, thinking, date))

    def _prompt(self, text: str, texts: list[str], documents: SequenceOf[Document], add_special_tokens: bool) -> Prompt:
        if not documents:
            return Prompt(self.encode(text, add_special_tokens), (), text)
        encoded = self._inner(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
        offsets: list[tuple[int, int]] = encoded["offset_mapping"]
        segments, cursor = [], 0
        for part, document in zip(texts, documents, strict=True):
            part = part if part in text else part.strip()  # templates may trim the message
            begin = text.find(part, cursor)
            if begin >= 0:
                cursor = begin + len(part)
                start, end = _tokens_inside(offsets, begin, cursor)
                segments.append(Segment(start, end, document.content_hash, document.title))
        return Prompt(list(encoded["input_ids"]), tuple(segments), text)


def _checked(message: dict[str, str]) -> dict[str, str]:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise BadOption(f"a message needs a role and a content, got {message!r:.200}")
    for name, text in message.items():
        if not isinstance(text, str):
            raise BadOption(f"the {name} of a message must be text, got {text!r:.200}")
    return message


def _any_of(texts: set[str]) -> re.Pattern[str]:
    """A pattern that matches any of the texts, longest first. For an empty set, it matches nothing."""
    ordered = sorted(filter(None, texts), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) or "(?!)")


def _broken(text: str, mark: str) -> str:
    return text[0] + mark + text[1:] if len(text) > 1 else UNREADABLE


def _clean(text: str) -> str:
    """Replace lone surrogates by question marks: tokenizers refuse lone surrogates."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _tokens_inside(offsets: list[tuple[int, int]], begin: int, end: int) -> tuple[int, int]:
    """The tokens `[first, last)` wholly inside characters `[begin, end)`.

    Some tokenizers leave spaces out of a token's offsets. So a token extends from the end of its left neighbour to the
    begin of its right neighbour.
    """
    inside = []
    for index, (first, last) in enumerate(offsets):
        before = offsets[index - 1][1] if index else 0
        after = offsets[index + 1][0] if index + 1 < len(offsets) else 0
        if min(first, before) >= begin and max(last, after) <= end:
            inside.append(index)
    return (inside[0], inside[-1] + 1) if inside else (0, 0)


def _settings(folder: Path) -> dict[str, Any]:
    """The values of `tokenizer_config.json`; empty if it cannot be read."""
    try:
        values = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _loader(model_type: str, folder: Path) -> tuple[Any, dict[str, Any]]:
    """The class that reads the tokenizer of a folder, and its options.

    AutoTokenizer looks at all models that transformers knows: 0.5 s at start. For a plain tokenizer and the model types of PLAIN it
    chooses the plain class, so that class is taken at once. Else a stand-in for the model's config has the two fields that
    AutoTokenizer reads if the class is named. Without it, AutoTokenizer loads the config, and transformers imports
    torch.distributed and sympy: 0.65 s at start.
    """
    settings = _settings(folder)
    class_name = settings.get("tokenizer_class")
    if class_name in PLAIN_CLASSES and model_type in PLAIN and "auto_map" not in settings:
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast, {}
    from transformers import AutoTokenizer

    stand_in = SimpleNamespace(model_type=model_type, _name_or_path=str(folder))
    return AutoTokenizer, {"config": stand_in} if class_name else {}


def _load(source: ModelSource) -> Any:
    folder = source.folder
    if folder is None:
        from pitlane.engine.text.byte_tokenizer import byte_tokenizer

        return byte_tokenizer(source.config.vocab_size)
    kind, options = _loader(source.config.model_type, folder)
    try:
        inner = kind.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False, **options)
    except Exception as error:  # transformers has many error types for a missing or damaged file or package
        line = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ModelError(f"no tokenizer in {folder} ({line}); add tokenizer.json") from None
    if not inner.is_fast:
        raise ModelError(f"{source.name} has no tokenizer.json; convert its tokenizer with transformers")
    return inner
