"""Statistics of the inputs of a linear over many calls. Keeps sums and a sample of rows. Knows no model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pitlane.engine.calibration.recipe import InputStats

SAMPLE_ROWS = 16  # rows to keep of every call, about


class InputGatherer:
    """Stands in the place of a linear and gathers its inputs. Every call has the tokens of one sequence: x [T, K]."""

    def __init__(self, linear: Any, num_inputs: int, hessian: bool) -> None:
        self.linear = linear
        self.num_tokens = 0
        self.absmax, self.squares = torch.zeros(num_inputs), torch.zeros(num_inputs, dtype=torch.float64)
        self.hessian = torch.zeros(num_inputs, num_inputs) if hessian else None
        self.sample: list[Tensor] = []

    def __call__(self, x: Tensor) -> Tensor:
        self.num_tokens += len(x)
        self.absmax = torch.maximum(self.absmax, x.abs().amax(0))
        self.squares += x.double().square().sum(0)
        if self.hessian is not None:
            self.hessian.addmm_(x.T, x)
        self.sample.append(x[:: max(1, len(x) // SAMPLE_ROWS)].clone())
        y: Tensor = self.linear(x)
        return y

    def stats(self) -> InputStats:
        mean_square = (self.squares / max(1, self.num_tokens)).float()
        return InputStats(self.num_tokens, self.absmax, mean_square, self.hessian, torch.cat(self.sample))
