"""Models to train: taken from a teacher's layers, written without half-written files, refused with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pitlane.training import models
from pitlane.training.errors import TrainingError
from pitlane.training.models import (
    FAMILIES,
    Shape,
    check_same_tokenizer,
    read_model,
    read_tokenizer,
    take_layers,
    write_model,
)
from pitlane.training.tokenizer import save_tokenizer, train_tokenizer

MakeModel = Callable[..., PreTrainedModel]
Write = Callable[..., Path]
IDS = torch.arange(6, 46).view(2, 20)


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(IDS).logits
    return logits


def family(name: str, **changes: Any) -> PreTrainedModel:
    config = AutoConfig.for_model(
        name, vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, pad_token_id=2, bos_token_id=0, eos_token_id=1, **changes,
    )  # fmt: skip
    torch.manual_seed(1)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def test_a_student_has_the_weights_of_the_layers_named(tiny: MakeModel) -> None:
    teacher = tiny(num_layers=4)
    student = take_layers(teacher, [3, 0])
    assert student.config.num_hidden_layers == 2 and teacher.config.num_hidden_layers == 4
    for place, layer in enumerate((3, 0)):
        expected = teacher.model.layers[layer].state_dict()
        taken = student.model.layers[place].state_dict()
        assert all(torch.equal(taken[name], tensor) for name, tensor in expected.items())
    assert torch.equal(student.get_input_embeddings().weight, teacher.get_input_embeddings().weight)
    assert student.get_output_embeddings().weight is student.get_input_embeddings().weight
    student.get_input_embeddings().weight.data.zero_()
    assert teacher.get_input_embeddings().weight.any()


def test_a_model_grown_by_repeating_layers_computes_the_same(tiny: MakeModel) -> None:
    teacher = tiny(num_layers=3)
    grown = take_layers(teacher, [0, 1, 1, 2, 2, 2])
    assert grown.config.num_hidden_layers == 6
    assert torch.equal(logits(grown), logits(teacher))
    assert not torch.equal(logits(take_layers(teacher, [0, 2])), logits(teacher))


def test_layers_of_gemma_take_their_windows_with_them() -> None:
    teacher = family("gemma3_text", sliding_window=4, sliding_window_pattern=3)
    student = take_layers(teacher, [2, 3])
    assert student.config.layer_types == ["full_attention", "sliding_attention"]
    assert torch.equal(logits(take_layers(teacher, [0, 1, 2, 2, 3, 4, 5])), logits(teacher)), (
        "output norms keep it silent"
    )


def test_layers_take_their_kind_with_them() -> None:
    """SmolLM3 has no RoPE in every fourth layer."""
    teacher = family("smollm3")
    assert teacher.config.no_rope_layers == [1, 1, 1, 0, 1, 1]
    student = take_layers(teacher, [3, 5])
    assert [layer.self_attn.use_rope for layer in student.model.layers] == [0, 1]
    assert len(student.config.layer_types) == 2
    grown = take_layers(teacher, [0, 1, 2, 3, 3, 4, 5])
    assert torch.equal(logits(grown), logits(teacher))


@pytest.mark.parametrize("layers", [[], [4], [-1], [0, 9]], ids=str)
def test_layers_that_are_not_there(tiny: MakeModel, layers: list[int]) -> None:
    with pytest.raises(TrainingError, match="layers 0 to 1"):
        take_layers(tiny(num_layers=2), layers)


def test_a_shape_that_makes_no_heads() -> None:
    with pytest.raises(TrainingError, match="choose a multiple of 128"):
        Shape(hidden_size=200)


# ---- files


def test_what_is_written_reads_back(tiny: MakeModel, written: Write) -> None:
    model = tiny(5)
    folder = written(model)
    assert torch.equal(logits(read_model(folder)), logits(model))
    assert read_tokenizer(folder).get_vocab() and read_tokenizer(folder).chat_template
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".") or path.is_dir()]
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"


def test_the_dtype_is_that_asked_for(tiny: MakeModel, tokenizer_folder: Path, tmp_path: Path) -> None:
    model = tiny()
    write_model(model, tokenizer_folder, tmp_path / "half", torch.bfloat16)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto").dtype == torch.bfloat16
    assert model.dtype == torch.float32


def test_the_model_before_stands_until_the_next_is_whole(
    tiny: MakeModel, written: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = written(tiny(1))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(self: PreTrainedModel, part: Path) -> None:
        (part / "model.safetensors").write_bytes(b"half of")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", fail)
    with pytest.raises(TrainingError, match="No space left.*untouched"):
        written(tiny(2))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_weights_are_replaced_last(tiny: MakeModel, written: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[str] = []
    replace = models.os.replace
    monkeypatch.setattr(models.os, "replace", lambda a, b: (moved.append(Path(b).name), replace(a, b)))
    written(tiny())
    assert moved[-1] == "model.safetensors" and {"config.json", "tokenizer.json"} <= set(moved[:-1])


@pytest.mark.parametrize("name", FAMILIES)
def test_families_are_read(name: str, written: Write) -> None:
    model = family(name)
    assert torch.allclose(logits(read_model(written(model))), logits(model), atol=1e-6)


def test_other_families_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(TrainingError, match="'mamba' model; trained are llama, mistral"):
        read_model(tmp_path)


def test_broken_weights_are_named(tiny: MakeModel, written: Write) -> None:
    folder = written(tiny())
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(TrainingError, match="cannot read the model in"):
        read_model(folder)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000], ids=lambda content: content[:4]
)
@pytest.mark.parametrize(
    ("name", "read"),
    [("config.json", read_model), ("tokenizer_config.json", read_tokenizer)],
    ids=["config", "tokenizer"],
)
def test_a_damaged_file_is_named(
    name: str, read: Callable[[Path], Any], content: bytes, tiny: MakeModel, written: Write
) -> None:
    folder = written(tiny())
    (folder / name).write_bytes(content)
    with pytest.raises(TrainingError, match="cannot read ") as error:
        read(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_a_config_that_the_weights_do_not_fit_is_named(tiny: MakeModel, written: Write) -> None:
    folder = written(tiny())
    raw = json.loads((folder / "config.json").read_text())
    for changes in ({"vocab_size": 299}, {"hidden_size": "many"}, {"num_attention_heads": 0}):
        (folder / "config.json").write_text(json.dumps(raw | changes))
        with pytest.raises(TrainingError, match="cannot read the model in"):
            read_model(folder)


@pytest.mark.parametrize("read", [read_model, read_tokenizer])
def test_a_folder_without_a_model(read: Callable[[Path], Any], tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="give the folder of a model"):
        read(tmp_path / "nowhere")


# ---- tokenizers of a pair


def test_a_pair_with_one_tokenizer_passes(tokenizer_folder: Path) -> None:
    check_same_tokenizer(tokenizer_folder, tokenizer_folder)


def test_other_tokenizers_are_refused_with_a_token_that_differs(tokenizer_folder: Path, tmp_path: Path) -> None:
    save_tokenizer(train_tokenizer(["quite other words"] * 9, 280), tmp_path, 512)
    with pytest.raises(
        TrainingError, match=r"teacher \(300 tokens\) and student \(\d+ tokens\) have different tokenizers.*such as '"
    ):
        check_same_tokenizer(tokenizer_folder, tmp_path)


def test_the_same_tokens_in_another_order_are_refused(tokenizer_folder: Path, tmp_path: Path) -> None:
    document = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    vocabulary = document["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    (tmp_path / "tokenizer_config.json").write_text((tokenizer_folder / "tokenizer_config.json").read_text())
    with pytest.raises(TrainingError, match="2 tokens differ, such as 'a'"):
        check_same_tokenizer(tokenizer_folder, tmp_path)
