"""Checkpoints that are written: they hold the rounded weights, a killed run completes them, and other settings are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from pitlane import LinearPart, parts_of
from pitlane.engine.models.families.core import CORE_FAMILIES
from pitlane.engine.models.families.family import Families
from pitlane.engine.models.registry import resolve
from pitlane.engine.models.source import ModelSource
from pitlane.export.errors import ExportError
from pitlane.export.gguf_file import gguf_name, quantize_gguf
from pitlane.export.quantize import Done, is_quantized, quantize, rounded
from pitlane.export.settings import Settings
from pitlane.export.shards import JOURNAL, Journal

CASES = [
    Settings(bits=4, group_size=128),
    Settings(bits=4, group_size=32, symmetric=False),
    Settings(bits=8, group_size=0),
    Settings(bits=3, group_size=64),
    Settings(bits=4, group_size=64, format="gptq"),
    Settings(bits=4, group_size=32, symmetric=False, format="gptq"),
    Settings(bits=8, group_size=0, format="gptq"),
    Settings(bits=2, group_size=32, format="gptq"),
    Settings(bits=4, group_size=32, format="awq"),
    Settings(bits=4, group_size=64, symmetric=False, format="awq"),
]
GGUF = [Settings(bits=4, group_size=32, format="gguf"), Settings(bits=8, group_size=32, format="gguf")]


def name_of(settings: Settings) -> str:
    kind = "" if settings.symmetric else "-zeros"
    return f"{settings.format}-{settings.bits}-g{settings.group_size}{kind}"


def write(settings: Settings, out: Path, model: str = "random:tiny", **more: Any) -> ModelSource:
    """Quantize a model into a folder; return the model."""
    source = resolve(model)
    function = quantize_gguf if settings.format == "gguf" else quantize
    with torch.inference_mode():
        function(source, settings, out, more.pop("report", lambda done: None), **more)
    return source


def opened(folder: Path) -> ModelSource:
    return ModelSource.open(str(folder), folder, Families(CORE_FAMILIES))


@pytest.mark.parametrize("settings", CASES, ids=name_of)
def test_the_files_hold_the_rounded_weights(settings: Settings, tmp_path: Path) -> None:
    source = write(settings, tmp_path / "out")
    loaded = opened(tmp_path / "out")
    count = 0
    for part in parts_of(source.config):
        for name in part.shapes:
            weight = source.weights.get(name)
            if isinstance(part, LinearPart) and is_quantized(part):
                codes = rounded(name, weight, settings, weight.dtype)
                assert torch.equal(loaded.weights.get(name), codes.dequantized().to(weight.dtype)), name
                assert (
                    0
                    < (codes.dequantized() - weight.float()).abs().mean()
                    < 2.0 ** (1 - settings.bits) * weight.std() * 4
                )
                count += 1
            else:
                assert torch.equal(loaded.weights.get(name), weight), name
    assert count == len(loaded.packings) == 14
    assert not (tmp_path / "out" / JOURNAL).exists()


@pytest.mark.parametrize("granularity", ["channel", "tensor", "block"])
def test_the_files_hold_the_float8_weights(granularity: str, tmp_path: Path) -> None:
    """Torch computes the expected values from the definition: the largest weight of a scale becomes 448, scales are bfloat16."""
    settings = Settings("fp8", 8, 0, granularity=granularity)
    source = write(settings, tmp_path / "out")
    loaded = opened(tmp_path / "out")
    for name, packing in loaded.packings.items():
        weight = source.weights.get(f"{name}.weight").float()
        rows = {"channel": 1, "tensor": len(weight), "block": min(128, len(weight))}[granularity]
        columns = 128 if granularity == "block" else weight.shape[1]
        tiles = weight.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))  # [N / rows, rows, G, columns]
        scales = (tiles.abs().amax((1, 3), keepdim=True) / 448).bfloat16().float()
        numbers = (tiles / scales).clamp(-448, 448).to(torch.float8_e4m3fn)
        expected = (numbers.float() * scales).reshape(weight.shape)
        assert torch.equal(loaded.weights.get(f"{name}.weight"), expected.bfloat16()), name
        assert packing.is_float and 0 < (expected - weight).abs().mean() < 0.03 * weight.abs().mean()
    assert len(loaded.packings) == 14


@pytest.mark.parametrize("settings", [pytest.param(GGUF[0], marks=pytest.mark.slow), GGUF[1]], ids=["4 bits", "8 bits"])
def test_a_gguf_file_holds_the_rounded_weights(settings: Settings, tmp_path: Path) -> None:
    """Read by the package gguf, and by Pitlane. Rows of q and k are permuted back."""
    source = write(settings, tmp_path / "out", "bundled")
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    stored = {tensor.name: tensor for tensor in reader.tensors}
    loaded = resolve(str(tmp_path / "out" / "model.gguf"))
    assert len(stored) == sum(len(part.shapes) for part in parts_of(source.config))
    for part in parts_of(source.config):
        for name in part.shapes:
            weight, tensor = source.weights.get(name), stored[gguf_name(name)]
            values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy()).view(weight.shape)
            if not name.endswith(("q_proj.weight", "k_proj.weight")):
                expected = weight.float()
                if weight.dim() == 2:
                    bits = settings.bits if ".layers." in name else 8
                    expected = rounded(
                        name, weight, Settings(bits=bits, group_size=32, format="gguf"), weight.dtype
                    ).dequantized()
                assert torch.equal(values, expected), name
            error = (loaded.weights.get(name).float() - weight.float()).abs().max()
            assert error <= weight.float().abs().max() * (0.2 if settings.bits == 4 else 0.02), name


def test_a_gguf_file_has_the_tokens_of_the_model(tmp_path: Path, make_engine: Callable[..., Any]) -> None:
    write(GGUF[1], tmp_path / "out", "bundled")
    engines = [make_engine(model, dtype="float32") for model in ("bundled", str(tmp_path / "out" / "model.gguf"))]
    texts = ["The price is 12.50 € (for 3).", "  two spaces\n\nand lines", "user's naïve façade 日本"]
    ids = [[engine.loader.tokenizer.encode(text) for text in texts] for engine in engines]
    assert ids[0] == ids[1]
    assert engines[0].loader.eos_token_ids == engines[1].loader.eos_token_ids
    chats = [engine.loader.tokenizer.render_chat([{"role": "user", "content": "Hello"}]) for engine in engines]
    assert chats[0].token_ids == chats[1].token_ids


class Killed(Exception):
    """Stands for a process that ends in the middle."""


def kill_after(linears: int) -> Callable[[Done], None]:
    def report(done: Done) -> None:
        if done.linears >= linears:
            raise Killed

    return report


@pytest.mark.parametrize(
    ("settings", "linears"),
    [
        (CASES[0], 1),
        pytest.param(CASES[0], 8, marks=pytest.mark.slow),
        pytest.param(CASES[5], 8, marks=pytest.mark.slow),
        (CASES[9], 8),
        pytest.param(GGUF[0], 1, marks=pytest.mark.slow),
        (GGUF[0], 8),
    ],
)
def test_a_killed_run_is_completed_to_the_same_bytes(settings: Settings, linears: int, tmp_path: Path) -> None:
    model = "bundled" if settings.format == "gguf" else "random:tiny"
    write(settings, tmp_path / "whole", model)
    with pytest.raises(Killed):
        write(settings, tmp_path / "killed", model, report=kill_after(linears))
    with pytest.raises(ExportError, match="unfinished quantization; go on with --resume"):
        write(settings, tmp_path / "killed", model)
    part = next(iter((tmp_path / "killed").glob("*.part")), tmp_path / "killed" / "model-00009.safetensors.part")
    with open(part, "ab") as file:
        file.write(b"half a tensor")  # of the write that the kill broke off
    write(settings, tmp_path / "killed", model, resume=True)
    part.unlink(missing_ok=True)
    files = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "killed").iterdir()) and files
    for name in files:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name


def test_a_finished_gguf_file_outlives_its_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill before the journal is removed leaves a whole file. A part that is gone is written again."""
    out = tmp_path / "out"

    def kill(journal: Journal) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Journal, "remove", kill)
        write(GGUF[1], out, "bundled")
    whole, journal = (out / "model.gguf").read_bytes(), (out / JOURNAL).read_bytes()
    write(GGUF[1], out, "bundled", resume=True)
    assert [file.name for file in out.iterdir()] == ["model.gguf"] and (out / "model.gguf").read_bytes() == whole
    for rest in (None, len(whole) // 2):
        (out / "model.gguf").unlink()
        (out / JOURNAL).write_bytes(journal)
        if rest is not None:
            (out / "model.gguf.part").write_bytes(whole[:rest])
        write(GGUF[1], out, "bundled", resume=True)
        assert [file.name for file in out.iterdir()] == ["model.gguf"] and (out / "model.gguf").read_bytes() == whole


def test_a_shard_that_is_gone_is_written_again(tmp_path: Path) -> None:
    write(CASES[0], tmp_path / "whole")
    with pytest.raises(Killed):
        write(CASES[0], tmp_path / "out", report=kill_after(8))
    shard = sorted((tmp_path / "out").glob("*.safetensors"))[0]
    shard.unlink()
    write(CASES[0], tmp_path / "out", resume=True)
    assert shard.read_bytes() == (tmp_path / "whole" / shard.name).read_bytes()


def test_a_run_goes_on_with_the_same_settings_alone(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        write(CASES[0], tmp_path / "out", report=kill_after(1))
    with pytest.raises(ExportError, match="begun with another settings"):
        write(CASES[2], tmp_path / "out", resume=True)
    with pytest.raises(ExportError, match="nothing to resume"):
        write(CASES[2], tmp_path / "other", resume=True)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (Settings(bits=3, format="awq"), "awq holds 4 bits, got 3"),
        (Settings(group_size=0, format="awq"), "--group-size 128, 64 or 32"),
        (Settings(bits=5, format="gptq"), "gptq holds 2, 3, 4, 8 bits, got 5"),
        (
            Settings(group_size=48),
            r"must divide the inputs of every linear, got 48 and 128 .*q_proj\); try 128 or 64 or 32",
        ),
        (Settings(method="novel"), "unknown method .novel.; known: rtn, gptq, awq"),
        (Settings(format="novel"), "unknown format 'novel'; known: compressed-tensors, gptq, awq, gguf"),
        (Settings(bits=3, format="gguf"), "gguf holds 4 or 8 bits in symmetric groups of 32"),
    ],
)
def test_settings_that_no_format_holds(settings: Settings, words: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=words):
        write(settings, tmp_path / "out")


def test_gguf_needs_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="random:tiny has no tokenizer, which gguf needs"):
        write(GGUF[0], tmp_path / "out")
    assert not (tmp_path / "out").exists(), "the same folder serves another --format"
    write(CASES[0], tmp_path / "out")


def test_a_full_folder_for_temporary_files_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*values: Any, **more: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_kv_data_to_file", full)
    with pytest.raises(ExportError, match=r"cannot write the header of model.gguf .*No space left.*TMPDIR") as caught:
        write(GGUF[1], tmp_path / "out", "bundled")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_a_folder_with_a_model_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ExportError, match="holds a model; choose another --out"):
        write(CASES[0], tmp_path)


def test_a_quantized_model_is_quantized_again(tmp_path: Path) -> None:
    write(CASES[0], tmp_path / "first")
    write(CASES[4], tmp_path / "second", str(tmp_path / "first"))
    config = json.loads((tmp_path / "second" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "gptq" and len(opened(tmp_path / "second").packings) == 14
