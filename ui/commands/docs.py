"""`pitlane docs`: documents in the store, and their KV on disk.

`add` computes the KV too, so that the first question starts fast.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import click

from pitlane import SamplingParams
from pitlane.storage.errors import PitlaneError
from pitlane.storage.types import whole_text
from pitlane.ui.commands.options import BYTES, MOST, answer_options, as_json
from pitlane.ui.render import note, print_json, print_table, progress, say, size
from pitlane.ui.session import Chat, EngineOptions, add_document, read_answer

if TYPE_CHECKING:
    from pitlane import Engine
    from pitlane.storage.types import Document, StoredDocument


@click.group()
def docs() -> None:
    """Documents and their saved KV."""


@docs.command()
@answer_options
@click.option("--prefill/--no-prefill", default=True, show_default=True, help="Compute and save the KV now.")
@as_json
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.pass_context
def add(ctx: click.Context, options: EngineOptions, prefill: bool, as_json: bool, files: tuple[str, ...]) -> None:
    """Store documents, and compute their KV so that the first question starts fast.

    A file that cannot be read is named, and all other files are added. The exit code is then 1, or 2 if every file failed.
    """
    added, failed = _store(files, options.plugins_dir)
    if not added:
        ctx.exit(2)
    if prefill:
        from pitlane.ui.commands.model_choice import choose

        with choose(options).build(documents=True) as engine:
            for row, document, stored in added:
                try:
                    row["prefill"] = _prefill(engine, document, stored)
                except PitlaneError as error:
                    row |= _failure(stored.title, error)
    rows = [row for row, _, _ in added]
    sizes = _saved_bytes()
    for row in rows:
        row["kv_bytes"] = sizes.get(row["content_hash"], 0)
    _report(rows, failed, prefill, as_json)
    num_failed = len(failed) + sum("error" in row for row in rows)
    if num_failed:
        ctx.exit(1 if num_failed < len(files) else 2)


def _store(
    files: Sequence[str], plugins_dir: str | None
) -> tuple[list[tuple[dict[str, Any], Document, StoredDocument]], list[dict[str, str]]]:
    """Store all files that can be read. Returns them with their rows of the report, and rows for the files that failed."""
    from pitlane.storage.db import Store

    added, failed = [], []
    with Store() as store:
        for file in files:
            try:
                document, stored = add_document(store, file, plugins_dir)
            except PitlaneError as error:
                failed.append(_failure(file, error))
            else:
                added.append((asdict(stored), document, stored))
    return added, failed


def _failure(file: str, error: PitlaneError) -> dict[str, str]:
    say(f"pitlane: {error}", err=True)
    return {"file": whole_text(file), "error": str(error)}


def _report(rows: list[dict[str, Any]], failed: list[dict[str, str]], prefill: bool, as_json: bool) -> None:
    if as_json:
        print_json([*rows, *failed])
        return
    for row in rows:
        kv = f", {size(row['kv_bytes'])} of KV saved" if row["kv_bytes"] else ""
        say(f"{row['id']}  {row['title']}: {row['num_pages']} pages, {row['num_chars']} characters{kv}")
    if prefill and not all(row["kv_bytes"] for row in rows):
        note("the plugin prefix_cache saves KV, for documents of at least min_tokens tokens")


def _prefill(engine: Engine, document: Document, stored: StoredDocument) -> dict[str, Any]:
    """Compute the KV of the prompt up to the document's end. Returns counts of tokens and the time."""
    chat = Chat(engine.tokenizer)
    chat.add(document, stored)
    prompt = chat.ask("?")
    if prompt.segments:
        prompt = replace(prompt, token_ids=prompt.token_ids[: prompt.segments[-1].end])
    started = time.perf_counter()
    try:
        stream = engine.submit(prompt, SamplingParams(max_tokens=1))
    except PitlaneError as error:
        raise PitlaneError(f"{stored.title} is stored as {stored.id}, but its KV cannot be computed: {error}") from None
    with stream, progress(stored.title) as advance:
        result = read_answer(stream, lambda text: None, advance)
    if result.finish_reason == "aborted":
        raise click.Abort
    stats = result.stats
    return {
        "prompt_tokens": stats["prompt_tokens"],
        "cached_tokens": stats["cached_tokens"],
        "seconds": round(time.perf_counter() - started, 3),
    }


@docs.command("list")
@as_json
def list_documents(as_json: bool) -> None:
    """List stored documents, newest first."""
    from pitlane.storage.db import Store

    sizes = _saved_bytes()
    with Store() as store:
        rows = [asdict(stored) | {"kv_bytes": sizes.get(stored.content_hash, 0)} for stored in store.documents.list()]
    if as_json:
        print_json(rows)
    elif not rows:
        note("no documents; add one with: pitlane docs add FILE")
    else:
        columns = ("id", "title", "num_pages", "num_chars")
        cells = [[*(row[name] for name in columns), size(row["kv_bytes"])] for row in rows]
        print_table(["id", "title", "pages", "characters", "saved KV"], cells)


