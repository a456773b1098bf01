"""Magnitude pruning: set the smallest weights of every linear to zero.

Changes in the loop: `transform_weights` zeroes the weights of a row whose magnitude is smallest.
Exactness: approximate. No bound is measured. Costs: time at load; the zeros save no time, because the core's linears compute them.
Helps to see how many weights a model can lose. A plugin of role linear builds from the pruned weights: prune first, then quantize.
Paper: Han et al. 2015, https://arxiv.org/abs/1506.02626
"""

from pydantic import Field

from pitlane import LinearPart, Plugin, PluginOptions, hookimpl


class MagnitudePrune(Plugin):
    """Set the smallest weights of every linear to zero."""

    name, exactness, stage = "magnitude_prune", "approximate", 0  # before plugins that smooth (10) or scale (20)

    class Options(PluginOptions):
        sparsity: float = Field(0.3, ge=0, lt=1, title="Sparsity", description="share of the weights that become zero")

    @hookimpl
    def transform_weights(self, part, tensors):
        if not isinstance(part, LinearPart):
            return None
        weight = tensors["weight"]
        num_zeros = int(self.options.sparsity * part.in_features)
        smallest = weight.abs().topk(num_zeros, dim=1, largest=False).indices
        return {**tensors, "weight": weight.scatter(1, smallest, 0.0)}
