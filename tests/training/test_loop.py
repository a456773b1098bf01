"""The training loop: equal seeds, resumed runs, accumulation, the schedule, failures that leave the saved files intact."""

from __future__ import annotations

import json
import math
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pitlane.training import checkpoint, curve, loop
from pitlane.training.attention import NAME
from pitlane.training.corpus import Rows
from pitlane.training.errors import TrainingError
from pitlane.training.loop import (
    Progress,
    Report,
    Settings,
    Trainer,
    make_optimizers,
    rate_at,
    use_fast_attention,
)
from pitlane.training.losses import Batch, LabelLoss, Loss, hidden_states, logits_at, pick
from pitlane.training.models import read_model, write_model

SETTINGS = {"steps": 6, "rows": 4, "lr": 3e-3, "eval_every": 2, "save_every": 3}
MakeModel = Callable[..., PreTrainedModel]
MakeTrainer = Callable[..., Trainer]


def rows(number: int = 14, length: int = 24, seed: int = 2, weights: tuple[float, ...] = (1.0,)) -> Rows:
    """Rows that repeat a few tokens, so that a model can learn them."""
    rng = np.random.default_rng(seed)
    ids = 6 + (rng.integers(0, 40, (number, 1)) + np.arange(length)) % 50
    return Rows(ids.astype(np.int32), rng.choice(weights, (number, length)).astype(np.float32))


@pytest.fixture
def trainer(tiny: MakeModel, tokenizer_folder: Path, tmp_path: Path) -> MakeTrainer:
    def make(
        name: str = "run",
        *,
        seed: int = 0,
        loss: Loss | None = None,
        data: Rows | None = None,
        report: Report = lambda progress: None,
        **settings: Any,
    ) -> Trainer:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        export = partial(write_model, tokenizer_from=tokenizer_folder, folder=folder, dtype=torch.float32)
        chosen = Settings(**{**SETTINGS, **settings})
        return Trainer(tiny(seed), data or rows(), rows(3, seed=9), loss or LabelLoss(), chosen, folder, export, report)

    return make


def points(trainer: Trainer) -> list[dict[str, Any]]:
    return [{key: value for key, value in point.items() if key != "tokens_per_second"} for point in trainer.curve]


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in trainer.model.named_parameters()}


