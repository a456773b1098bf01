"""`pitlane bench kernels`: lines for every kernel, with both fractions, as a table and as JSON."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from pitlane.kernels.extension import cpu
from pitlane.ui.bench import kernels
from pitlane.ui.cli import main


@pytest.mark.skipif(cpu is None, reason="no kernels here")
def test_bench_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"QUICK_POOL_BYTES": 2**20, "QUICK_BUDGET": 0.0, "QUICK_SHAPES": ((64, 256),)}.items():
        monkeypatch.setattr(kernels, name, value)
    result = CliRunner().invoke(main, ["bench", "kernels", "--quick", "--json", "--threads", "1"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert set(report) == {"ceilings", "lines", "machine", "versions", "commit"}
    lines = [line for line in report["lines"] if line["kernel"] == "int8"]
    assert [line["rows"] for line in lines] == list(kernels.QUICK_ROWS) and lines[0]["weight_bytes"] == 64 * 256
    for line in report["lines"]:
        assert line["us"] >= line["best_us"] > 0 and line["n"] >= 5
        assert line["of_probe"] == pytest.approx(line["probe_us"] / line["us"], rel=0.1, abs=0.1 / line["us"])
    table = CliRunner().invoke(main, ["bench", "kernels", "--quick"])
    assert table.exit_code == 0 and "int4 g32" in table.stdout


@pytest.mark.skipif(cpu is None, reason="no kernels here")
def test_wrong_arguments_are_refused() -> None:
    for name, arguments in (
        ("read_bytes", (0, 8, 1)),
        ("read_bytes", (1, -1, 1)),
        ("ceiling", (3, 1, 0.1)),
        ("ceiling", (0, 0, 0.1)),
    ):
        with pytest.raises(ValueError):
            getattr(cpu, name)(*arguments)
