"""The recipe of the bundled model: stages that fit each other, their data, a whole run at tiny size."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from bundled_model import recipe
from bundled_model.recipe import SHAPE, STAGES, TEXT_WEIGHT, VOCAB_SIZE, Stage, recall, records, run_stage
from pitlane.training import checkpoint
from pitlane.training.models import read_model, read_tokenizer

TEXT = "The harbour of Lund was closed in the spring of 1893, and ships lay at anchor. " * 200
TINY = Stage("tiny", None, 128, 32, (60, 120), 2, 1e-3, 0.5, batch_tokens=64)


def test_each_stage_grows_out_of_the_one_before() -> None:
    depth = None
    assert len({stage.name for stage in STAGES}) == len(STAGES)
    for stage in STAGES:
        assert (stage.layers is None) == (depth is None), "only the first stage starts anew"
        if stage.layers is None:
            depth = SHAPE.num_layers
        else:
            assert depth is not None and set(stage.layers) == set(range(depth)), "every layer goes on"
            assert list(stage.layers) == sorted(stage.layers)
            depth = len(stage.layers)
        assert all(0 < layer < depth for layer in stage.exit_layers)
        assert stage.rows * stage.length == stage.batch_tokens
        assert stage.length <= SHAPE.context and stage.steps > 100
        assert stage.recall + stage.text < 0.5


def test_recall_asks_for_what_was_there_before() -> None:
    record = recall(Random(1), 400)
    ids, weights = record["ids"], record["weights"]
    assert len(ids) == len(weights) == 400 and set(weights) == {0.0, 1.0}
    assert all(6 <= token < VOCAB_SIZE for token in ids)
    pairs = list(pairwise(ids))
    for place in range(1, 400):
        if weights[place]:
            assert pairs[place - 1] in pairs[: place - 1]
    assert sum(weights) > 100


def test_a_stage_mixes_its_kinds_by_their_shares() -> None:
    stage = replace(STAGES[0], tokens=4e5, text=0.2, recall=0.2)
    examples = list(records(stage, [TEXT], shard=1))
    kinds = Counter(next(key for key in ("ids", "text", "messages") if key in record) for record in examples)
    for kind, share in (("ids", 0.2), ("text", 0.2), ("messages", 0.6)):
        assert kinds[kind] / len(examples) == pytest.approx(share, abs=0.06)
    assert all(record["weight"] == TEXT_WEIGHT and record["text"] in TEXT for record in examples if "text" in record)
    first: list[dict[str, Any]] = list(islice(records(stage, [TEXT], shard=1), 20))
    assert first == examples[:20] != list(islice(records(stage, [TEXT], shard=2), 20))
    assert not any("text" in record for record in islice(records(stage, [], shard=1), 50))


def test_two_tiny_stages_from_nothing_to_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "VOCAB_SIZE", 400)
    monkeypatch.setattr(recipe, "SHAPE", replace(SHAPE, intermediate_size=64, num_layers=2))
    generate = recipe.generate.conversations
    monkeypatch.setattr(recipe.generate, "conversations", lambda settings, number: generate(settings, min(number, 40)))
    train_on = recipe.texts_of
    monkeypatch.setattr(recipe, "texts_of", lambda rows: train_on(islice(rows, 40)))
    run_stage(TINY, tmp_path, tmp_path / "tiny", [TEXT], "cpu")
    assert (tmp_path / "tiny" / "done").is_file()
    grown = replace(TINY, name="grown", layers=(0, 1, 1), exit_layers=(1,))
    run_stage(grown, tmp_path / "tiny" / "model", tmp_path / "grown", [TEXT], "cpu")
    first, second = read_model(tmp_path / "tiny" / "model"), read_model(tmp_path / "grown" / "start")
    ids = torch.arange(6, 40)[None]
    with torch.no_grad():
        assert torch.equal(first.eval()(ids).logits, second.eval()(ids).logits)
    model = tmp_path / "grown" / "model"
    assert read_model(model).config.num_hidden_layers == 3
    assert read_tokenizer(model).get_vocab() == read_tokenizer(tmp_path / "tiny" / "start").get_vocab()
    assert (model / checkpoint.FILE).is_file()
