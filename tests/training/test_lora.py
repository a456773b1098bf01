"""Training of adapters: only A and B move, a run resumes bit for bit, PEFT and the plugin read what is written, and the reverse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pitlane import BuildContext
from pitlane.engine.models.builder import Builder
from pitlane.engine.models.decoder import Decoder, parts_of
from pitlane.engine.models.registry import resolve
from pitlane.engine.models.weight_plan import WeightPlan
from pitlane.plugins.lora import Lora
from pitlane.training import checkpoint, loop
from pitlane.training.errors import TrainingError
from pitlane.training.loop import Progress, Settings, make_optimizers
from pitlane.training.lora import CONFIG, TARGETS, WEIGHTS, Adapter, LowRank, add_adapter, train_adapter
from pitlane.training.models import read_model
from pitlane.training.train import Data, Output
from tests.engine.models.harness import CPU, Harness

MakeModel = Callable[..., PreTrainedModel]
Write = Callable[..., Path]
IDS = list(range(6, 46))


@pytest.fixture
def data(tmp_path: Path, make_text: Callable[..., str]) -> Data:
    chats = tmp_path / "chats.jsonl"
    with chats.open("w") as lines:
        for number in range(24):
            messages = [
                {"role": "user", "content": make_text(30, number).strip()},
                {"role": "assistant", "content": f"The harbour was closed in {1800 + number}."},
            ]
            lines.write(json.dumps({"messages": messages}) + "\n")
    return Data([chats], length=32)


@pytest.fixture
def train(tiny: MakeModel, written: Write, data: Data, tmp_path: Path) -> Callable[..., Progress]:
    base = written(tiny(3), "base")

    def run(
        name: str = "adapter",
        adapter: Adapter = Adapter(rank=4, alpha=8),  # noqa: B008
        report: Callable[[Progress], None] = lambda progress: None,
        resume: bool = False,
        dtype: str = "float32",
        model_name: str = "some/base",
        start: Path = base,
        **settings: Any,
    ) -> Progress:
        chosen = Settings(**{"steps": 4, "rows": 4, "lr": 1e-2, "eval_every": 2, "save_every": 2, **settings})
        output = Output(tmp_path / name, dtype, resume=resume)
        return train_adapter(model_name, start, data, adapter, chosen, output, report)

    return run


def tensors(folder: Path) -> dict[str, Tensor]:
    saved: dict[str, Tensor] = load_file(folder / WEIGHTS)
    return saved


def served(model: Path, adapter: Path | None) -> Tensor:
    """Logits of the engine's decoder in float32, with an adapter in the weights."""
    source = resolve(str(model))
    context = BuildContext(source.config, torch.float32, CPU, source.stored_name)
    lora = Lora(Lora.Options(adapter=str(adapter))) if adapter else None
    assert lora is None or lora.refusal(context) is None

    def transform(part: Any, stored: Any) -> Any:
        return (lora.transform_weights(part, stored, context) if lora else None) or stored

    plan = WeightPlan.of(parts_of(source.config), context, is_transformed=True)
    with torch.inference_mode():
        decoder = Decoder(
            source.config, Builder(plan, source.weights, torch.float32, CPU, transform, source.stored_name)
        )
    return Harness(decoder).run({0: IDS}).clone()


def test_only_the_adapter_is_trained(tiny: MakeModel) -> None:
    model = tiny()
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    ids = torch.tensor([IDS])
    plain = model(ids).logits
    add_adapter(model, Adapter(rank=4, targets=("q", "down")), seed=0)
    names = [name for name, _ in checkpoint.trained(model)]
    ends = ("self_attn.q_proj.lora_A", "self_attn.q_proj.lora_B", "mlp.down_proj.lora_A", "mlp.down_proj.lora_B")
    assert names == [f"model.layers.{layer}.{end}" for layer in range(2) for end in ends]
    assert all(parameter.dtype == torch.float32 for _, parameter in checkpoint.trained(model))
    (optimizer,) = make_optimizers(model, Settings())
    assert [len(group["params"]) for group in optimizer.param_groups] == [8]
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(ids).logits.float(), plain, atol=0.05, rtol=0)
        model(ids).logits.square().mean().backward()
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    for name, tensor in model.named_parameters():
        if name in names:
            assert tensor.any(), "B started at zero"
        else:
            old = before[name.replace(".linear.", ".")]
            assert torch.equal(tensor, old.to(tensor.dtype)), "the frozen weights stay, rounded at most"