@docs.command()
@click.argument("name", metavar="ID")
def rm(name: str) -> None:
    """Remove a document (by id or title) and its saved KV."""
    from pitlane.storage.db import Store

    with Store() as store:
        stored = store.documents.get(name)
        store.documents.remove(stored.id)
    say(f"removed {stored.id} ({stored.title})")


@docs.group()
def cache() -> None:
    """The saved KV on disk.

    A document's KV is saved for its place in a prompt: the same document after another document, for another model or in
    another dtype is another entry. When new entries need the space (prefix_cache.disk_gb), old entries are removed, the
    longest unused first, but no pinned entry.
    """


@cache.command()
@as_json
def ls(as_json: bool) -> None:
    """List saved KV, the latest used first."""
    from pitlane.storage.db import Store

    with Store() as store:
        rows = [asdict(prefix) for prefix in store.prefixes.list()]
    if as_json:
        print_json(rows)
    elif not rows:
        note("no saved KV; it is saved at the first question on a document, or by: pitlane docs add FILE")
    else:
        cells = [
            [row["id"], row["title"], row["num_tokens"], size(row["num_bytes"]), _date(row["last_used"]),
             row["fingerprint"][:8], _marks(row)]
            for row in rows
        ]  # fmt: skip
        print_table(["id", "document", "tokens", "size", "last used", "KV of", ""], cells)
        pinned = sum(row["num_bytes"] for row in rows if row["pinned"])
        total = size(sum(row["num_bytes"] for row in rows))
        note(f"{len(rows)} saved, {total}{f', {size(pinned)} of it pinned' if pinned else ''}")


@cache.command()
@click.option("--keep", type=BYTES, metavar="BYTES", help="Remove only until this much is left.  [default: nothing]")
@as_json
def prune(keep: int | None, as_json: bool) -> None:
    """Remove saved KV that is not pinned, the longest unused first."""
    from pitlane.storage.db import Store

    with Store() as store:
        removed = store.prefixes.prune(keep or 0)
        remaining = store.prefixes.list()
    freed, left = sum(prefix.num_bytes for prefix in removed), sum(prefix.num_bytes for prefix in remaining)
    if as_json:
        print_json({"removed": [prefix.id for prefix in removed], "freed_bytes": freed, "left_bytes": left})
        return
    for prefix in removed:
        say(f"{prefix.id}  {prefix.title}: {prefix.num_tokens} tokens, {size(prefix.num_bytes)}")
    say(f"removed {len(removed)}, freed {size(freed)}, {size(left)} left")
    if left > (keep or 0):
        note("what is left is pinned; unpin an entry with: pitlane docs cache unpin ID")


@cache.command()
@click.argument("prefix_ids", type=click.IntRange(1, MOST), nargs=-1, required=True, metavar="ID...")
def pin(prefix_ids: tuple[int, ...]) -> None:
    """Keep saved KV from being pruned; ID is a number that `ls` shows."""
    _pin(prefix_ids, True)


@cache.command()
@click.argument("prefix_ids", type=click.IntRange(1, MOST), nargs=-1, required=True, metavar="ID...")
def unpin(prefix_ids: tuple[int, ...]) -> None:
    """Let pinned KV be pruned again."""
    _pin(prefix_ids, False)


def _pin(prefix_ids: tuple[int, ...], pinned: bool) -> None:
    """Pin or unpin all entries, or none if an id is unknown."""
    from pitlane.storage.db import Store

    with Store() as store:
        with store.transaction():
            for prefix_id in prefix_ids:
                store.prefixes.pin(prefix_id, pinned)
        titles = {prefix.id: prefix.title for prefix in store.prefixes.list()}
    for prefix_id in prefix_ids:
        say(f"{'pinned' if pinned else 'unpinned'} {prefix_id} ({titles[prefix_id]})")


def _marks(row: dict[str, Any]) -> str:
    form = row["fingerprint"].partition("+")[2]
    return ", ".join(mark for mark in (form, "pinned" if row["pinned"] else "") if mark)


def _saved_bytes() -> dict[str, int]:
    """Bytes of saved KV by document."""
    from pitlane.storage.db import Store

    sizes: dict[str, int] = {}
    with Store() as store:
        for prefix in store.prefixes.list():
            if prefix.document_hash is not None:
                sizes[prefix.document_hash] = sizes.get(prefix.document_hash, 0) + prefix.num_bytes
    return sizes


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
