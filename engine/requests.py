"""Check the arguments of a request and make its Sequence."""

from __future__ import annotations

import secrets
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from operator import index
from time import perf_counter

from pitlane.engine.border import shown
from pitlane.engine.decode.params import SamplingParams
from pitlane.engine.errors import BadOption, PromptTooLong
from pitlane.engine.loader import Loader
from pitlane.engine.plan.plan import Plan
from pitlane.engine.run.lane import Lane
from pitlane.engine.sequence import Request, Sequence, Timing
from pitlane.engine.text.detokenizer import Detokenizer
from pitlane.engine.text.prompt import Segment
from pitlane.engine.text.tokenizer import Prompt


def make_sequence(
    ids: SequenceOf[int],
    prompt: Prompt | SequenceOf[int] | str,
    sampling: SamplingParams,
    plan: Plan,
    salt: str,
    loader: Loader,
) -> Sequence:
    """Encode text, check token ids, draw a seed if none is given. Returns the sequence of the first sample.

    ids: a sequence id per sample. The other samples are the `forks` of the first sample. Raises BadOption.
    """
    submitted = perf_counter()
    if isinstance(prompt, str):
        prompt = loader.tokenizer.render_raw(prompt, [])
    token_ids = _checked("token", prompt.token_ids if isinstance(prompt, Prompt) else prompt, loader.vocab_size)
    segments = _segments(prompt, len(token_ids)) if isinstance(prompt, Prompt) else ()
    _checked("stop token", sampling.stop_token_ids, loader.vocab_size)
    seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
    stop_token_ids = frozenset(() if sampling.ignore_eos else loader.eos_token_ids)

    def sample(number: int) -> Sequence:
        request = Request(
            num_prompt_tokens=len(token_ids),
            sampling=replace(sampling, sample_index=sampling.sample_index + number),
            seed=seed,
            stop_token_ids=stop_token_ids | frozenset(sampling.stop_token_ids),
            segments=segments,
            salt=salt,
            sample_ids=tuple(ids),
        )
        detokenizer = Detokenizer(loader.tokenizer, sampling.stop, loader.tokenizer.specials)
        return Sequence(ids[number], request, plan, list(token_ids), detokenizer, Timing(submitted))

    seq, *seq.forks = [sample(number) for number in range(len(ids))]
    return seq


def is_batch(prompt: object) -> bool:
    """Whether `prompt` is a list of prompts, not the token ids of a prompt."""
    if isinstance(prompt, (str, Prompt)) or not isinstance(prompt, SequenceOf) or not prompt:
        return False
    return isinstance(prompt[0], (str, Prompt, SequenceOf))


def check_length(num_tokens: int, lane: Lane, loader: Loader) -> None:
    """Raise PromptTooLong if the prompt is empty or leaves no room for an answer."""
    if num_tokens == 0:
        raise PromptTooLong("the prompt is empty; write something")
    if num_tokens < lane.max_tokens_per_seq:
        return
    if num_tokens >= loader.context and not lane.pool.is_endless:
        raise PromptTooLong(
            f"the prompt has {num_tokens} tokens, but the context holds {loader.context} tokens for prompt and answer; "
            f"use a shorter document, fewer turns, or a model with a longer context{loader.way_past_context}"
        )
    raise PromptTooLong(
        f"the prompt has {num_tokens} tokens, but KV memory holds {lane.max_tokens_per_seq} for prompt and answer; "
        "raise --kv-memory, or use a shorter prompt"
    )


def check_request(sampling: object, plan: object, salt: object) -> None:
    """Raise BadOption if an argument has a wrong type."""
    if not isinstance(sampling, SamplingParams):
        raise BadOption(f"sampling must be SamplingParams(...), got {shown(sampling)}")
    if not isinstance(plan, Plan):
        raise BadOption(f"plan must come from engine.plan(...), got {shown(plan)}")
    if not isinstance(salt, str) or salt != salt.encode(errors="replace").decode():
        raise BadOption(f"salt must be a valid UTF-8 text, got {shown(salt)}")


def _checked(kind: str, token_ids: object, vocab_size: int) -> list[int]:
    """Return token ids as integers in [0, vocab_size). kind: the name of the ids in messages, such as `stop token`."""
    if isinstance(token_ids, (bytes, bytearray)):
        raise BadOption(f"{kind} ids must be integers, got {shown(token_ids)}; decode bytes to a text first")
    try:
        ids = [_index(token) for token in token_ids]  # type: ignore[attr-defined]
    except TypeError as error:
        raise BadOption(f"{kind} ids must be integers ({error}); encode text with engine.tokenizer") from None
    wrong = next((token for token in ids if not 0 <= token < vocab_size), None)
    if wrong is not None:
        raise BadOption(
            f"{kind} id {shown(wrong)} is not in [0, {vocab_size}) of this model; encode text with its own tokenizer"
        )
    return ids


def _index(token: object) -> int:
    if isinstance(token, bool):
        raise TypeError(f"{token} is a bool")
    return index(token)  # type: ignore[arg-type]


def _segments(prompt: Prompt, num_tokens: int) -> tuple[Segment, ...]:
    """Return the segments of a prompt. Raises BadOption if a segment is not inside the prompt."""
    for segment in prompt.segments or ():
        if not (isinstance(segment, Segment) and _is_sound(segment, num_tokens)):
            raise BadOption(
                f"a segment of a prompt must be Segment(start, end, document_hash, title) inside its {num_tokens} tokens, "
                f"got {shown(segment)}"
            )
    return tuple(prompt.segments or ())


def _is_sound(segment: Segment, num_tokens: int) -> bool:
    texts, places = (segment.document_hash, segment.title), (segment.start, segment.end)
    if not all(isinstance(text, str) for text in texts) or not all(isinstance(place, int) for place in places):
        return False
    return 0 <= segment.start <= segment.end <= num_tokens
