"""Sources of weights: files and their defects, fingerprints, and random weights in the shapes of a model."""

from __future__ import annotations

import errno
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pitlane.engine.errors import ModelError
from pitlane.engine.models import weight_hashes
from pitlane.engine.models.presets import preset
from pitlane.engine.models.weights import RandomWeights, SafetensorsFolder
from tests.engine.models.harness import shapes_of


def write(folder: Path, name: str = "model.safetensors", value: float = 1.0) -> Path:
    save_file({"a.weight": torch.full((4, 4), value), "a.bias": torch.zeros(4)}, folder / name)
    return folder / name


def test_one_file(tmp_path: Path) -> None:
    write(tmp_path)
    source = SafetensorsFolder(tmp_path)
    assert sorted(source.names()) == ["a.bias", "a.weight"]
    assert torch.equal(source.get("a.weight"), torch.ones(4, 4))
    assert source.num_bytes >= 20 * 4
    with pytest.raises(ModelError, match=r"lacks b\.weight"):
        source.get("b.weight")


def test_what_can_be_wrong_with_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no"):
        SafetensorsFolder(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelError, match=r"only pickle weights.*convert"):
        SafetensorsFolder(tmp_path)
    file = write(tmp_path)
    whole = file.read_bytes()
    named = whole.replace(b"a.bias", b"a\x1b[31m").replace(b"[0,64]", b"[0,99]")
    for damaged in (whole[:-8], whole[:20], b"", b"\xff" * 64, named):
        file.write_bytes(damaged)
        with pytest.raises(ModelError, match="truncated or damaged") as error:
            SafetensorsFolder(tmp_path)
        assert str(error.value).isprintable()


def test_missing_shard_and_damaged_index(tmp_path: Path) -> None:
    write(tmp_path, "model-1.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}))
    with pytest.raises(ModelError, match=r"lacks 1 of 2 shards \(model-2\.safetensors\)"):
        SafetensorsFolder(tmp_path)
    index.write_text("{")
    with pytest.raises(ModelError, match="damaged"):
        SafetensorsFolder(tmp_path)


@pytest.mark.parametrize(
    "shard",
    ["../model.safetensors", "/etc/passwd", "", ".", "..", "\0", "\ud800", "x" * 500, "config.json", "a/b.safetensors"],
)
def test_shards_outside_of_the_folder_are_missing(shard: str, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    (folder / "a").mkdir(parents=True)
    for file in (write(tmp_path), write(folder / "a", "b.safetensors"), folder / "config.json"):
        file.touch()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a.weight": shard}}))
    with pytest.raises(ModelError, match="lacks 1 of 1 shards") as error:
        SafetensorsFolder(folder)
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    "weight_map", [None, [], {}, {"a": 1}, {"a": None}, {"a": ["model.safetensors"]}, {"a\x1b": 1}]
)
def test_an_index_of_other_kinds(weight_map: Any, tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelError, match=r"index\.json: weight_map.* must .*, got") as error:
        SafetensorsFolder(tmp_path)
    assert str(error.value).isprintable()


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    names = [write(tmp_path, f"model-{number}.safetensors").name for number in (1, 2)]
    index = {"weight_map": dict(zip(("a.weight", "a.bias"), names, strict=True))}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"model-1\.safetensors and model-2\.safetensors both hold a\."):
        SafetensorsFolder(tmp_path)


