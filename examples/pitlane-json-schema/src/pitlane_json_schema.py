"""JSON schema: answers that match a JSON schema, a regular expression or a grammar.

Changes in the loop: `adjust_logits` forbids every token that the grammar does not allow next. The matcher follows the path of every
row, so a row of a draft or a draft tree has the mask that plain decoding gives it.
Exactness: steering. With any drafter, the tokens are the same as without a drafter, at any seed.
Costs: one mask of the vocabulary per row, computed by llguidance. Helps when a program reads the answer.
Source: llguidance, https://github.com/guidance-ai/llguidance; constrained decoding: Willard and Louf 2023, arXiv:2307.09702
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast

from pydantic import Field, model_validator

from pitlane import BadOption, ModelError, Plugin, PluginOptions, Rows, Sequence, hookimpl

if TYPE_CHECKING:
    import numpy as np
    from llguidance import LLMatcher
    from numpy.typing import NDArray

    from pitlane import Lane

ANY_OBJECT = '{"type": "object"}'
FIXED = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class JsonSchema(Plugin):
    """Let answers match a JSON schema, a regular expression or a grammar; without options, any JSON object."""

    name, exactness = "json_schema", "steering"
    api_version = "1.0"

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # pydantic's models have a deprecated method named `schema`

        class Options(PluginOptions):
            schema: str = Field("", title="JSON schema", description="the JSON schema of the answer, as text")  # type: ignore[assignment]
            regex: str = Field("", title="Regular expression", description="the regular expression of the whole answer")
            grammar: str = Field("", title="Grammar", description="the grammar of the answer, in Lark's syntax")
            whitespace: Literal["fixed", "free"] = Field(
                "fixed",
                title="Whitespace",
                description="in JSON: a space after every comma and colon (fixed), or any whitespace (free)",
            )

            @model_validator(mode="after")
            def _compiles(self) -> JsonSchema.Options:
                names = [name for name in ("schema", "regex", "grammar") if getattr(self, name)]
                if len(names) > 1:
                    raise BadOption(f"json_schema takes one of schema, regex and grammar, got {' and '.join(names)}")
                if names:  # without a grammar, nothing imports llguidance here: every command makes default options
                    check_grammar(names[0], self)
                return self

    @hookimpl
    def lane_opened(self, lane: Lane) -> None:
        vocabulary = cast(Vocabulary, lane.state.setdefault(self.name, Vocabulary(lane)))
        matcher = vocabulary.matcher(grammar_of(self.options))
        if matcher.is_error():
            raise BadOption(f"json_schema cannot compile its grammar for this model: {first_line(matcher.get_error())}")
        # An engine has one tokenizer, so all its lanes give equal matchers.
        self.start, self.vocabulary = matcher, vocabulary

    @hookimpl
    def adjust_logits(self, rows: Rows) -> Any:
        import numpy as np
        import torch

        allowed = np.ones(rows.logits.shape, dtype=bool)
        state, index = None, -1
        for row in range(len(rows.seq_index)):
            if rows.seq_index[row] != index:
                index = rows.seq_index[row]
                state = self._state_of(rows.seqs[index])
            assert state is not None
            state.move(rows.path(row))
            if state.is_reachable:
                state.fill(allowed[row])
        mask = torch.from_numpy(allowed).to(rows.logits.device)
        return rows.logits.masked_fill(~mask, float("-inf"))

    def _state_of(self, seq: Sequence) -> Matching:
        state: Matching | None = seq.state.get(self.name)
        if state is None:
            state = seq.state[self.name] = Matching(self.start.deep_copy(), self.vocabulary.end)
        state.know(seq.token_ids[seq.request.num_prompt_tokens :])
        return state


@dataclass(slots=True)
class Matching:
    """The state of a sequence: a matcher that has read the answer so far, and then a path of draft tokens.

    end: the token that ends a text. The matcher never reads it. After `end`, only `end` is allowed. path: draft tokens that the
    matcher has read. is_reachable: whether the grammar allows every token of the present path. Verification stops before a
    token that is not allowed, so the rows after it keep their logits.
    """

    matcher: LLMatcher
    end: int
    num_known: int = 0
    has_ended: bool = False
    path: list[int] = field(default_factory=list)
    is_at_end: bool = False
    is_reachable: bool = True

    def know(self, answer: list[int]) -> None:
        """Roll back the path, and read the new tokens of the answer."""
        self._leave(len(self.path))
        new, self.num_known = answer[self.num_known :], len(answer)
        text = new[: new.index(self.end)] if self.end in new else new
        if not self.has_ended and self.matcher.try_consume_tokens(text) < len(text):
            raise ValueError(f"the grammar forbids the answer's tokens {text}: {first_line(self.matcher.get_error())}")
        self.has_ended = self.has_ended or len(text) < len(new)

    def move(self, path: list[int]) -> None:
        """Roll back and read tokens until the matcher has read `path`."""
        pairs = zip(self.path, path, strict=False)
        num_common = next((i for i, (old, new) in enumerate(pairs) if old != new), min(len(self.path), len(path)))
        self._leave(len(self.path) - num_common)
        rest = path[num_common:]
        text = rest[: rest.index(self.end)] if self.end in rest else rest
        num_read = 0 if self.has_ended else self.matcher.try_consume_tokens(text)
        self.path += text[:num_read]
        self.is_reachable = num_read == len(text) and set(rest[num_read:]) <= {self.end}
        self.is_at_end = self.has_ended or len(text) < len(rest)

    def fill(self, allowed: NDArray[np.bool_]) -> None:
        """Write the tokens that may follow the path. allowed: [V]."""
        import numpy as np

        allowed[:] = False
        if self.is_at_end:
            allowed[self.end] = True
            return
        bits = np.frombuffer(self.matcher.compute_bitmask(), dtype=np.uint8)
        if self.matcher.is_error():
            raise ValueError(first_line(self.matcher.get_error()))
        count = min(len(allowed), 8 * len(bits))  # a model may have more logits than its tokenizer has tokens
        allowed[:count] = np.unpackbits(bits, count=count, bitorder="little")

    def _leave(self, num_tokens: int) -> None:
        if num_tokens:
            self.matcher.rollback(num_tokens)
            del self.path[-num_tokens:]


class Vocabulary:
    """The tokens of a lane's model as bytes. The lane keeps it when options change: a build takes a second for 50,000 tokens."""

    def __init__(self, lane: Lane) -> None:
        from llguidance import LLTokenizer

        tokenizer = lane.tokenizer
        if not tokenizer.eos_token_ids:
            raise ModelError("json_schema needs a model with an end-of-text token; this model's tokenizer has none")
        self.end = tokenizer.eos_token_ids[0]
        self.tokens = LLTokenizer(tokenizer.to_json(), n_vocab=tokenizer.vocab_size, eos_token=self.end)

    def matcher(self, grammar: str) -> LLMatcher:
        """Compile a grammar for the vocabulary. The matcher reports an error in `is_error()`."""
        from llguidance import LLMatcher

        return LLMatcher(self.tokens, grammar, log_level=0)

    def close(self) -> None:
        """Release nothing: the matchers of running sequences need the tokens."""


def grammar_of(options: JsonSchema.Options) -> str:
    """Translate the options to a grammar of llguidance."""
    from llguidance import LLMatcher

    if options.regex:
        return LLMatcher.grammar_from_regex(options.regex)
    if options.grammar:
        return LLMatcher.grammar_from_lark(options.grammar)
    overrides: Any = FIXED if options.whitespace == "fixed" else {}
    return LLMatcher.grammar_from_json_schema(options.schema or ANY_OBJECT, overrides=overrides)


def check_grammar(name: str, options: JsonSchema.Options) -> None:
    """Raise BadOption if the grammar of an option does not compile. name: `schema`, `regex` or `grammar`."""
    from llguidance import LLMatcher

    try:
        if name == "schema" and not isinstance(json.loads(options.schema), dict):
            raise ValueError("a schema is a JSON object")
        reason = LLMatcher.validate_grammar(grammar_of(options))
    except ValueError as error:
        reason = str(error)
    if reason:
        value = getattr(options, name)
        raise BadOption(f"json_schema.{name} = {value!r:.120} does not compile: {first_line(reason)}")


def first_line(reason: str) -> str:
    """A message of llguidance as one line of at most 300 characters."""
    return " ".join(reason.split())[:300]
