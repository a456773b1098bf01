"""Model names after `--model`, and the errors for models that cannot be found. The hub is a local folder and a stub."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pitlane.engine.errors import ModelError
from pitlane.engine.models import hub
from pitlane.engine.models.config import DecoderConfig
from pitlane.engine.models.presets import ALIASES, PRESETS, preset
from pitlane.engine.models.registry import resolve
from pitlane.engine.models.weights import RandomWeights
from tests.engine.models.harness import Harness, load, shapes_of

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TENSORS = shapes_of(DecoderConfig("llama", 8, 8, 1, 1, 1, 8, 300, 16))  # the tensors of `write_model`


def write_model(folder: Path, **changes: Any) -> Path:
    """Write a model folder that is complete enough for `resolve`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"architectures": ["LlamaForCausalLM"], "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 1, "vocab_size": 300, "max_position_embeddings": 16} | changes
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: torch.zeros(shape) for name, shape in TENSORS.items()}, folder / "model.safetensors")
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache, offline."""
    from huggingface_hub import constants

    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return folder


def put_in_cache(cache: Path, name: str, **changes: Any) -> Path:
    repo = cache / f"models--{name.replace('/', '--')}"
    (repo / "blobs").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    return write_model(repo / "snapshots" / COMMIT, **changes)


def test_presets_are_the_models_they_name() -> None:
    sizes = {"llama-1b": 1.10, "llama-8b": 8.03, "llama-3.2-1b": 1.24, "llama-3.2-3b": 3.21, "qwen2.5-0.5b": 0.49}
    sizes |= {"qwen3-0.6b": 0.60, "qwen3-1.7b": 1.72, "qwen3-4b": 4.02, "smollm2-135m": 0.135, "smollm2-360m": 0.362}
    sizes |= {"smollm3-3b": 3.08, "mistral-7b": 7.25, "tiny": 0.0004, "llama-1b-draft": 0.0388}
    sizes |= {"gemma3-270m": 0.268, "gemma3-1b": 1.00}
    assert set(sizes) == set(PRESETS)
    for name, billions in sizes.items():
        count = sum(torch.Size(shape).numel() for shape in shapes_of(PRESETS[name]).values())
        assert count / 1e9 == pytest.approx(billions, rel=0.025, abs=1e-4), name
    assert all(preset(alias) == preset(name) for alias, name in ALIASES.items())


def test_random() -> None:
    source = resolve("random:tiny")
    assert (source.name, source.folder, source.config.vocab_size) == ("random:tiny", None, 512)
    assert isinstance(source.weights, RandomWeights)
    with pytest.raises(ModelError, match=r"unknown preset 'huge'; known: .*llama-1b.*tiny"):
        resolve("random:huge")


def test_random_text_does_not_settle_into_one_token() -> None:
    harness = Harness(load("random:tiny", torch.float64), num_seqs=1, num_tokens=256, dtype=torch.float64)
    logits, said = harness.run({0: list(b"The quick brown fox")}), []
    assert 0.5 < float(logits.std()) < 2
    for _ in range(200):
        said.append(int(logits[-1].argmax()))
        logits = harness.run({0: said[-1:]})
    assert len(set(said)) > 20


def test_folders(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    assert resolve(str(folder)).folder == folder
    with pytest.raises(ModelError, match=r"is a file; give the folder"):
        resolve(str(folder / "config.json"))
    for path in ("./nowhere", "/nowhere/at/all", "~/nowhere-at-all", "a/b/c"):
        with pytest.raises(ModelError, match=r"no such folder: .*give a folder"):
            resolve(path)
    for path in ("", "a" * 300, "/" + "a" * 5000, "~nobody-of-this-name/m"):
        with pytest.raises(ModelError, match=r"no such folder"):
            resolve(path)


def test_hub_from_the_cache(cache: Path) -> None:
    folder = put_in_cache(cache, "owner/name")
    assert resolve("owner/name").folder == folder


def test_hub_cache_that_is_not_complete(cache: Path) -> None:
    folder = put_in_cache(cache, "owner/name")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError):
        resolve("owner/name")


def test_offline(cache: Path) -> None:
    with pytest.raises(ModelError, match=r"owner/name is not in the cache and the hub cannot be reached; connect"):
        resolve("owner/name")


def test_names_that_are_no_ids(cache: Path) -> None:
    with pytest.raises(ModelError, match=r"no folder and no Hugging Face id"):
        resolve("what is this?")


def _response(status: int) -> Any:
    class Response:
        status_code, headers, request, text, content = status, {}, None, "", b""

    return Response()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda errors: errors.GatedRepoError("403", response=_response(403)), "is gated; accept its terms.*HF_TOKEN"),
        (
            lambda errors: errors.RepositoryNotFoundError("404", response=_response(404)),
            "no model owner/name.*HF_TOKEN",
        ),
        (lambda errors: errors.HfHubHTTPError("503", response=_response(503)), "status 503; try again later"),
        (lambda errors: OSError(28, "No space left on device"), "No space left on device"),
    ],
)
def test_hub_failures(
    make: Callable[[Any], Exception], words: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def fail(*_: Any, **__: Any) -> None:
        raise make(huggingface_hub.errors)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelError, match=words) as error:
        resolve("owner/name")
    assert "\n" not in str(error.value)


def test_the_bytes_of_a_download_are_counted_once_and_an_error_ends_it(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    seen: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        seen.append((done, total))
        if done > 5:
            raise RuntimeError("enough")

    def download(*_: Any, local_files_only: bool, tqdm_class: Any = None, **__: Any) -> str:
        if local_files_only:
            raise huggingface_hub.errors.LocalEntryNotFoundError("not here")
        files = tqdm_class(total=3, desc="Fetching 3 files")
        bytes_read = tqdm_class(total=0, unit="B", name="huggingface_hub.snapshot_download")
        bytes_sent = tqdm_class(total=0, unit="B", name="huggingface_hub.snapshot_download.transfer")
        bytes_read.total = 10
        for bar in (files, bytes_sent, bytes_read, bytes_read, bytes_sent, bytes_read):
            bar.update(3)
        raise AssertionError("the error of `progress` must end the download")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ModelError, match="enough"):
        resolve("owner/name", progress=progress)
    assert seen == [(3, 10), (6, 10)]


def test_list_and_remove(cache: Path) -> None:
    assert hub.cached_models() == []
    put_in_cache(cache, "b/good")
    put_in_cache(cache, "a/odd", architectures=["GemmaForCausalLM"])
    models = hub.cached_models()
    assert [(model.name, model.supported) for model in models] == [("a/odd", False), ("b/good", True)]
    assert "GemmaForCausalLM" in models[0].reason
    assert models[1].num_bytes > 0
    hub.remove("a/odd")
    assert [model.name for model in hub.cached_models()] == ["b/good"]
    with pytest.raises(ModelError, match=r"no cached model 'c/none'; cached: b/good"):
        hub.remove("c/none")
    shutil.rmtree(cache)
    assert hub.cached_models() == []