def assert_equal(first: Trainer, second: Trainer) -> None:
    assert points(first) == points(second)
    expected = weights(second)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(first).items())


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the loop catches it."""


def killed_after(steps: int) -> Report:
    def report(progress: Progress) -> None:
        if progress.step == steps:
            raise Killed

    return report


# ---- one run


def test_equal_seeds_give_equal_curves(trainer: MakeTrainer) -> None:
    runs = [trainer("a"), trainer("b"), trainer("c")]
    runs[2].settings = replace(runs[2].settings, seed=1)
    for run in runs:
        run.run()
    assert_equal(runs[0], runs[1])
    assert points(runs[0]) != points(runs[2])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_a_compiled_run_learns_the_same_and_resumes_without_compiling(trainer: MakeTrainer) -> None:
    plain, fused = trainer("a"), trainer("b", compile=True, report=killed_after(4))
    plain.run()
    with pytest.raises(Killed):
        fused.run()
    resumed = trainer("b")
    resumed.resume()
    resumed.run()
    assert resumed.curve[-1]["loss"] == pytest.approx(plain.curve[-1]["loss"], rel=0.02)
    assert resumed.curve[-1]["eval_loss"] == pytest.approx(plain.curve[-1]["eval_loss"], rel=0.02)
    assert list(resumed.model.state_dict()) == list(plain.model.state_dict())


def test_compiling_without_a_compiler_is_refused(trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(TrainingError, match=r"needs a C\+\+ compiler \(g\+\+"):
        trainer(compile=True)


def test_a_run_learns_and_says_what_it_did(trainer: MakeTrainer) -> None:
    seen: list[Progress] = []
    run = trainer(report=seen.append, steps=12, eval_every=5)
    last = run.run()
    assert [progress.step for progress in seen] == list(range(1, 13)) and seen[-1] == last
    assert [progress.step for progress in seen if progress.eval_loss is not None] == [5, 10, 12]
    assert seen[4].eval_loss is not None and last.eval_loss is not None and last.eval_loss < seen[4].eval_loss
    assert last.step_tokens == 4 * 24 and last.tokens_per_second > 0 and last.right is not None
    assert json.loads((run.folder / curve.FILE).read_text()) == run.curve
    assert not list(run.folder.glob("*.part"))


def test_evaluation_is_the_mean_by_weight_over_all_held_out_rows(trainer: MakeTrainer) -> None:
    run = trainer()
    run.held_out = rows(5, seed=4, weights=(0.0, 0.2, 1.0, 4.0))  # a batch of 4 rows and one of 1
    loss, right, focus_right = run.evaluate()
    batch = Batch(torch.from_numpy(run.held_out.ids).long(), torch.from_numpy(run.held_out.weights))
    picked = pick(batch)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = logits_at(run.model, hidden_states(run.model, batch.ids)[0], picked.places)
    losses = torch.nn.functional.cross_entropy(logits, picked.targets, reduction="none")
    hits = logits.argmax(-1) == picked.targets
    assert loss == pytest.approx(picked.mean(losses).item(), rel=1e-3)
    assert right == pytest.approx(hits[picked.weights >= 1].double().mean().item(), abs=0.02)
    assert focus_right == pytest.approx(hits[picked.weights == 4].double().mean().item(), abs=0.03)


def test_every_epoch_sees_every_row_once_in_another_order(trainer: MakeTrainer) -> None:
    run = trainer(rows=7)  # 14 rows: two batches per epoch
    epochs = [[run._batch(2 * epoch + half).ids[:, :2].tolist() for half in range(2)] for epoch in range(3)]
    flat = [first + second for first, second in epochs]
    everything = sorted(run.rows.ids[:, :2].tolist())
    assert all(sorted(epoch) == everything for epoch in flat)
    assert flat[0] != flat[1] != flat[2]


def test_steps_come_from_the_epochs(trainer: MakeTrainer) -> None:
    assert trainer(steps=None, epochs=2.0, rows=2, accumulate=2).steps == 7
    assert trainer(steps=None, epochs=0.01).steps == 1


@pytest.mark.parametrize(("step", "share"), [(0, 0.1), (4, 0.5), (9, 1.0), (10, 1.0), (55, 0.6), (99, 0.2002437)])
def test_the_rate_warms_up_and_falls_as_a_cosine(step: int, share: float) -> None:
    assert rate_at(step, 100, Settings(warmup=0.1, final_lr=0.2)) == pytest.approx(share, rel=1e-6)


def test_the_rate_of_a_single_step() -> None:
    assert rate_at(0, 1, Settings()) == 1.0


def test_decay_is_for_matrices_inside_the_layers(tiny: MakeModel) -> None:
    settings = Settings(lr=1e-3, embedding_lr=2e-4, weight_decay=0.5)
    for name, number in (("adamw", 1), ("muon", 2)):
        optimizers = make_optimizers(tiny(), replace(settings, optimizer=name))
        assert len(optimizers) == number
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for group in groups:
            inside = all(tensor.ndim == 2 and tensor.shape[0] != 300 for tensor in group["params"])
            assert (group["weight_decay"], group["peak"]) == ((0.5, 1e-3) if inside else (0.0, 2e-4))
        assert sum(len(group["params"]) for group in groups) == len(list(tiny().parameters()))
    with pytest.raises(TrainingError, match="no optimizer 'sgd'; choose adamw or muon"):
        make_optimizers(tiny(), Settings(optimizer="sgd"))


def test_a_sliding_window_is_left_to_pytorch(trainer: MakeTrainer, tiny: MakeModel) -> None:
    assert trainer().model.config._attn_implementation == NAME
    model = tiny()
    model.config.sliding_window = 8
    use_fast_attention(model)
    assert model.config._attn_implementation == "sdpa"


# ---- accumulation


@pytest.mark.parametrize("data", [rows(), rows(weights=(0.0, 0.0, 0.0, 1.0, 4.0))], ids=["all alike", "few answers"])
def test_accumulated_batches_have_the_gradient_of_one(trainer: MakeTrainer, data: Rows) -> None:
    """The loss is the weighted mean over the whole update, for any number of batches."""
    changes = []
    for number, size in ((1, 4), (2, 2), (4, 1)):
        run = trainer(f"run{number}", data=data, rows=size, accumulate=number, clip=1e9, steps=1, warmup=0)
        run.optimizers = [torch.optim.SGD([{"params": run.model.parameters(), "peak": 1.0}])]
        before = weights(run)
        last = run.run()
        change = torch.cat([(after - before[name]).flatten() for name, after in weights(run).items()])
        changes.append((change, last.loss))
    whole, loss = changes[0]
    for change, same_loss in changes[1:]:
        assert same_loss == pytest.approx(loss, rel=1e-3)
        assert (change - whole).norm() < 0.01 * whole.norm()  # bf16 products in another order


def test_batches_without_a_target_are_passed_over(trainer: MakeTrainer) -> None:
    data = rows()
    data.weights[:] = 0.0
    run = trainer(data=data, steps=2)
    before = weights(run)
    assert run.run().loss == 0.0
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(run).items())


def test_gradients_are_clipped(trainer: MakeTrainer) -> None:
    run = trainer(steps=1, clip=0.01, warmup=0)
    run.optimizers = [torch.optim.SGD([{"params": run.model.parameters(), "peak": 1.0}])]
    before = weights(run)
    run.run()
    change = torch.cat([(after - before[name]).flatten() for name, after in weights(run).items()])
    assert change.norm() == pytest.approx(0.01, rel=1e-3)


# ---- going on


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_killed_run_goes_on_bit_for_bit(trainer: MakeTrainer, optimizer: str) -> None:
    whole = trainer("whole", optimizer=optimizer)
    whole.run()
    killed = trainer("killed", optimizer=optimizer, report=killed_after(5))
    with pytest.raises(Killed):
        killed.run()
    resumed = trainer(
        "killed", optimizer=optimizer, seed=7, save_every=2
    )  # the start weights differ and must not matter
    resumed.resume()
    assert resumed.step == 3
    resumed.run()
    assert_equal(whole, resumed)
    assert torch.equal(read_model(whole.folder).lm_head.weight, read_model(resumed.folder).lm_head.weight)


def test_a_resumed_run_keeps_the_dtype_of_its_products(trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` measures the speed of the products, and a second measurement may differ."""
    speeds = iter(["bfloat16", "bfloat16", "float32"])
    monkeypatch.setattr(loop, "_faster_products", lambda: next(speeds))
    whole, killed = trainer("whole"), trainer("killed", report=killed_after(5))
    whole.run()
    with pytest.raises(Killed):
        killed.run()
    resumed = trainer("killed")
    resumed.resume()
    resumed.run()
    assert_equal(whole, resumed)
    other = trainer("other")
    other.run()
    assert points(other) != points(whole)