def test_a_linear_with_an_adapter_is_the_linear_of_the_sum() -> None:
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(12, 7), torch.randn(5, 12)
    module = LowRank(linear, Adapter(rank=3, alpha=6), torch.Generator().manual_seed(1))
    assert torch.equal(module(x), linear(x)), "B starts at zero"
    with torch.no_grad():
        module.lora_B.normal_()
    total = linear.weight + 2 * module.lora_B @ module.lora_A
    torch.testing.assert_close(module(x), torch.nn.functional.linear(x, total, linear.bias), atol=1e-5, rtol=0)
    assert float(module.lora_A.detach().abs().max()) <= 12**-0.5


def test_equal_seeds_start_equal(tiny: MakeModel) -> None:
    models = [tiny() for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        add_adapter(model, Adapter(), seed)
    first, same, other = ([p.detach() for _, p in checkpoint.trained(model)] for model in models)
    assert all(map(torch.equal, first, same)) and not torch.equal(first[0], other[0])


def test_a_run_writes_an_adapter_that_the_plugin_serves(
    train: Callable[..., Progress], tmp_path: Path, tiny: MakeModel
) -> None:
    reports: list[Progress] = []
    last = train(report=reports.append, steps=8)
    assert last.eval_loss is not None and reports[1].eval_loss is not None and last.eval_loss < reports[1].eval_loss
    folder = tmp_path / "adapter"
    assert {path.name for path in folder.iterdir()} == {
        CONFIG, WEIGHTS, checkpoint.FILE, "loss_curve.json", "loss_curve.png",
    }  # fmt: skip
    config = json.loads((folder / CONFIG).read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8)
    assert config["base_model_name_or_path"] == "some/base" and config["target_modules"] == list(TARGETS.values())
    saved = tensors(folder)
    assert len(saved) == 2 * 2 * len(TARGETS) and all(tensor.dtype == torch.float32 for tensor in saved.values())
    assert saved["base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"].shape == (4, 32)
    state = load_file(folder / checkpoint.FILE)
    weights = [name for name in state if name.startswith("model.")]
    assert len(weights) == len(saved), "the frozen model is not in the state"
    trained = read_model(tmp_path / "base")
    add_adapter(trained, Adapter(rank=4, alpha=8), seed=0)
    checkpoint.load(folder, trained, [])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = trained.eval()(torch.tensor([IDS])).logits[0].float()
    with_adapter, without = served(tmp_path / "base", folder), served(tmp_path / "base", None)
    difference = float((with_adapter - expected).abs().max())
    assert difference < 0.1 * float((with_adapter - without).abs().max()), "up to the rounding of bfloat16"


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_killed_run_goes_on_bit_for_bit(
    train: Callable[..., Progress], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    """Also if the second process measures that other products are faster."""
    speeds = iter(["bfloat16", "bfloat16", "float32"])
    monkeypatch.setattr(loop, "_faster_products", lambda: next(speeds))

    class Killed(BaseException):
        pass

    def kill(progress: Progress) -> None:
        if progress.step == 3:
            raise Killed

    whole = train("whole", optimizer=optimizer)
    with pytest.raises(Killed):
        train("killed", optimizer=optimizer, report=kill)
    resumed = train("killed", optimizer=optimizer, resume=True, save_every=1)
    assert resumed.loss == whole.loss and resumed.eval_loss == whole.eval_loss
    expected = tensors(tmp_path / "whole")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors(tmp_path / "killed").items())


def test_layers_computed_twice_learn_the_same(train: Callable[..., Progress], tmp_path: Path) -> None:
    plain, twice = train("plain"), train("twice", recompute=True)
    assert twice.eval_loss == pytest.approx(plain.eval_loss, rel=1e-3)
    for name, tensor in tensors(tmp_path / "twice").items():
        torch.testing.assert_close(tensor, tensors(tmp_path / "plain")[name], atol=5e-3, rtol=0)


def test_another_adapter_is_not_resumed(train: Callable[..., Progress], tmp_path: Path) -> None:
    train()
    with pytest.raises(TrainingError, match="holds a run; go on with --resume"):
        train()
    with pytest.raises(TrainingError, match=r"other settings \(lora_alpha\); go on with the same"):
        train(resume=True, adapter=Adapter(4, 9))
    with pytest.raises(TrainingError, match=r"other settings \(r, target_modules\)"):
        train(resume=True, adapter=Adapter(8, 8, ("q",)))
    with pytest.raises(TrainingError, match=r"other settings \(base_model_name_or_path\)"):
        train(resume=True, model_name="another/base")
    with pytest.raises(TrainingError, match="all 4 steps are done"):
        train(resume=True)
    (tmp_path / "adapter" / checkpoint.FILE).unlink()
    with pytest.raises(TrainingError, match="holds an adapter; choose another --out"):
        train()


def test_adapters_that_cannot_be(tiny: MakeModel) -> None:
    with pytest.raises(TrainingError, match="no linear 'x, y'; targets are all, or some of q,k,v,o,gate,up,down"):
        Adapter(targets=("q", "x", "y"))
    with pytest.raises(TrainingError, match="no linear"):
        Adapter(targets=())
    with pytest.raises(TrainingError, match="must be >= 1, got 0"):
        Adapter(rank=0)
    model = tiny()
    del model.model.layers[0].mlp.gate_proj, model.model.layers[1].mlp.gate_proj
    with pytest.raises(TrainingError, match="no linears gate_proj; choose other --targets"):
        add_adapter(model, Adapter(), 0)


# ---- PEFT


def family(name: str) -> PreTrainedModel:
    config = AutoConfig.for_model(
        name, vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, pad_token_id=2, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(1)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


@pytest.fixture
def peft() -> Any:
    return pytest.importorskip("peft", reason="pip install peft")


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model.eval()(torch.tensor([IDS])).logits[0].float()
    return out


@pytest.mark.filterwarnings("ignore")  # of PEFT and of transformers that it calls
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3_text"])
def test_peft_reads_what_training_writes(
    peft: Any, train: Callable[..., Progress], written: Write, tmp_path: Path, name: str
) -> None:
    base = written(family(name), name)
    train(start=base, lr=5e-2)
    adapter = tmp_path / "adapter"
    loaded = peft.PeftModel.from_pretrained(read_model(base), adapter)
    expected = logits(loaded)
    assert (expected - logits(read_model(base))).abs().max() > 1e-2, "the adapter does something"
    torch.testing.assert_close(served(base, adapter), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": "all-linear", "use_rslora": True},
        {
            "target_modules": ["q_proj", "k_proj", "down_proj"],
            "rank_pattern": {"k_proj": 2, r"layers\.1\.mlp\.down_proj": 6},
            "alpha_pattern": {"k_proj": 5, "0.self_attn.q_proj": 1},
        },
    ],
    ids=["two targets", "rsLoRA", "patterns"],
)
def test_the_plugin_reads_what_peft_writes(
    peft: Any, written: Write, tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    base = written(family(name), name)
    config = peft.LoraConfig(r=4, lora_alpha=12, task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(read_model(base), config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                parameter.normal_(std=0.05)
    model.save_pretrained(tmp_path / "peft")
    expected = logits(model)
    assert (expected - logits(read_model(base))).abs().max() > 1e-2
    torch.testing.assert_close(served(base, tmp_path / "peft"), expected, atol=1e-5, rtol=1e-5)
