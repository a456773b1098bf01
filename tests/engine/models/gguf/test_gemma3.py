"""A real model of K-quants: Gemma 3 270M, Q4_K_M. Runs where PITLANE_TEST_GEMMA names its GGUF file.

Whoever names the file accepts the Gemma terms. The file comes in no test run, and in no package.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from pitlane.engine.models.registry import resolve
from tests.engine.models.harness import Harness, load

FILE = Path(os.environ.get("PITLANE_TEST_GEMMA", "-"))  # read here: a fixture clears these settings
TEXT = Path(__file__).parents[4] / "README.md"
NUM_TOKENS = 1200  # two windows and more
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FILE.is_file(), reason="PITLANE_TEST_GEMMA does not name gemma-3-270m-q4_k_m.gguf"),
]


def perplexity(logits: Tensor, ids: list[int]) -> float:
    table, targets = logits[:-1].float().log_softmax(-1), torch.tensor(ids[1:])[:, None]
    return float(torch.exp(-table.gather(1, targets).mean()))


def test_the_perplexity_is_that_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "pitlane.engine.text.gguf_tokenizer")  # the stand-in of conftest.py
    from pitlane.engine.text.tokenizer import Tokenizer

    ids = list(Tokenizer(resolve(str(FILE))).render_raw(TEXT.read_text(encoding="utf-8")).token_ids)[:NUM_TOKENS]
    ours = perplexity(Harness(load(FILE), 1, NUM_TOKENS + 64).run({0: ids}), ids)
    reference = AutoModelForCausalLM.from_pretrained(FILE.parent, gguf_file=FILE.name, dtype=torch.float32)
    with torch.inference_mode():
        theirs = perplexity(reference(torch.tensor([ids])).logits[0], ids)
    print(f"perplexity {ours:.4f}, transformers {theirs:.4f}")
    assert ours == pytest.approx(theirs, rel=1e-3)
