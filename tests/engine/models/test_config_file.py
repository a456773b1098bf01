"""JSON files of a model folder with impossible values: the error is one printable line with file, key and value."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from pitlane.engine.errors import ModelError
from pitlane.engine.models.config_file import MAX_BYTES
from pitlane.engine.models.families.core import read_config
from pitlane.engine.models.registry import resolve
from pitlane.engine.models.source import ModelSource
from pitlane.engine.models.weights import RandomWeights, SafetensorsFolder
from pitlane.engine.text.tokenizer import Tokenizer
from tests.engine.models.test_config import LLAMA, read

NO_OBJECT = {
    "empty": b"",
    "cut": b'{"hidden_size": 64',
    "null": b"null",
    "list": b"[]",
    "number": b"3",
    "not a number": b"NaN",
    "comment": b"// a\n{}",
    "two objects": b"{} {}",
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "latin-1": '{"a": "é"}'.encode("latin-1"),
    "zeros": bytes(64),
    "deep": b"[" * 100_000,
    "many digits": b'{"hidden_size": ' + b"9" * 5000 + b"}",
}
NOT_A_SIZE: tuple[Any, ...] = (-1, 0, 16.0, 1.5, "16", True, [16], {"a": 1}, float("nan"), float("inf"), 10**400)
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
OPTIONAL_SIZES = ("num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window")
OTHER_VALUES: tuple[tuple[str, Any], ...] = (
    ("architectures", {"a": 1}),
    ("architectures", [1]),
    ("architectures", "LlamaForCausalLM"),
    ("rms_norm_eps", 10**400),
    ("rms_norm_eps", "1e-5"),
    ("rms_norm_eps", -1e-5),
    ("rms_norm_eps", None),
    ("tie_word_embeddings", "false"),
    ("tie_word_embeddings", 0),
    ("attention_bias", "no"),
    ("rope_theta", "far"),
    ("rope_theta", -10000.0),
    ("rope_theta", float("nan")),
    ("rope_scaling", []),
    ("rope_scaling", {"type": "linear", "factor": "4.0"}),
    ("rope_scaling", {"type": "linear", "factor": 0}),
    ("rope_scaling", {"type": "linear", "factor": float("inf")}),
    ("rope_scaling", {"type": 3, "factor": 2.0}),
    ("rope_scaling", {"type": "yarn", "factor": 4.0, "beta_fast": -1}),
    ("rope_scaling", {"type": "yarn", "factor": 4.0, "truncate": "no"}),
    ("rope_scaling", {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": "64"}),
    ("layer_types", "full_attention"),
    ("exit_layers", [1.5]),
    ("eos_token_id", "2"),
    ("eos_token_id", [2, None]),
    ("dtype", 16),
)


def refused(folder: Path) -> str:
    with pytest.raises(ModelError) as error:
        read_config(folder)
    message = str(error.value)
    assert message.isprintable() and len(message) < 500
    return message


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("content", NO_OBJECT.values(), ids=NO_OBJECT)
def test_files_that_hold_no_object(name: str, content: bytes, tmp_path: Path) -> None:
    read(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=rf"{name} (is damaged|holds .*, not an object).*; download the model again"):
        SafetensorsFolder(tmp_path) if "index" in name else read_config(tmp_path)


@pytest.mark.parametrize("content", NO_OBJECT.values(), ids=NO_OBJECT)
def test_a_tokenizer_config_that_holds_no_object(content: bytes, tmp_path: Path) -> None:
    bundled = resolve("bundled").folder
    assert bundled is not None
    shutil.copy(bundled / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    config = read(tmp_path)
    with pytest.raises(ModelError, match="no tokenizer in"):
        Tokenizer(ModelSource("m", config, RandomWeights(config), tmp_path))


@pytest.mark.parametrize("key", SIZES + OPTIONAL_SIZES)
def test_sizes_that_no_model_has(key: str, tmp_path: Path) -> None:
    for value in NOT_A_SIZE:
        (tmp_path / "config.json").write_text(json.dumps(LLAMA | {key: value}))
        assert f"config.json: {key} must be" in refused(tmp_path)


@pytest.mark.parametrize(("key", "value"), OTHER_VALUES)
def test_other_values_that_cannot_be(key: str, value: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {key: value}))
    message = refused(tmp_path)
    assert f"config.json: {key}" in message and "got " in message


def test_the_message_shows_a_piece_of_the_value(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"head_dim": "\x1b[31m\ud800" + "x" * 10**6}))
    assert "'\\x1b[31m\\ud800xxx" in refused(tmp_path)


def test_layers_without_end_are_refused_before_they_are_counted(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"num_hidden_layers": 10**8}))
    assert "num_hidden_layers must be less than or equal to 4096, got 100000000" in refused(tmp_path)


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(MAX_BYTES + 1)  # a sparse file takes no space
    assert "16,777,217 bytes" in refused(tmp_path)


@pytest.mark.parametrize("key", ["architectures", "layer_types", "no_rope_layers", "exit_layers", "eos_token_id"])
def test_a_list_without_end_is_refused_at_its_limit(key: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {key: [{}] * 100_000}))
    tracemalloc.start()
    message = refused(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert f"config.json: {key}" in message and peak < 60 * 2**20


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8-sig")
    assert read_config(tmp_path).vocab_size == 100


@pytest.mark.parametrize("ends", ["2", 2.0, True, -1, [[1]], {}, float("inf")])
def test_ends_of_text_that_are_no_tokens(ends: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"generation_config\.json: eos_token_id"):
        read(tmp_path, {"eos_token_id": ends})
