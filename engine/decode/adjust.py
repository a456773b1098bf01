"""The `adjust_logits` fold: every plugin changes the logits of the plugin before it, and no plugin breaks another one's rows."""

from __future__ import annotations

from math import inf, isfinite

import torch
from torch import Tensor

from pitlane.engine.border import shown
from pitlane.engine.decode.rows import Rows
from pitlane.engine.plan.dispatch import Dispatcher
from pitlane.engine.plan.hooks import HookError
from pitlane.engine.plan.plugin import Plugin

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def adjust_logits(rows: Rows, dispatch: Dispatcher) -> None:
    """Fold `adjust_logits` over the rows of one plan. A row that a plugin breaks fails for its own sequence alone."""
    before = rows.logits

    def keep(plugin: Plugin, result: object) -> None:
        nonlocal before
        logits = _checked(rows.logits if result is None else result, before, plugin)
        _undo_broken(rows, logits, before, plugin, dispatch)
        before = logits

    for hook in rows.seqs[0].plan.hook("adjust_logits"):
        rows.logits = before.clone()  # a plugin may write into the logits that it gets, and fail afterwards
        dispatch.call(rows.seqs, [hook], keep, rows=rows)
        rows.logits = before


def _undo_broken(rows: Rows, logits: Tensor, before: Tensor, plugin: Plugin, dispatch: Dispatcher) -> None:
    """Undo a plugin's change for the sequences whose next token can no longer be drawn."""
    places = [place for place, parent in enumerate(rows.parents) if parent < 0]
    for seq, peak in zip(rows.seqs, logits[places].amax(-1).tolist(), strict=True):
        if isfinite(peak) or seq.error:
            continue
        fault = "forbids every token" if peak == -inf else f"returned logits that hold {peak}"
        own = [row for row, index in enumerate(rows.seq_index) if rows.seqs[index] is seq]
        logits[own] = before[own].to(logits.dtype)
        cause = ValueError(f"{fault}, after token {seq.num_tokens}")
        dispatch.drop([seq], HookError(plugin, "adjust_logits", cause))


def _checked(logits: object, before: Tensor, plugin: Plugin) -> Tensor:
    """The logits, if type, shape and device fit, and an identical plugin left the values as they were. Raises otherwise."""
    if not isinstance(logits, Tensor) or logits.shape != before.shape:
        got = f"a tensor of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else shown(logits)
        raise TypeError(f"returned {got}, not a tensor of shape {tuple(before.shape)}")
    if logits.dtype not in FLOATS or logits.device != before.device:
        raise TypeError(f"returned {logits.dtype} on {logits.device}, not {before.dtype} on {before.device}")
    if plugin.exactness_for(plugin.options) == "identical" and not _equal(logits, before):
        raise ValueError("changed the logits, but is declared identical; declare the plugin steering")
    return logits


def _equal(logits: Tensor, before: Tensor) -> bool:
    return torch.equal(logits.to(before.dtype).nan_to_num(), before.nan_to_num())