def test_products_are_measured_once_per_process() -> None:
    loop._faster_products.cache_clear()
    assert loop._faster_products() in loop.PRODUCTS
    loop._faster_products()
    assert loop._faster_products.cache_info().misses == 1


def test_a_run_that_is_over_says_so(trainer: MakeTrainer) -> None:
    trainer().run()
    again = trainer()
    again.resume()
    with pytest.raises(TrainingError, match="all 6 steps are done"):
        again.run()


def test_other_settings_are_refused(trainer: MakeTrainer) -> None:
    trainer().run()
    with pytest.raises(TrainingError, match=r"other settings \(rows, lr\); resume with the same"):
        trainer(rows=2, lr=1e-4).resume()


def test_nothing_to_resume(trainer: MakeTrainer) -> None:
    with pytest.raises(TrainingError, match="nothing to resume"):
        trainer().resume()


def test_the_state_of_another_model_is_refused(trainer: MakeTrainer, tiny: MakeModel) -> None:
    run = trainer()
    run.run()
    with pytest.raises(TrainingError, match=r"another model: model\.embed_tokens\.weight differs"):
        checkpoint.load(run.folder, tiny(hidden_size=64), [])


def test_a_broken_state_is_named(trainer: MakeTrainer) -> None:
    run = trainer()
    run.run()
    path = run.folder / checkpoint.FILE
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(TrainingError, match="cannot read .*training_state"):
        trainer().resume()


