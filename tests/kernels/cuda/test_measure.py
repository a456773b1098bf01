"""The command for the day with a GPU runs here over small shapes, and fails if a kernel is wrong."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from pitlane.kernels.cuda import activations, measure, measure_plugins


@pytest.mark.slow
def test_all_kernels_are_checked(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["measure", "--tiny", "--no-plugins"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert measure.main() == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    kernels = {row["kernel"] for row in document["kernels"]}
    assert {"rms_norm", "add_rms_norm", "rope_store", "silu_mul", "quantize int8", "quantize fp8", "sample"} <= kernels
    assert {"int8", "int4 g64", "fp8 W8A16", "fp8 W8A8", "fp8 W8A8 blocks", "attention"} <= kernels


@pytest.mark.slow
def test_a_wrong_kernel_fails_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["measure", "--tiny", "--no-plugins"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(activations, "silu_mul", lambda x: torch.nn.functional.silu(x[:, : x.shape[1] // 2]))
    for name in ("rope", "kv", "sampling", "linears", "attention"):
        monkeypatch.setattr(measure.Bench, name, lambda self, *_: None)
    assert measure.main() == 1 and "WRONG" in capsys.readouterr().out


@pytest.mark.slow
def test_plugins_are_compared_with_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = measure_plugins.run("cpu", True, 1.0)
    assert row.is_right and row.num_equal == 2 * measure_plugins.FIRST_TOKENS, row
    answer = measure_plugins.answer

    def wrong(*arguments: object, **options: object) -> dict[str, object]:
        document = answer(*arguments, **options)  # type: ignore[arg-type]
        if options:
            document["token_ids"] = [token + 1 for token in document["token_ids"]]
        return document

    monkeypatch.setattr(measure_plugins, "answer", wrong)
    (row,) = measure_plugins.run("cpu", True, 1.0)
    assert not row.is_right and "0 leading tokens" in row.error
