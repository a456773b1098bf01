"""Prefix cache on disk: several documents, stats, int8, and files and locks that stall no other stream."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pitlane import SamplingParams, StorageError, TextDelta
from pitlane.plugins.prefix_cache import PrefixCache, int8
from pitlane.storage import db
from pitlane.storage.db import Store
from pitlane.storage.prefixes import Prefixes
from tests.plugins.document_prompts import chat, tokens

PARAMS = SamplingParams(max_tokens=12, ignore_eos=True)
pytestmark = pytest.mark.timeout(120)


def notes(result: Any) -> dict[str, Any]:
    own_notes: dict[str, Any] = result.stats["notes"]["prefix_cache"]
    return own_notes


def test_each_document_is_saved_for_its_place_in_the_prompt(make_engine: Any) -> None:
    bare, first = make_engine(), make_engine(plugins=["prefix_cache"], max_step_tokens=128)
    prompts = [
        chat((1, 150), (2, 700)),
        chat((1, 150), (3, 100)),
        chat((2, 700), (1, 150)),
        chat((1, 150), (2, 700), (4, 90)),
    ]
    expected = [bare.generate(prompt, PARAMS).token_ids for prompt in prompts]
    assert first.generate(prompts[0], PARAMS).token_ids == expected[0]
    first.close()
    with Store() as store:
        assert [(row.title, row.num_tokens) for row in store.prefixes.list()] == [("2.pdf", 850), ("1.pdf", 150)]
    hits = []
    for prompt, tokens_expected in zip(prompts, expected, strict=True):
        engine = make_engine(plugins=["prefix_cache"])
        result = engine.generate(prompt, PARAMS)
        assert result.token_ids == tokens_expected
        hits.append((notes(result)["disk_tokens"], notes(result)["documents"]))
        engine.close()
    assert hits == [(850, ["1.pdf", "2.pdf"]), (150, ["1.pdf"]), (0, []), (850, ["1.pdf", "2.pdf"])]


def test_the_stats_tell_memory_hits_from_disk_hits(make_engine: Any) -> None:
    first = make_engine(plugins=["prefix_cache"])
    cold = first.generate(chat((1, 150)), PARAMS)
    memory = first.generate(chat((1, 150), question=98), PARAMS)
    first.close()
    disk = make_engine(plugins=["prefix_cache"]).generate(chat((1, 150)), PARAMS)
    assert notes(cold) == {"memory_tokens": 0, "disk_tokens": 0, "documents": [], "discarded": []}
    assert notes(memory) == {"memory_tokens": 150, "disk_tokens": 0, "documents": ["1.pdf"], "discarded": []}
    assert notes(disk) == {"memory_tokens": 0, "disk_tokens": 150, "documents": ["1.pdf"], "discarded": []}


def test_a_lower_quota_removes_files_when_the_engine_starts(make_engine: Any) -> None:
    first = make_engine(plugins=["prefix_cache"])
    first.generate(chat((1, 150)), PARAMS)
    first.close()
    make_engine(plugins={"prefix_cache": {"disk_gb": 10.0}}).close()
    with Store() as store:
        assert len(store.prefixes.list()) == 1
    make_engine(plugins={"prefix_cache": {"disk_gb": 1e-6}}).close()
    with Store() as store:
        assert store.prefixes.list() == [] and not list(store.prefixes.folder.iterdir())


def test_a_store_that_cannot_be_opened_is_logged_once_and_only_for_documents(
    make_engine: Any, own_home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own_home.write_text("")
    engine = make_engine(plugins=["prefix_cache"])
    engine.generate(tokens(5, 40), PARAMS)
    assert caplog.messages == []
    for seed in (1, 2):
        engine.generate(chat((seed, 150)), PARAMS)
    assert [message.partition(":")[0] for message in caplog.messages] == ["documents are cached in memory only"]


def test_a_shorter_saved_prefix_serves_if_the_longest_is_damaged(make_engine: Any, own_home: Path) -> None:
    first = make_engine(plugins=["prefix_cache"])
    expected = first.generate(chat((1, 150), (2, 200)), PARAMS).token_ids
    first.close()
    with Store() as store:
        longest = next(row for row in store.prefixes.list() if row.num_tokens == 350)
        (store.prefixes.folder / longest.file).write_bytes(bytes(longest.num_bytes))
    result = make_engine(plugins=["prefix_cache"]).generate(chat((1, 150), (2, 200)), PARAMS)
    assert result.token_ids == expected
    assert notes(result)["disk_tokens"] == 150 and "checksum" in notes(result)["discarded"][0]


def test_two_salts_never_share_a_file(make_engine: Any) -> None:
    first = make_engine(plugins=["prefix_cache"])
    first.generate(chat((1, 150)), PARAMS, salt="ann")
    first.close()
    again = make_engine(plugins=["prefix_cache"])
    assert again.generate(chat((1, 150)), PARAMS, salt="bob").stats["cached_tokens"] == 0
    assert again.generate(chat((1, 150)), PARAMS).stats["cached_tokens"] == 0
    assert notes(again.generate(chat((1, 150)), PARAMS, salt="ann"))["disk_tokens"] == 150


def test_a_hit_in_memory_renews_the_date_of_use(make_engine: Any) -> None:
    engine = make_engine(plugins=["prefix_cache"])
    for seed in (1, 2, 1):
        engine.generate(chat((seed, 150)), PARAMS)
        cache = engine.lane_of(engine.default_plan).state["prefix_cache"]
        cache.disk._writer.submit(lambda: None).result()  # the file is written before its next use
    engine.close()
    with Store() as store:
        assert [row.title for row in store.prefixes.list()] == ["1.pdf", "2.pdf"]


def test_a_document_evicted_from_memory_is_read_from_disk(make_engine: Any) -> None:
    engine = make_engine(plugins=["prefix_cache"])
    cache = engine.lane_of(engine.default_plan).state["prefix_cache"]
    expected = engine.generate(chat((1, 150)), PARAMS)
    cache.disk._writer.submit(lambda: None).result()
    engine.worker.call(lambda: cache.evict([1000])).result()
    again = engine.generate(chat((1, 150)), PARAMS)
    assert notes(again)["disk_tokens"] == 150 and again.token_ids == expected.token_ids


@pytest.mark.parametrize("method", ["load", "find", "__init__"])
def test_a_pending_load_stalls_no_other_stream(make_engine: Any, monkeypatch: Any, method: str) -> None:
    """The disk hangs while it reads a file, looks up rows or opens the database."""
    first = make_engine(plugins=["prefix_cache"])
    expected = first.generate(chat((1, 150)), PARAMS).token_ids
    first.close()
    released, owner = threading.Event(), db.Store if method == "__init__" else Prefixes
    real: Callable[..., Any] = getattr(owner, method)

    def hang(*args: Any, **options: Any) -> Any:
        assert released.wait(60)
        return real(*args, **options)

    monkeypatch.setattr(owner, method, hang)
    engine = make_engine(plugins=["prefix_cache"])
    writing = engine.submit(tokens(5, 20), SamplingParams(max_tokens=400, ignore_eos=True))
    events = iter(writing)
    next(events)
    reading = engine.submit(chat((1, 150)), PARAMS)
    num_tokens = sum(len(event.token_ids) for event in events if isinstance(event, TextDelta))
    assert num_tokens == 400 - 1 or num_tokens == 400
    released.set()
    result = reading.result()
    assert result.token_ids == expected and notes(result)["disk_tokens"] == 150


def test_one_load_serves_all_requests_that_come_at_once(make_engine: Any, monkeypatch: Any) -> None:
    first = make_engine(plugins=["prefix_cache"])
    first.generate(chat((1, 300)), PARAMS)
    first.close()
    loads, load = [], Prefixes.load

    def count(self: Prefixes, prefix: Any) -> Any:
        loads.append(prefix)
        return load(self, prefix)

    monkeypatch.setattr(Prefixes, "load", count)
    engine = make_engine(plugins=["prefix_cache"])
    streams: list[Any] = []
    add = lambda: streams.extend(engine.submit(chat((1, 300), question=seed), PARAMS) for seed in range(8))  # noqa: E731
    engine.worker.call(add).result()
    assert all(stream.result().stats["cached_tokens"] >= 288 for stream in streams)
    assert len(loads) == 1


def test_without_a_store_answers_come_from_memory(make_engine: Any, monkeypatch: Any, caplog: Any) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise StorageError("the database is damaged")

    monkeypatch.setattr(db.Store, "__init__", fail)
    engine = make_engine(plugins=["prefix_cache"])
    cached = [engine.generate(chat((1, 150)), PARAMS).stats["cached_tokens"] for _ in range(2)]
    assert cached == [0, 161] and "in memory only: the database is damaged" in caplog.text


# ---- int8


def test_int8_is_approximate_and_says_so(make_engine: Any) -> None:
    assert PrefixCache.exactness_for(PrefixCache.Options()) == "identical"
    assert PrefixCache.exactness_for(PrefixCache.Options(int8=True)) == "approximate"
    assert PrefixCache.exactness_for(PrefixCache.Options(int8=True, save_documents=False)) == "identical"
    stats = make_engine(plugins={"prefix_cache": {"int8": True}}).generate(chat((1, 150)), PARAMS).stats
    assert stats["exactness"] == "approximate"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_int8_is_within_half_a_scale(dtype: torch.dtype) -> None:
    values = torch.randn(2, 2, 3, 40, 16, dtype=torch.float64).mul(3).to(dtype)
    values[0, 0, 0, 0] = 0
    values[0, 0, 0, 1, 3] = 300
    (name, unpacked), *rest = int8.unpack(int8.pack({"group.0": values})).items()
    assert name == "group.0" and not rest and unpacked.dtype == dtype
    half = values.double().abs().amax(-1, keepdim=True) / 127 / 2
    error = (unpacked.double() - values.double()).abs()
    assert bool((error <= half * 1.001 + values.double().abs() * torch.finfo(dtype).eps).all())
    assert bool((unpacked[0, 0, 0, 0] == 0).all())


def test_int8_takes_half_the_space_and_plans_without_it_do_not_read_it(make_engine: Any) -> None:
    options: dict[str, Any] = {"prefix_cache": {"int8": True}}
    for plugins in (options, {"prefix_cache": {}}):
        engine = make_engine(dtype="bfloat16", plugins=plugins)
        assert engine.generate(chat((1, 600)), PARAMS).stats["cached_tokens"] == 0
        engine.close()
    with Store() as store:
        exact, small = store.prefixes.list()
        assert small.fingerprint == f"{exact.fingerprint}+int8" and small.num_bytes < 0.56 * exact.num_bytes
    for plugins in (options, {"prefix_cache": {}}):
        engine = make_engine(dtype="bfloat16", plugins=plugins)
        assert notes(engine.generate(chat((1, 600)), PARAMS))["disk_tokens"] == 600
        engine.close()


def test_int8_changes_the_next_token_little(make_engine: Any) -> None:
    """The bound of docs/exactness.md: how much probability moves in the next token's distribution (bundled model and sample)."""
    from importlib.resources import files

    from pitlane.engine.text.documents import load_document

    sample = load_document(str(files("pitlane.storage.bundled") / "sample.pdf"))
    results = []
    for plugins in ({}, {"prefix_cache": {"int8": True}}, {"prefix_cache": {"int8": True}}):
        engine = make_engine("bundled", dtype="float32", plugins=plugins)
        prompt = engine.tokenizer.render_chat([{"role": "user", "content": "When is the track open?"}], [sample])
        result = engine.generate(prompt, SamplingParams(max_tokens=16, ignore_eos=True, logprobs=50))
        results.append(result)
        engine.close()
    assert results[2].stats["cached_tokens"] > 600
    exact, rounded = (
        [{token: 2.718281828**value for token, value in row.items()} for row in result.logprobs or []]
        for result in (results[0], results[2])
    )
    moved = [
        sum(abs(a[token] - b[token]) for token in a.keys() & b.keys()) / 2 for a, b in zip(exact, rounded, strict=True)
    ]
    num_same = next((i for i in range(16) if results[0].token_ids[i] != results[2].token_ids[i]), 16)
    assert 0 < max(moved[: num_same + 1]) < 0.02
