"""Tuning tables: the choice by GPU and capability, the file, and the command with a timer that invents times."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from pitlane.kernels.cuda import measure, measure_tune, tuning
from pitlane.kernels.cuda.measure_timer import Call
from pitlane.kernels.cuda.tuning import Form

H200, H100, HOPPER = "NVIDIA H200", "NVIDIA H100", (9, 0)
SLOW, FAST = tuning.candidates("int8", 1, HOPPER)[:2]


def entry(form: Form = FAST, kernel: str = "int8", rows: int = 16) -> dict[str, Any]:
    return {"kernel": kernel, "rows": rows, "form": form, "ms": 1.0, "default_ms": 2.0}


def test_the_own_table_comes_before_a_table_of_the_same_capability(tmp_path: Path) -> None:
    other, own = tuning.candidates("int8", 1, HOPPER)[1:3]
    tuning.write(tmp_path / "a.json", H100, HOPPER, [entry(other)])
    assert tuning.table_of(H200, HOPPER, tmp_path) == {("int8", 16): other}
    tuning.write(tmp_path / "b.json", H200, HOPPER, [entry(own)])
    tuning.table_of.cache_clear()
    assert tuning.table_of(H200, HOPPER, tmp_path) == {("int8", 16): own}
    assert tuning.table_of("NVIDIA A100", (8, 0), tmp_path) == {}


@dataclass
class Gpu:
    """Stands in for torch.cuda."""

    name: str
    capability: tuple[int, int]

    def patch(self, monkeypatch: pytest.MonkeyPatch, tables: Path) -> torch.device:
        monkeypatch.delenv("TRITON_INTERPRET")
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: self.name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: self.capability)
        monkeypatch.setattr(tuning, "table_of", partial(tuning.table_of, folder=tables))
        return torch.device("cuda")


def test_a_kernel_takes_the_choice_of_the_table_and_else_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert SLOW != FAST
    tuning.write(tmp_path / "a.json", H200, HOPPER, [entry()])
    device = Gpu(H200, HOPPER).patch(monkeypatch, tmp_path)
    assert tuning.chosen("int8", 16, device) == FAST
    assert tuning.chosen("int8", 17, device) == tuning.plain("int8", 17)
    assert tuning.chosen("fp8 W8A8", 65, device).specialised and tuning.chosen("fp8 W8A16", 65, device).descriptors
    assert not tuning.chosen("fp8 W8A16", 64, device).descriptors


@pytest.mark.parametrize("capability", [(8, 0), (8, 9)])
def test_a_gpu_without_descriptors_never_takes_them(
    capability: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Gpu("some GPU", capability).patch(monkeypatch, tmp_path)
    for kernel in tuning.kernels():
        for rows in (1, 64, 5000):
            assert tuning.chosen(kernel, rows, device) == tuning.plain(kernel, rows)
            assert not any(form.descriptors for form in tuning.candidates(kernel, rows, capability))


def test_under_the_interpreter_the_plain_default_is_chosen() -> None:
    assert tuning.chosen("fp8 W8A8", 500, torch.device("cpu")) == tuning.plain("fp8 W8A8", 500)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel": "int9"}, "no kernel 'int9'"),
        ({"rows": 17}, "no kernel 'int8' with rows 17"),
        ({"form": Form(16, 64, 64, 3, 2)}, "int8 has no candidate"),
        ({"form": Form(64, 128, 128, 4, 3, True)}, "int8 has no candidate"),
    ],
)
def test_a_wrong_table_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    tuning.write(path, H200, HOPPER, [{**entry(), **change}])
    with pytest.raises(ValueError, match=rf"a.json is no tuning table .*{message}.*; delete it, or write it again"):
        tuning.read(path)


def test_a_file_that_is_no_table_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for text in ("{", "{}", '{"device": "x", "capability": [9, 0], "choices": [{"kernel": "int8"}]}'):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="is no tuning table"):
            tuning.read(path)


def test_the_tables_of_the_package_are_right() -> None:
    for path in tuning.FOLDER.glob("*.json"):
        tuning.read(path)


def made_up_times(seconds: Mapping[str, float], calls: Mapping[str, Call]) -> dict[str, float]:
    """Seconds of the calls that exist, by their index; 1 for all others."""
    return {name: seconds.get(name, 1.0) for name in calls}


def case(kernel: str = "int8", wrong: tuple[Form, ...] = (), broken: tuple[Form, ...] = ()) -> measure_tune.Case:
    def prepare(form: Form) -> Call:
        if form in broken:
            raise RuntimeError("out of resources")
        return lambda: float(form in wrong)

    return measure_tune.Case(kernel, 16, prepare, float)


def test_the_fastest_right_candidate_is_chosen() -> None:
    forms = tuning.candidates("int8", 1, HOPPER)
    times = partial(made_up_times, {"0": 2.0, "1": 0.1, "2": 0.2, "3": 0.5})
    (choice,) = measure_tune.tune([case(wrong=(forms[1],), broken=(forms[2],))], times, HOPPER)
    assert choice == {"kernel": "int8", "rows": 16, "form": forms[3], "ms": 500.0, "default_ms": 2000.0}


def test_the_default_stays_unless_another_candidate_is_clearly_faster() -> None:
    forms = tuning.candidates("int8", 1, HOPPER)
    for gain, index in ((0.985, 0), (0.97, 1)):
        (choice,) = measure_tune.tune([case()], partial(made_up_times, {"1": gain}), HOPPER)
        assert choice["form"] == forms[index]


def test_no_right_candidate_ends_the_command() -> None:
    with pytest.raises(RuntimeError, match="no candidate of int8 with rows 16 is right"):
        measure_tune.tune([case(wrong=tuple(tuning.candidates("int8", 1, HOPPER)))], dict, HOPPER)


def test_the_command_on_a_cpu_needs_a_file() -> None:
    timer = type("Timer", (), {"device": torch.device("cpu")})
    with pytest.raises(SystemExit, match="needs a FILE"):
        measure_tune.main(timer, [])  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_command_writes_a_table_of_every_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "cpu.json"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["measure", "--tiny", "--tune", str(path)])
    assert measure.main() == 0
    choices = tuning.read(path)["choices"]
    assert {kernel for kernel, _ in choices} == {*tuning.LINEARS, "attention D 64"}
    assert len(choices) == 3 * 7 and set(json.loads(path.read_text())) >= {"device", "capability", "triton", "torch"}
