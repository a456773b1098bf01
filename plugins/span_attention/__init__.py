"""Span attention: attention over KV where it lies, in parts that merge by log-sum-exp, with PyTorch's operations on any device.

Changes in the loop: `build_attention` plans the reads of each step as spans of adjacent slots (reads.py).
Exactness: rounding. A token's softmax is cut into parts, which PyTorch sums in the dtype of the model: the error is at most twice
that of PyTorch's own attention. Costs: nothing. Helps every machine without the kernels in C: the core's attention copies the KV
of every sequence in every layer.
Source: Dao et al. 2022, arXiv:2205.14135 (section 3.1); Juravsky et al. 2024, arXiv:2402.05099
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pitlane import Plugin, hookimpl

if TYPE_CHECKING:
    from pitlane import Attention, BuildContext


class SpanAttentionPlugin(Plugin):
    name, role, exactness = "span_attention", "attention", "rounding"
    is_default = True

    @hookimpl
    def build_attention(self, context: BuildContext) -> Attention:
        from pitlane.plugins.span_attention.attention import SpanAttention

        return SpanAttention(context)
