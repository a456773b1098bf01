"""A chat of 200 turns with attention sinks: python docs/endless_chat.py MODEL FILE [TURNS]. FILE.md is the shortened transcript.

The questions go through `Desk`, the part of the page behind its buttons, so the plan, the sampling, the cache and the stored
conversation are those of the page; attention sinks are switched on. Every answer has at most 64 tokens. FILE.json holds the counts
of every turn and all messages, and FILE.png a plot of the counts. `replayed` counts the prompt tokens of a turn that were computed
again although they belong to earlier turns.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pitlane import Engine
from pitlane.storage.db import Store
from pitlane.ui.answering import Ask, Desk
from pitlane.ui.sampling import Sampling

TOPICS = (
    "the sea, rain, bread, cats, the moon, trains, tea, gardens, winter, music, books, bicycles, bees, mountains, rice, sleep, "
    "rivers, birds, clocks, painting, apples, maps, football, volcanoes, letters, bridges, cheese, dogs, stars, libraries, "
    "chess, boats, trees, markets, glass, horses, snow, photography, soup, holidays"
).split(", ")
QUESTIONS = (  # a number of questions that shares no factor with the step below
    "What should I know about {}?",
    "Give me a tip about {}.",
    "Why do people like {}?",
    "Tell me a short story about {}.",
    "What is a common mistake with {}?",
    "Name three things that go well with {}.",
    "How would you explain {} to a child?",
    "Write two lines of a poem about {}.",
    "Where does the word for {} come up in daily life?",
    "What is hard about {}?",
    "Ask me a question about {}.",
    "What would the world be without {}?",
    "How do I begin with {}?",
)
SHOWN = ((0, 5), (99, 104), (195, 200))  # turns of the transcript, half-open
MAX_TOKENS = 64
COUNTS = ("prompt_tokens", "cached_tokens", "completion_tokens", "dropped_tokens", "replayed")


def questions(count: int) -> Iterator[str]:
    """Five questions about a topic in a row. Neighbouring questions differ: the model copies its answers to equal questions."""
    for turn in range(count):
        yield QUESTIONS[turn * 5 % len(QUESTIONS)].format(TOPICS[turn // 5 % len(TOPICS)])


def talk(
    engine: Engine, desk: Desk, count: int, sinks: dict[str, int], given: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Ask `count` questions in one conversation. Yields the question, the answer and the counts of every turn.

    sinks: options of `attention_sinks`. given: sampling values that a user sets. The seed of a turn is its number.
    """
    settings = {**engine.default_plan.settings, "attention_sinks": sinks}
    conversation, known = desk.store.conversations.create(engine.loader.source.name), 0
    for turn, question in enumerate(questions(count)):
        desk.store.conversations.append(conversation.id, "user", question)
        ask = Ask(settings, Sampling({"max_tokens": MAX_TOKENS, "seed": turn, **given}))
        for _ in desk.answer(("chat", conversation.id), conversation.id, ask):
            pass
        answer = desk.store.conversations.get(conversation.id).messages[-1]
        assert answer.role == "assistant" and answer.stats is not None, f"turn {turn} has no answer"
        stats = answer.stats
        counts = {name: stats[name] for name in COUNTS[:3]}
        counts["dropped_tokens"] = stats["notes"].get("attention_sinks", {}).get("dropped_tokens", 0)
        counts["replayed"] = max(0, known - stats["cached_tokens"])
        known = stats["prompt_tokens"] + stats["completion_tokens"]
        yield {"turn": turn + 1, "question": question, "answer": answer.text, "end": stats["finish_reason"], **counts}


def transcript(model: str, context: int, turns: list[dict[str, Any]]) -> str:
    """The first turns, some turns of the middle, the last turns, and a table of counts."""
    replayed = [turn["replayed"] for turn in turns[1:]]
    total, num_replayed = turns[-1]["prompt_tokens"] + turns[-1]["completion_tokens"], statistics.median(replayed)
    lines = [
        f"# A chat of {len(turns)} turns",
        f"Written by `docs/endless_chat.py`: one conversation with `{model}` and attention sinks, through the code of the page,\n"
        f"with the sampling of the page and at most {MAX_TOKENS} tokens an answer. The context of the model is {context:,}\n"
        f"tokens; the chat ends with {total:,} tokens. No turn failed. Tokens of earlier turns that a turn computed again: median\n"
        f"{num_replayed:g}, at most {max(replayed)}. Facts in the answers are often wrong: the model has 135 million parameters.\n"
        "… marks an answer cut at its limit.",
        "| turn | prompt tokens | from cache | computed again | answer tokens | out of sight at the end |\n"
        "|---|---|---|---|---|---|",
    ]
    rows = [turns[0], *turns[19::20]] if len(turns) >= 40 else turns
    lines[-1] += "".join(
        f"\n| {row['turn']} | {row['prompt_tokens']:,} | {row['cached_tokens']:,} | {row['replayed']} | {row['completion_tokens']} "
        f"| {row['dropped_tokens']:,} |"
        for row in rows
    )
    for low, high in SHOWN if len(turns) >= 200 else ((0, len(turns)),):
        lines.append(f"## Turns {low + 1} to {high}")
        for turn in turns[low:high]:
            cut = " …" if turn["end"] == "length" else ""
            lines.append(f"**{turn['turn']}. {turn['question']}**\n\n{' '.join(turn['answer'].split())}{cut}")
    return "\n\n".join(lines) + "\n"


def plot(turns: list[dict[str, Any]], target: Path) -> None:
    try:
        from matplotlib import pyplot
    except ImportError:
        print("no plot: pip install matplotlib", file=sys.stderr)
        return
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3))
    places = [turn["turn"] for turn in turns]
    for name in ("prompt_tokens", "cached_tokens", "dropped_tokens"):
        left.plot(places, [turn[name] for turn in turns], label=name.replace("_", " "))
    right.plot(
        places, [turn["prompt_tokens"] - turn["cached_tokens"] for turn in turns], label="prompt tokens computed"
    )
    for axes in (left, right):
        axes.set_xlabel("turn")
        axes.set_ylim(bottom=0)
        axes.legend()
    figure.tight_layout()
    figure.savefig(target, dpi=80)


def main(model: str, target: Path, count: int) -> None:
    turns = []
    with tempfile.TemporaryDirectory() as folder, Store(Path(folder) / "pitlane.db") as store, Engine(model) as engine:
        for turn in talk(engine, Desk(engine, store), count, {}, {}):
            turns.append(turn)
            print(*(turn[name] for name in ("turn", *COUNTS, "end")), flush=True)
            target.with_suffix(".json").write_text(json.dumps(turns, indent=1) + "\n", encoding="utf-8")
        text = transcript(model, engine.loader.context, turns)
    text += f"\n## Counts of every turn\n\n![tokens of the prompt, from the cache, dropped and computed]({target.stem}.png)\n"
    target.with_suffix(".md").write_text(text, encoding="utf-8")
    plot(turns, target.with_suffix(".png"))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 200)
