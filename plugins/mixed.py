"""Mixed: choose the bits of every linear by its measured error, within a budget of bytes.

Changes in the loop: `build_linear` builds every linear in a format of its own. The first use measures the error of every linear in
every format over the calibration text: the change of its layer's outputs, as a share of the residual stream. Every linear begins in
the smallest format. Then the plugin takes the upgrade with the largest drop of error per byte, again and again, until the budget
`bits` is full. Codes are rounded to nearest. The range of a group has the least error weighted by the inputs.
With `formats` = kernels, a linear has 4 bits in groups of 128, 64 or 32, or 8 bits, and runs on the kernels of int4 and int8. With
`formats` = all, a linear may also have 2, 3, 5 or 6 bits: it then runs as a dense weight, for quality only. `build_embedding` keeps
head and embedding in 8 bits.
Exactness: approximate.
Metric: share of the next token's probability that moves, mean over all tokens; value: 12.3 % with 5 bits (int4 16.3 % at the same
bytes; a perplexity of 82.3 becomes 83.5, with int4 87.4); model: bundled in bfloat16; text: its sample PDF (655 tokens). A test
holds a bound of 16 %. docs/quantization.md has more.
Costs: time at the first use, kept as a recipe under PITLANE_HOME; time to round at load.
Paper: HAWQ-V2, https://arxiv.org/abs/1911.03852: the budget and the greedy choice. The measured error replaces its Hessian traces
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import Field

from pitlane import BadOption, CalibratedPlugin, LayerRecipe, LinearPart, LinearPlan, PluginOptions, hookimpl

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from pitlane import BuildContext, EmbeddingPart, LayerInputs, Recipe
    from pitlane.kernels.packing import Format
    from pitlane.kernels.quantize_math import Codes


class Choice(NamedTuple):
    """A format of a weight. group_size 0: a scale per row."""

    bits: int
    group_size: int
    symmetric: bool = True

    @property
    def on_kernel(self) -> bool:
        return self.bits in (4, 8)

    def cost(self, inputs: int) -> float:
        """Bits per weight, scales included: 16 bits per group, 32 with zeros or per row."""
        per_group = 16 if self.symmetric else 32
        return self.bits + (per_group / self.group_size if self.group_size else 32 / inputs)

    def __str__(self) -> str:
        return f"{self.bits}g{self.group_size}{'' if self.symmetric else 'z'}"


ON_KERNELS = (Choice(4, 128), Choice(4, 64), Choice(4, 64, False), Choice(4, 32, False), Choice(8, 0))
SYMMETRIC = (Choice(4, 128), Choice(4, 64), Choice(4, 32), Choice(8, 0))
DENSE = tuple(Choice(bits, 64) for bits in (2, 3, 5, 6))


class Mixed(CalibratedPlugin):
    name, role, exactness = "mixed", "linear", "approximate"

    class Options(PluginOptions):
        bits: float = Field(
            5.0,
            ge=2.25,
            le=8.1,
            title="Bits",
            description="budget: bits per weight of all linears together, scales included",
        )
        formats: Literal["kernels", "all"] = Field(
            "kernels",
            title="Formats",
            description="kernels: 4 and 8 bits; all: 2 to 8 bits, some dense, for quality only",
        )
        symmetric: bool = Field(
            False,
            title="Symmetric",
            description="only formats whose zero is the middle of a group's range, as checkpoints for other programs have",
        )
        activations: Literal["int8", "bfloat16"] = Field(
            "int8",
            title="Activations",
            description="int8 rounds the inputs of a linear to 8 bits; bfloat16 keeps the dtype",
        )
        head: Literal["int8", "bfloat16"] = Field(
            "int8", title="Head", description="the head and the embedding have 8 bits; bfloat16 keeps them"
        )
        text: str = Field("", title="Text", description="file of calibration text; empty: the text that Pitlane brings")
        tokens: int = Field(8192, ge=64, le=262144, title="Tokens", description="calibration tokens, at most")

    def __init__(self, options: PluginOptions | None = None) -> None:
        super().__init__(options)
        self._by_recipe: dict[str, dict[str, Choice]] = {}

    def refusal(self, context: BuildContext) -> str | None:
        parts = _linears(context)
        total = sum(part.out_features * part.in_features for part in parts)
        least = sum(
            self._choices(part)[0].cost(part.in_features) * part.out_features * part.in_features for part in parts
        )
        if self.options.bits < least / total - 1e-9:
            return (
                f"mixed.bits = {self.options.bits:g} is less than the smallest formats of this model need; "
                f"give at least {least / total + 0.0005:.3f}"
            )
        return None

    def prepare(self, context: BuildContext) -> None:
        self.build_recipe(context, self._visit)

    @hookimpl
    def build_linear(self, part: LinearPart, context: BuildContext) -> LinearPlan | None:
        from pitlane.kernels.integer_parts import Recipe, codes_plan, rounded_plan

        sizes = part.out_features, part.in_features, part.bias
        if part.fed_by is None:
            is_head = part.name == "lm_head"
            return LinearPlan.of(Recipe.of_ends(self.options).linear(part, context)) if is_head else None
        recipe = self.finished_recipe(context)
        choice = self._chosen(context, recipe).get(part.name)
        if choice is None:
            return None  # a single member: the plan has the fused part
        codes = partial(_codes, recipe, part, choice)
        if choice.on_kernel:
            form = self._form(choice)
            return LinearPlan.of(codes_plan(*sizes, form, context.dtype, context.device, codes))
        return LinearPlan.of(rounded_plan(part.num_values, context.dtype, context.device, codes))

    @hookimpl
    def build_embedding(self, part: EmbeddingPart, context: BuildContext) -> LinearPlan | None:
        from pitlane.kernels.integer_parts import Recipe

        return LinearPlan.of(Recipe.of_ends(self.options).embedding(part, context))

    def roundings(self, context: BuildContext) -> dict[str, tuple[tuple[int, int, int], Callable[[Tensor], Codes]]]:
        """The grid of every linear and the function that rounds its weight, for `pitlane quantize`."""
        recipe = self.finished_recipe(context)
        chosen = self._chosen(context, recipe)
        made: dict[str, tuple[tuple[int, int, int], Callable[[Tensor], Codes]]] = {}
        for part in _linears(context):
            choice = chosen[part.name]
            codes = partial(_member_codes, recipe, part, choice)
            grid = choice.bits, choice.group_size, int(choice.symmetric)
            made |= {member.name: (grid, codes) for member in part.members}
        return made

    def depends(self, context: BuildContext) -> str:
        """Without the budget: a recipe serves every budget."""
        return f"{self.name}@{self.version} {self.options.formats}{' symmetric' if self.options.symmetric else ''}"

    def _choices(self, part: LinearPart) -> list[Choice]:
        """The formats that fit a part, the smallest format first."""
        table = SYMMETRIC if self.options.symmetric else ON_KERNELS
        table = table if self.options.formats == "kernels" else (*DENSE, *table)
        fitting = [choice for choice in table if not choice.group_size or part.in_features % choice.group_size == 0]
        return sorted(fitting, key=lambda choice: choice.cost(part.in_features))

    def _visit(self, layer: LayerInputs) -> LayerRecipe:
        import torch

        from pitlane.kernels.quantize_math import InputStats

        tensors, notes = dict[str, "Tensor"](), {}
        for part in layer.linears:
            names, stats = [member.name for member in part.members], InputStats(*layer.stats[part.members[0].name])
            weight = torch.cat([layer.weight(name) for name in names])
            sizes, errors = [member.out_features for member in part.members], {}
            for choice in self._choices(part):
                rounded = _rounded(weight, choice, stats.mean_square).dequantized().split(sizes)
                errors[str(choice)] = layer.error(dict(zip(names, rounded, strict=True)))
            notes[part.name] = errors
            tensors[f"{names[0]}.mean_square"] = stats.mean_square
        return LayerRecipe(tensors, notes)

    def _chosen(self, context: BuildContext, recipe: Recipe | None) -> dict[str, Choice]:
        """The format of every part, by name. Without a recipe, the error is taken as 4^-bits: enough to estimate the bytes."""
        name = recipe.name if recipe else ""
        if name not in self._by_recipe:
            self._by_recipe[name] = self._choose(context, recipe)
        return self._by_recipe[name]

    def _choose(self, context: BuildContext, recipe: Recipe | None) -> dict[str, Choice]:
        parts = _linears(context)
        table = {name: errors for note in recipe.notes() for name, errors in note.items()} if recipe else {}

        def error(part: LinearPart, choice: Choice) -> float:
            share: float = table[part.name][str(choice)] if table else 4.0**-choice.bits
            return share

        return spend(parts, {part.name: self._choices(part) for part in parts}, error, self.options.bits)

    def _form(self, choice: Choice) -> Format:
        from pitlane.kernels.packing import Format

        return Format(choice.bits, self.options.activations == "int8", choice.group_size, choice.symmetric)


def spend(parts: list[LinearPart], choices: dict[str, list[Choice]], error: Any, bits: float) -> dict[str, Choice]:
    """Choose a format for every part: take the upgrade with the largest drop of error per byte, while the budget `bits` allows it.

    error: (part, choice) -> the share of the residual stream that moves.
    """
    weights = {part.name: part.out_features * part.in_features for part in parts}
    left = bits * sum(weights.values())
    level = dict.fromkeys(weights, 0)
    cost = {
        part.name: [choice.cost(part.in_features) * weights[part.name] for choice in choices[part.name]]
        for part in parts
    }
    errors = {part.name: [error(part, choice) for choice in choices[part.name]] for part in parts}
    left -= sum(costs[0] for costs in cost.values())
    while True:
        upgrades = [
            ((errors[name][now] - errors[name][to]) / (cost[name][to] - cost[name][now]), name, to)
            for name, now in level.items()
            for to in range(now + 1, len(cost[name]))
            if cost[name][to] - cost[name][now] <= left and errors[name][to] < errors[name][now]
        ]
        if not upgrades:
            return {name: choices[name][now] for name, now in level.items()}
        _, name, to = max(upgrades)
        left -= cost[name][to] - cost[name][level[name]]
        level[name] = to


def _linears(context: BuildContext) -> list[LinearPart]:
    from pitlane import parts_of

    return [part for part in parts_of(context.config) if isinstance(part, LinearPart) and part.fed_by is not None]


def _rounded(weight: Tensor, choice: Choice, mean_square: Tensor) -> Codes:
    import torch

    from pitlane.kernels.quantize_math import InputStats, quantize_linear

    stats = InputStats(0, torch.zeros_like(mean_square), mean_square)
    return quantize_linear(weight, choice.bits, choice.group_size, choice.symmetric, stats=stats, clip=True)


def _codes(recipe: Recipe | None, part: LinearPart, choice: Choice, members: Any) -> Codes:
    """Round the weight of a part to its format."""
    from pitlane.kernels.quantize_math import joined

    return joined([_member_codes(recipe, part, choice, member["weight"].float()) for member in members])


def _member_codes(recipe: Recipe | None, part: LinearPart, choice: Choice, weight: Tensor) -> Codes:
    mean_square = recipe.get(f"{part.members[0].name}.mean_square") if recipe else None
    if mean_square is None:
        raise BadOption("mixed has no recipe for this model yet; load the model with an engine")
    return _rounded(weight, choice, mean_square)
