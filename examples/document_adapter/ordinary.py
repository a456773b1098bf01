"""Ordinary chats without a document, in the words of the model that is tuned: they keep its manner of talking.

The questions are made of forms and topics. The model itself answers them, sampled at a low temperature. A chat is kept only if the
model ends all its answers by itself, so that no training answer breaks off.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from random import Random
from typing import Any

from pitlane import Engine, SamplingParams

MAX_ANSWER = 160  # tokens
TEMPERATURE = 0.6
ATTEMPTS = 6  # chats drawn for each chat that is asked for, at most
AT_ONCE = 16  # chats that the engine answers in one batch
FORMS = (
    "What is {}?",
    "Explain {} in simple words.",
    "Tell me something about {}.",
    "Why is {} important?",
    "Give me three facts about {}.",
    "Write a short poem about {}.",
    "Write two sentences about {}.",
    "How would you explain {} to a child?",
    "What should a beginner know about {}?",
    "Name a good question about {}.",
    "what is {}",
    "Can you tell me about {}?",
)
TOPICS = (
    "gravity", "photosynthesis", "the Roman Empire", "chess", "the ocean", "electricity", "bread", "the moon", "democracy",
    "music", "the Amazon river", "football", "the heart", "volcanoes", "money", "the French language", "bees", "a library",
    "the Renaissance", "sleep", "computers", "the Great Wall of China", "tea", "friendship", "the periodic table",
    "bicycles", "winter", "vaccines", "Mozart", "the speed of light", "gardening", "the human brain", "trains",
    "Mount Everest", "algebra", "coffee", "dinosaurs", "the sun", "painting", "a good breakfast", "the Sahara", "poetry",
    "swimming", "glass", "the internet", "cats", "Shakespeare",
)  # fmt: skip
SINGLE = (
    "Hello!",
    "Hi, how are you?",
    "Good morning",
    "Who are you?",
    "What can you do?",
    "Thank you for your help.",
    "What is the capital of Italy?",
    "What is the capital of Japan?",
    "How many days are in a year?",
    "What is 7 plus 5?",
    "What is 9 times 6?",
    "Translate `good evening` into Spanish.",
    "Tell me a joke.",
    "Tell me a story about a fox.",
    "Write a Python function that adds two numbers.",
    "Write a thank-you note to a neighbour.",
    "Suggest a name for a small café.",
    "Give me tips for a job interview.",
    "How do I cook rice?",
    "How can I learn to draw?",
    "Which is larger, the Earth or Mars?",
    "Who wrote Romeo and Juliet?",
    "What is the opposite of `early`?",
    "List five fruits.",
    "Plan a day in London for me.",
    "What should I read next?",
)
FOLLOW_UPS = (
    "Tell me more.",
    "Can you make that shorter?",
    "Give me an example.",
    "Why?",
    "Thanks! What else should I know?",
    "Say it in other words.",
)


def question(rng: Random) -> str:
    """Draw a first question."""
    if rng.random() < 0.35:
        return rng.choice(SINGLE)
    return rng.choice(FORMS).format(rng.choice(TOPICS))


def questions(rng: Random) -> list[str]:
    """Draw the questions of a chat: one to three."""
    return [question(rng), *(rng.choice(FOLLOW_UPS) for _ in range(rng.choice((0, 0, 1, 2))))]


def chats(model: str, number: int, seed: str = "0", device: str = "cpu") -> Iterator[dict[str, Any]]:
    """Yield up to `number` chats; fewer if the model ends too few of its answers."""
    drawn = [questions(Random(f"ordinary:{seed}:{attempt}")) for attempt in range(ATTEMPTS * number)]
    with Engine(model, device=device) as engine, ThreadPoolExecutor(AT_ONCE) as pool:
        for first in range(0, len(drawn), AT_ONCE):
            batch = range(first, min(first + AT_ONCE, len(drawn)))
            answers = pool.map(lambda attempt: answered(engine, drawn[attempt], attempt), batch)
            made = list(islice(filter(None, answers), number))
            number -= len(made)
            yield from ({"domain": "", "messages": messages} for messages in made)
            if not number:
                return


def answered(engine: Engine, asked: list[str], seed: int) -> list[dict[str, str]]:
    """Return the messages of a chat; [] if the model does not end an answer."""
    messages: list[dict[str, str]] = []
    sampling = SamplingParams(temperature=TEMPERATURE, max_tokens=MAX_ANSWER, seed=seed)
    for text in asked:
        messages.append({"role": "user", "content": text})
        result = engine.generate(list(engine.tokenizer.render_chat(messages).token_ids), sampling)
        if result.finish_reason != "stop" or not result.text.strip():
            return []
        messages.append({"role": "assistant", "content": result.text.strip()})
    return messages
