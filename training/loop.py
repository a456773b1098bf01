"""The training loop: batches, gradients, the schedule of rates, evaluations, checkpoints and the loss curve.

Batches and rates depend on seed and step alone, so that a resumed run repeats an uninterrupted run. Knows nothing of data
files or of the command line.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel as Model

from pitlane.training import attention, checkpoint, curve
from pitlane.training.corpus import Rows
from pitlane.training.errors import TrainingError
from pitlane.training.losses import Batch, Loss, hidden_states, logits_at, pick

PRODUCTS = {"bfloat16": torch.bfloat16, "float32": torch.float32}
COMPILERS = ("g++", "c++", "clang++")
FIXED = ("steps", "step_tokens")  # the same in every report, so not in the curve
MAY_CHANGE = ("eval_every", "save_every", "compile", "recompute", "products")  # a resumed run may change these settings


@dataclass(frozen=True, slots=True)
class Settings:
    """How to train.

    steps: updates of rows x accumulate rows each; None: as many as `epochs` need. embedding_lr: rate of embeddings and norms;
    None: `lr`. warmup: share of the steps. final_lr: share of the peak rate at the end. compile: fuse forward and backward; takes
    a minute at the start, needs a C++ compiler, and changes only the rounding. recompute: keep no activations of a layer for the
    backward pass; compute the layer again there, which takes less memory and more time. products: dtype of the products, `auto`,
    `bfloat16` or `float32`; `auto` takes the faster dtype of the device (some CPUs multiply bfloat16 slower than float32), and a
    resumed run keeps its dtype. qat:
    int3, int4 or int8: train with rounded weights (qat.py); qat_group_size: inputs that share a scale with int3 and int4.
    """

    steps: int | None = None
    epochs: float = 1.0
    rows: int = 16
    accumulate: int = 1
    lr: float = 1e-3
    embedding_lr: float | None = None
    final_lr: float = 0.1
    warmup: float = 0.03
    optimizer: str = "adamw"
    weight_decay: float = 0.01
    clip: float = 1.0
    seed: int = 0
    eval_every: int = 100
    save_every: int = 200
    compile: bool = False
    recompute: bool = False
    products: str = "auto"
    qat: str | None = None
    qat_group_size: int = 64


@dataclass(frozen=True, slots=True)
class Progress:
    """A report on one step. Losses are in nats per token.

    right: share of the held-out answer tokens that are the model's first choice; focus_right: the same for tokens of foci.
    """

    step: int
    steps: int
    loss: float
    lr: float
    tokens_per_second: float
    step_tokens: int
    eval_loss: float | None = None
    right: float | None = None
    focus_right: float | None = None


Report = Callable[[Progress], None]


def settled(settings: Settings, device: torch.device, folder: Path) -> Settings:
    """Name the dtype of the products: for `auto` the dtype of the saved run in the folder, or else the faster dtype."""
    if settings.products != "auto":
        return settings
    if (folder / checkpoint.FILE).is_file():
        saved = checkpoint.progress_in(folder)["settings"].get("products")
        if saved in PRODUCTS:
            return replace(settings, products=saved)
    return replace(settings, products="bfloat16" if device.type != "cpu" else _faster_products())


@cache
def _faster_products() -> str:
    """Multiply 512 x 512 x 512 in both dtypes in turn, so that other processes slow down both. Measures once per process."""
    seconds: dict[str, list[float]] = {name: [] for name in PRODUCTS}
    with torch.no_grad():
        for _ in range(6):
            for name, dtype in PRODUCTS.items():
                x, started = torch.ones(512, 512, dtype=dtype), time.perf_counter()
                torch.nn.functional.linear(x, x)
                seconds[name].append(time.perf_counter() - started)
    return min(seconds, key=lambda name: min(seconds[name]))


def make_optimizers(model: Model, settings: Settings) -> list[torch.optim.Optimizer]:
    """Make AdamW for all trained weights, or Muon for the matrices inside the layers and AdamW for embeddings and norms."""
    named = checkpoint.trained(model)
    matrices = [tensor for name, tensor in named if tensor.ndim == 2 and ".layers." in name]
    outer = [tensor for name, tensor in named if tensor.ndim == 2 and ".layers." not in name]
    vectors = [tensor for _, tensor in named if tensor.ndim != 2]
    outer_rate = settings.embedding_lr or settings.lr
    groups: list[dict[str, Any]] = [
        {"params": outer, "peak": outer_rate, "weight_decay": 0.0},
        {"params": vectors, "peak": outer_rate, "weight_decay": 0.0},
    ]
    if settings.optimizer == "adamw":
        groups.insert(0, {"params": matrices, "peak": settings.lr, "weight_decay": settings.weight_decay})
    groups = [group for group in groups if group["params"]]
    if settings.optimizer == "adamw":
        return [torch.optim.AdamW(groups, betas=(0.9, 0.95))]
    if settings.optimizer != "muon":
        raise TrainingError(f"no optimizer {settings.optimizer!r}; choose adamw or muon")
    muon = torch.optim.Muon(matrices, weight_decay=settings.weight_decay, adjust_lr_fn="match_rms_adamw")
    muon.param_groups[0]["peak"] = settings.lr
    return [muon, torch.optim.AdamW(groups, betas=(0.9, 0.95))] if groups else [muon]


def rate_at(step: int, steps: int, settings: Settings) -> float:
    """Return the rate of a step as a share of the peak: a linear warm-up, then a cosine down to `final_lr`."""
    warm = max(1, round(steps * settings.warmup))
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    return settings.final_lr + (1 - settings.final_lr) * 0.5 * (1 + math.cos(math.pi * done))


class Trainer:
    """Trains a model on rows with a loss; writes state and curve to a folder.

    export: called with the model after each saved state.
    """

    def __init__(
        self,
        model: Model,
        rows: Rows,
        held_out: Rows,
        loss: Loss,
        settings: Settings,
        folder: Path,
        export: Callable[[Model], None],
        report: Report,
    ) -> None:
        self.device = next(model.parameters()).device
        self.update_rows = settings.rows * settings.accumulate
        self.steps = settings.steps or max(1, round(settings.epochs * len(rows) / self.update_rows))
        self.model, self.rows, self.held_out = model, rows, held_out
        self.loss, self.settings, self.folder = loss, settled(settings, self.device, folder), folder
        self.export, self.report = export, report
        self.optimizers = make_optimizers(model, settings)
        self.products = PRODUCTS[self.settings.products]
        self.step = 0
        self.curve: list[dict[str, Any]] = []
        use_fast_attention(model)
        if settings.recompute:
            # The name of transformers 6; early versions of transformers 5 know only the older name.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        if settings.compile:
            self._compile()

    def _compile(self) -> None:
        if self.device.type == "cpu" and not any(map(shutil.which, COMPILERS)):
            raise TrainingError(f"--compile needs a C++ compiler ({', '.join(COMPILERS)}); install one or leave it out")
        self.model.base_model.compile(dynamic=False)

    def resume(self) -> None:
        """Go on from the state in the folder."""
        progress = checkpoint.load(self.folder, self.model, self.optimizers)
        now = asdict(self.settings)
        before = now | progress["settings"] | {key: now[key] for key in MAY_CHANGE}
        if before != now:
            changed = [key for key in now if before[key] != now[key]]
            raise TrainingError(
                f"the run in {self.folder} has other settings ({', '.join(changed)}); resume with the same"
            )
        self.step, self.curve = progress["step"], progress["curve"]

    def run(self) -> Progress:
        """Train to the last step and return its report. If `report` raises KeyboardInterrupt, save the state and raise it again."""
        settings, last = self.settings, None
        tokens = self.update_rows * self.rows.ids.shape[1]
        started, first = time.monotonic(), self.step
        self.model.train()
        while self.step < self.steps:
            rate = rate_at(self.step, self.steps, settings)
            loss = self._train_step(rate)
            self.step += 1
            speed = (self.step - first) * tokens / (time.monotonic() - started)
            ended = self.step == self.steps
            with torch.compiler.set_stance("force_eager"):  # held-out batches have other shapes
                evaluated = self.evaluate() if ended or self.step % settings.eval_every == 0 else ()
            last = Progress(self.step, self.steps, loss, rate * settings.lr, speed, tokens, *evaluated)
            self.curve.append(
                {key: value for key, value in asdict(last).items() if value is not None and key not in FIXED}
            )
            try:
                self.report(last)
            except KeyboardInterrupt:  # weights and optimizers are at the same step here
                self.save()
                raise
            if ended or self.step % settings.save_every == 0:
                self.save()
        if last is None:
            raise TrainingError(
                f"the run in {self.folder} is over: all {self.steps} steps are done; choose another --out"
            )
        return last

    def save(self) -> None:
        """Write state, curve and model."""
        progress = {"step": self.step, "curve": self.curve, "settings": asdict(self.settings)}
        checkpoint.save(self.folder, self.model, self.optimizers, progress)
        self.export(self.model)
        curve.write(self.curve, self.folder)

    def _batch(self, number: int) -> Batch:
        """Return micro-batch `number` of the run. Every epoch has its own order of the rows."""
        size, count = self.settings.rows, len(self.rows)
        indices = []
        for place in range(number * size, (number + 1) * size):
            epoch, index = divmod(place, count)
            indices.append(self._order(epoch)[index])
        return self._on_device(self.rows, np.array(indices))

    def _order(self, epoch: int) -> Any:
        if getattr(self, "_epoch", None) != epoch:
            self._epoch = epoch
            self._permutation = np.random.default_rng((self.settings.seed, epoch)).permutation(len(self.rows))
        return self._permutation

    def _on_device(self, rows: Rows, indices: Any) -> Batch:
        ids, weights = torch.from_numpy(rows.ids[indices]).long(), torch.from_numpy(rows.weights[indices])
        return Batch(ids.to(self.device), weights.to(self.device))

    def _train_step(self, rate: float) -> float:
        settings, total = self.settings, 0.0
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate
        first = self.step * settings.accumulate
        batches = [self._batch(number) for number in range(first, first + settings.accumulate)]
        weights = [float(batch.weights[:, 1:].sum()) for batch in batches]
        for batch, weight in zip(batches, weights, strict=True):
            if not weight:
                continue
            with self._autocast():
                loss = self.loss(self.model, batch, self.step) * (weight / sum(weights))
            loss.backward()
            total += loss.item()
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip))
        if not math.isfinite(total + norm):
            raise TrainingError(
                f"the loss became {total} and its gradient {norm} at step {self.step + 1}; the last saved state and model are "
                f"intact: lower --lr ({settings.lr:g}) and start again, or look at the data"
            )
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return total

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.products, enabled=self.products != torch.float32)

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float, float | None]:
        """Return, on the held-out rows, the loss and the shares of right tokens in answers (weight >= 1) and foci (weight > 1)."""
        sums = torch.zeros(6, dtype=torch.float64)
        self.model.eval()
        for first in range(0, len(self.held_out), self.settings.rows):
            batch = self._on_device(
                self.held_out, np.arange(first, min(first + self.settings.rows, len(self.held_out)))
            )
            picked = pick(batch)
            with self._autocast():
                logits = logits_at(self.model, hidden_states(self.model, batch.ids)[0], picked.places)
            right = (logits.argmax(-1) == picked.targets).double()
            losses = torch.nn.functional.cross_entropy(logits, picked.targets, reduction="none")
            answer, focus = (picked.weights >= 1).double(), (picked.weights > 1).double()
            parts: list[Tensor] = [
                (losses * picked.weights).sum(),
                picked.weights.sum(),
                (right * answer).sum(),
                answer.sum(),
                (right * focus).sum(),
                focus.sum(),
            ]
            sums += torch.stack([part.double().cpu() for part in parts])
        self.model.train()
        loss, weight, right_answers, answers, right_foci, foci = sums.tolist()
        focus_right = right_foci / foci if foci else None
        return loss / max(weight, 1e-9), right_answers / max(answers, 1), focus_right


def use_fast_attention(model: Model) -> None:
    """Attend in blocks on a CPU; use the fused kernel on other devices and for models with a sliding window."""
    on_cpu = next(model.parameters()).device.type == "cpu"
    in_blocks = on_cpu and not getattr(model.config, "sliding_window", None)
    model.config._attn_implementation = attention.NAME if in_blocks else "sdpa"