# ---- failures


class FailsAt:
    """A label loss that is multiplied by a factor at a step."""

    def __init__(self, step: int, spoil: Callable[[Tensor], Tensor]) -> None:
        self.step, self.spoil = step, spoil

    def __call__(self, model: PreTrainedModel, batch: Batch, step: int) -> Tensor:
        loss = LabelLoss()(model, batch, step)
        return self.spoil(loss) if step == self.step else loss


def saved(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != curve.FILE}


@pytest.mark.parametrize(
    "spoil",
    [lambda loss: loss * math.nan, lambda loss: loss * math.inf, lambda loss: loss + (loss * 0).sqrt()],
    ids=["loss nan", "loss inf", "gradient nan"],
)
def test_nan_stops_the_run_and_leaves_the_last_state(trainer: MakeTrainer, spoil: Callable[[Tensor], Tensor]) -> None:
    run = trainer(loss=FailsAt(3, spoil), save_every=1, report=killed_after(4))  # index 3 is the fourth step
    with pytest.raises(
        TrainingError, match=r"at step 4; the last saved state and model are intact: lower --lr \(0\.003\)"
    ):
        run.run()
    assert all(tensor.isfinite().all() for tensor in read_model(run.folder).parameters())
    resumed, whole = trainer(save_every=1), trainer("whole", save_every=1)
    resumed.resume()
    assert resumed.step == 3
    resumed.run()
    whole.run()
    assert_equal(resumed, whole)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """A full disk: writes to a single file fail."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("what", ["state", "model"])
def test_a_full_disk_leaves_the_last_state(trainer: MakeTrainer, what: str) -> None:
    run = trainer(save_every=1, steps=1)
    run.run()
    before = saved(run.folder)
    sizes = {"state": len(before[checkpoint.FILE]), "model": len(before["model.safetensors"])}
    assert sizes["model"] < sizes["state"]
    with (
        largest_file(sizes[what] // 2),
        pytest.raises(TrainingError, match=f"cannot write the .*{what}.* to .*(large|space|I/O|size)"),
    ):
        run.save() if what == "state" else run.export(run.model)
    assert saved(run.folder) == before
    assert torch.equal(read_model(run.folder).lm_head.weight, run.model.lm_head.weight)


def test_a_curve_that_cannot_be_written_is_named(trainer: MakeTrainer) -> None:
    run = trainer(steps=1)
    run.run()
    with largest_file(4), pytest.raises(TrainingError, match=r"cannot write .*loss_curve\.json"):
        curve.write(run.curve, run.folder)
    assert json.loads((run.folder / curve.FILE).read_text()) == run.curve
    with largest_file(4), pytest.raises(TrainingError, match=r"cannot write .*loss_curve\.png"):
        curve.draw(run.curve, run.folder)


def test_the_curve_is_drawn(trainer: MakeTrainer) -> None:
    run = trainer(steps=3)
    run.run()
    curve.draw(run.curve, run.folder)
    assert (run.folder / curve.PICTURE).read_bytes().startswith(b"\x89PNG")
