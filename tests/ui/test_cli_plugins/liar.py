"""Plugins that declare themselves identical and are not: one in a kernel, one in the logits."""

from pitlane import Plugin, hookimpl


class Liar(Plugin):
    name, exactness = "liar", "identical"

    @hookimpl
    def build_op(self, kind, context):
        return _relu_mul if kind == "silu_mul" else None


class Cooler(Plugin):
    name, exactness = "cooler", "identical"

    @hookimpl
    def adjust_logits(self, rows):
        return rows.logits * 2


def _relu_mul(x):
    gate, up = x.chunk(2, -1)
    return gate.relu() * up
