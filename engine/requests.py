"""From what a caller hands in to a checked Sequence."""

from __future__ import annotations

import secrets
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from operator import index
from time import perf_counter

from pitlane.engine.detokenizer import Detokenizer
from pitlane.engine.errors import BadOption, PromptTooLong
from pitlane.engine.lane import Lane
from pitlane.engine.loader import Loader
from pitlane.engine.plan import Plan
from pitlane.engine.tokenizer import Prompt
from pitlane.engine.types import SamplingParams, Sequence, Timing


def make_sequence(
    ids: SequenceOf[int],
    prompt: Prompt | SequenceOf[int] | str,
    sampling: SamplingParams,
    plan: Plan,
    salt: str,
    loader: Loader,
) -> Sequence:
    """Encode text, check token ids, draw the seed that was not given; the other samples become its forks.

    ids: one per sample. Raises BadOption.
    """
    submitted = perf_counter()
    if isinstance(prompt, str):
        prompt = loader.tokenizer.render_raw(prompt, [])
    segments = prompt.segments if isinstance(prompt, Prompt) else ()
    token_ids = _checked(prompt.token_ids if isinstance(prompt, Prompt) else prompt, loader.vocab_size)
    seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
    stop_token_ids = frozenset(() if sampling.ignore_eos else loader.eos_token_ids)

    def sample(number: int) -> Sequence:
        return Sequence(
            id=ids[number],
            token_ids=list(token_ids),
            num_prompt_tokens=len(token_ids),
            sampling=replace(sampling, sample_index=sampling.sample_index + number),
            seed=seed,
            plan=plan,
            detokenizer=Detokenizer(loader.tokenizer, sampling.stop, loader.tokenizer.specials),
            timing=Timing(submitted),
            stop_token_ids=stop_token_ids | frozenset(sampling.stop_token_ids),
            segments=segments,
            salt=salt,
            samples=tuple(ids),
        )

    seq, *seq.forks = [sample(number) for number in range(len(ids))]
    return seq


def is_batch(prompt: object) -> bool:
    """Whether these are several prompts, and not the token ids of one."""
    if isinstance(prompt, (str, Prompt)) or not isinstance(prompt, SequenceOf) or not prompt:
        return False
    return isinstance(prompt[0], (str, Prompt, SequenceOf))


def check_length(num_tokens: int, lane: Lane, context: int) -> None:
    """Raise PromptTooLong, with both numbers, if a prompt can never be answered."""
    if num_tokens == 0:
        raise PromptTooLong("the prompt is empty; write something")
    if num_tokens < lane.max_tokens_per_seq:
        return
    if num_tokens >= context:
        raise PromptTooLong(
            f"the prompt has {num_tokens} tokens and the context holds {context} with the answer; "
            "use a shorter document, fewer turns, or a model with a longer context"
        )
    raise PromptTooLong(
        f"the prompt has {num_tokens} tokens and KV memory holds {lane.max_tokens_per_seq} with the answer; "
        "raise --kv-memory, or use a shorter prompt"
    )


def _checked(token_ids: SequenceOf[int], vocab_size: int) -> list[int]:
    try:
        found = [index(token) for token in token_ids]
    except TypeError as error:
        raise BadOption(f"token ids must be integers ({error}); encode text with engine.tokenizer") from None
    wrong = next((token for token in found if not 0 <= token < vocab_size), None)
    if wrong is not None:
        raise BadOption(
            f"token id {wrong} is not in [0, {vocab_size}) of this model; encode text with its own tokenizer"
        )
    return found
