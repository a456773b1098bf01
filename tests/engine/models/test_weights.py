"""Sources of weights: files, what can be wrong with them, fingerprints, and random numbers at a real shape."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pitlane.engine.errors import ModelError
from pitlane.engine.models import weight_hashes
from pitlane.engine.models.presets import preset
from pitlane.engine.models.weights import RandomWeights, SafetensorsFolder, shapes_of


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
    for damaged in (whole[:-8], whole[:20], b"", b"\xff" * 64):
        file.write_bytes(damaged)
        with pytest.raises(ModelError, match="truncated or damaged"):
            SafetensorsFolder(tmp_path)


def test_missing_shard_and_damaged_index(tmp_path: Path) -> None:
    write(tmp_path, "model-1.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}))
    with pytest.raises(ModelError, match=r"lacks 1 of 2 shards \(model-2\.safetensors\)"):
        SafetensorsFolder(tmp_path)
    index.write_text("{")
    with pytest.raises(ModelError, match="damaged"):
        SafetensorsFolder(tmp_path)


def test_fingerprint_is_of_the_content_and_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m").mkdir()
    file = write(tmp_path / "m")
    first = SafetensorsFolder(tmp_path / "m").fingerprint()
    read = []
    monkeypatch.setattr(weight_hashes, "_sha256", lambda handle: read.append(handle.name) or "other")
    assert SafetensorsFolder(tmp_path / "m").fingerprint() == first
    assert not read, "a known file was read again"
    os.utime(file, (1, 1))
    assert SafetensorsFolder(tmp_path / "m").fingerprint() != first
    assert read == [str(file)]
    monkeypatch.undo()
    write(tmp_path / "m", value=2.0)
    assert SafetensorsFolder(tmp_path / "m").fingerprint() != first


def test_fingerprint_survives_a_damaged_cache(tmp_path: Path, own_home: Path) -> None:
    write(tmp_path)
    first = SafetensorsFolder(tmp_path).fingerprint()
    cache = Path(os.environ["PITLANE_HOME"]) / "cache" / "weight_hashes.json"
    for text in ("{", "[]", "3"):
        cache.write_text(text)
        assert SafetensorsFolder(tmp_path).fingerprint() == first


def test_random_weights_are_a_function_of_shape_and_seed() -> None:
    config = preset("tiny")
    one, same, other = RandomWeights(config), RandomWeights(config), RandomWeights(config, seed=1)
    assert set(one.names()) == set(shapes_of(config))
    for name, shape in shapes_of(config).items():
        assert one.get(name).shape == shape
        assert torch.equal(one.get(name), same.get(name))
    name = "model.layers.1.mlp.down_proj.weight"
    assert not torch.equal(one.get(name), other.get(name))
    assert one.fingerprint() == same.fingerprint() != other.fingerprint()
    assert abs(float(one.get(name).float().std()) - 256**-0.5) < 0.002
    assert torch.equal(one.get("model.norm.weight"), torch.ones(128, dtype=torch.bfloat16))
    rows = one.get("lm_head.weight")
    assert len(torch.unique(rows, dim=0)) == len(rows)
