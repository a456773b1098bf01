"""Text in a terminal: sizes, times, names of models, the stats line, tables, progress. Imports rich when it draws.

Results go to standard output and everything else to standard error, so that a pipe gets results alone.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.progress import Progress

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_UNSEEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")  # control characters, line ends, bidi overrides
NARROWEST = 8  # minimum characters of a column
Advance = Callable[[int, int], None]


def size(num_bytes: float | None) -> str:
    """Bytes as 512 B, 1.5 kB, 20.3 MB, 2.0 GB (powers of 1000)."""
    if num_bytes is None:
        return "-"
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes:.0f} B"


def short_name(model: str) -> str:
    """The name of a model; the last part of a path."""
    is_path = model.startswith(("/", ".", "~")) or "\\" in model
    return (Path(model).name if is_path else model) or model


def milliseconds(ms: float | None) -> str:
    """A time as 0.42 ms, 41 ms, 3.2 s."""
    if ms is None:
        return "-"
    if abs(ms) >= 1000:
        return f"{ms / 1000:.1f} s"
    return f"{ms:.0f} ms" if abs(ms) >= 10 else f"{ms:.2g} ms"


def stats_line(stats: Mapping[str, Any], drafter: str | None = None) -> str:
    """One line of stats under an answer: tokens, times, effects of plugins. drafter: the plugin that made the draft tokens."""
    cached = f" ({stats['cached_tokens']} cached)" if stats["cached_tokens"] else ""
    parts = [f"{stats['prompt_tokens']} prompt{cached}", f"TTFT {milliseconds(stats['ttft_ms'])}"]
    if stats["tokens_per_second"]:
        parts.append(f"{stats['tokens_per_second']:.1f} tok/s")
    notes = stats.get("notes", {})
    droppers = [name for name in notes if notes[name].get("dropped_tokens")]
    for name in sorted({*stats["bought_ms"], *([drafter] if drafter else []), *droppers}):
        drafted = name == drafter and stats["draft_tokens"]
        words = [f"{stats['accepted_tokens']}/{stats['draft_tokens']} accepted"] if drafted else []
        if name in droppers and "dropped" in notes[name]:
            first, stop = notes[name]["dropped"]
            words.append(f"dropped tokens {first + 1:,} to {stop:,}")
        elif name in droppers:
            words.append(f"dropped {notes[name]['dropped_tokens']:,} tokens")
        replayed = notes.get(name, {}).get("replayed_tokens")
        words += [f"{replayed} of them replayed from earlier answers"] if replayed else []
        bought = stats["bought_ms"].get(name, {}).get("ms", 0.0)
        lost = stats.get("plugin_ms", {}).get(name, 0.0) - bought
        if abs(bought) >= 0.1:
            words.append(f"lost {milliseconds(lost)}" if lost > 0 else f"saved {milliseconds(bought)}")
        if words:
            parts.append(f"{name} {', '.join(words)}")
    parts += [f"read whole again without {name}" for name in stats.get("read_again", ())]
    parts += [f"{name} {word}: {why}" for word in ("paused", "failed") for name, why in stats[word].items()]
    return " · ".join(parts)


def note(text: str) -> None:
    """Print a dim line on standard error; plain if NO_COLOR is set."""
    text = one_line(text)
    click.echo(text if os.environ.get("NO_COLOR") else click.style(text, dim=True), err=True)


def say(text: str, *, err: bool = False) -> None:
    """Print a line that may hold foreign names: titles, files, models."""
    click.echo(one_line(text), err=err)


def one_line(text: str) -> str:
    """Text on one line without control characters: a foreign name may hold escape sequences of a terminal."""
    return _UNSEEN.sub("\ufffd", text)


def printable(text: str) -> str:
    """Text of a model, without control characters if standard output is a terminal."""
    return _CONTROL.sub("\ufffd", text) if sys.stdout.isatty() else text


def print_json(value: Any) -> None:
    """Print one JSON document on one line of standard output."""
    click.echo(json.dumps(value))


def print_table(headers: Sequence[str], rows: Sequence[Sequence[Any]], title: str | None = None) -> None:
    """Print a table on standard output; columns of numbers are aligned to the right."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    heading = Text(one_line(title)) if title else None
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title=heading, title_justify="left", title_style="bold")
    for index, header in enumerate(headers):
        cells = [str(row[index]) for row in rows if row[index] not in (None, "", "-")]
        numeric = bool(cells) and all(re.match(r"[+-]?\d", cell) for cell in cells)
        table.add_column(header, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*[Text("-" if cell is None else one_line(str(cell))) for cell in row])
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120, highlight=False)
    console.width = max(console.width, NARROWEST * len(headers))  # rich leaves out columns without room
    console.print(table)


@contextmanager
def progress(label: str, place: Callable[[int], str] = lambda done: "") -> Iterator[Advance]:
    """Show a bar on standard error; yields a function of (done, total) that advances it.

    place: words about `done`, shown behind the label. The bar appears at the first call with done < total, and disappears at
    done = total. Without a terminal there is no bar.
    """
    bars: list[Progress] = []

    def advance(done: int, total: int) -> None:
        if done < total and not bars and _shows_bars():
            bars.append(_bar(label, total))
        for bar in bars:
            words = ", ".join(filter(None, (label, place(done))))
            bar.update(bar.task_ids[0], description=_plain(words), completed=done, total=total)
            if done >= total:
                bar.stop()

    try:
        yield advance
    finally:
        for bar in bars:
            bar.stop()


def _bar(label: str, total: int) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    bar.add_task(_plain(label), total=total)
    bar.start()
    return bar


def _shows_bars() -> bool:
    return sys.stderr.isatty()


def _plain(label: str) -> str:
    from rich.markup import escape

    return escape(one_line(label))