def test_an_index_beside_a_file_that_it_does_not_name(tmp_path: Path) -> None:
    write(tmp_path)
    write(tmp_path, "model-1.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    with pytest.raises(ModelError, match=r"holds model\.safetensors and an index of other files; remove"):
        SafetensorsFolder(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    assert SafetensorsFolder(tmp_path).files == [tmp_path / "model.safetensors"]


def test_fingerprint_is_of_the_content_and_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m").mkdir()
    file = write(tmp_path / "m")
    first = SafetensorsFolder(tmp_path / "m").fingerprint()
    read = []
    monkeypatch.setattr(weight_hashes, "_sha256", lambda file: read.append(file) or "other")
    assert SafetensorsFolder(tmp_path / "m").fingerprint() == first
    assert not read, "a known file was read again"
    os.utime(file, (1, 1))
    assert SafetensorsFolder(tmp_path / "m").fingerprint() != first
    assert read == [file]
    monkeypatch.undo()
    write(tmp_path / "m", value=2.0)
    assert SafetensorsFolder(tmp_path / "m").fingerprint() != first


def set_back(file: Path, before: os.stat_result) -> None:
    """Restore the modification time of a file, as `cp -p` and `rsync -t` do."""
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_weights_replaced_under_their_old_date_are_noticed(tmp_path: Path) -> None:
    file = write(tmp_path)
    first, before = SafetensorsFolder(tmp_path).fingerprint(), file.stat()
    write(tmp_path, value=2.0)
    set_back(file, before)
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert SafetensorsFolder(tmp_path).fingerprint() != first


@pytest.mark.parametrize("has_system_time", [True, False])
def test_one_changed_byte_of_a_large_file_is_noticed(
    has_system_time: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system's time of the change shows it. On a file system without this time, a change inside a piece is noticed."""
    file, size = tmp_path / "large", 2**20
    file.write_bytes(bytes(size))
    before = file.stat()
    if not has_system_time:
        monkeypatch.setattr(weight_hashes.os, "fstat", lambda handle: before)
    first = weight_hashes.state_of(file)
    time.sleep(0.02)  # the clock of file times may tick every 4 ms
    with open(file, "r+b") as handle:
        handle.seek(size // 2 - 20_000 if has_system_time else size - 1)
        handle.write(b"x")
    set_back(file, before)
    assert weight_hashes.state_of(file) != first


def test_weights_replaced_while_they_are_in_use_have_no_fingerprint(tmp_path: Path) -> None:
    """The process still maps the old weights, so it must not save their KV under the fingerprint of the new weights."""
    file = write(tmp_path)
    source = SafetensorsFolder(tmp_path)
    first = source.fingerprint()
    file.chmod(0o600)
    os.link(file, tmp_path / "backup")
    assert source.fingerprint() == first, "the content is the same"
    other = write(tmp_path, "other", value=2.0)
    os.replace(other, file)
    with pytest.raises(ModelError, match=r"model\.safetensors was replaced while it was in use; open the model again"):
        source.fingerprint()
    file.unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be read \(No such file"):
        source.fingerprint()


def test_fingerprint_survives_a_damaged_cache(tmp_path: Path, own_home: Path) -> None:
    write(tmp_path)
    first = SafetensorsFolder(tmp_path).fingerprint()
    cache = Path(os.environ["PITLANE_HOME"]) / "cache" / "weight_hashes.json"
    for text in ("{", "[]", "3", "[" * 100_000, json.dumps(dict.fromkeys(json.loads(cache.read_text()), 5))):
        cache.write_text(text)
        assert SafetensorsFolder(tmp_path).fingerprint() == first


def test_a_cache_that_cannot_be_written_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    cache = Path(os.environ["PITLANE_HOME"]) / "cache"

    def full(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert SafetensorsFolder(tmp_path).fingerprint()
    assert list(cache.iterdir()) == []


def test_random_weights_are_a_function_of_shape_and_seed() -> None:
    config = preset("tiny")
    weights, same, other = RandomWeights(config), RandomWeights(config), RandomWeights(config, seed=1)
    assert set(weights.names()) == set(shapes_of(config))
    for name, shape in shapes_of(config).items():
        assert weights.get(name).shape == shape
        assert torch.equal(weights.get(name), same.get(name))
    name = "model.layers.1.mlp.down_proj.weight"
    assert not torch.equal(weights.get(name), other.get(name))
    assert weights.fingerprint() == same.fingerprint() != other.fingerprint()
    assert abs(float(weights.get(name).float().std()) - 256**-0.5) < 0.002
    assert torch.equal(weights.get("model.norm.weight"), torch.ones(128, dtype=torch.bfloat16))
    rows = weights.get("lm_head.weight")
    assert len(torch.unique(rows, dim=0)) == len(rows)
