"""Runs a dense model layer by layer over a text in float32. The memory holds one layer and the hidden states of the text.

`Decoder.run_layer` computes the layer. Its attention sees one whole sequence and stores no KV.
Shapes: S sequences of T tokens, hidden states [S, T, hidden].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from pitlane.engine.calibration.inputs import InputGatherer
from pitlane.engine.calibration.recipe import InputStats
from pitlane.engine.models.build_context import BuildContext
from pitlane.engine.models.builder import Builder, Transform
from pitlane.engine.models.decoder import EMBEDDING, LAYER, Decoder, Layer, parts_of
from pitlane.engine.models.parts import EmbeddingPart, LinearPart, NormPart, Part
from pitlane.engine.models.recorder import Recorder
from pitlane.engine.models.source import ModelSource
from pitlane.engine.models.weight_plan import WeightPlan

PLACES = ("qkv", "output", "gate_up", "down")  # attributes of a layer


class LayerWalk:
    """A model that builds one layer at a time. transform: changes the tensors of a part before the build."""

    def __init__(self, source: ModelSource, transform: Transform | None) -> None:
        config = source.config
        self.source, self.config, self.transform = source, config, transform
        recorder = Recorder()
        self.skeleton = Decoder(config, recorder)  # has rotary embeddings and the places of the layers, but no weights
        self.parts = recorder.parts
        self.linears = [self._linears_of(layer) for layer in range(config.num_layers)]
        context = BuildContext(config, torch.float32, torch.device("cpu"), source.stored_name)
        plan = WeightPlan.of(parts_of(config), context, None, transform is not None)
        self.builder = Builder(plan, source.weights, context.dtype, context.device, transform, source.stored_name)

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids [S, T] -> hidden states [S, T, hidden]."""
        part = next(part for part in self.parts if isinstance(part, EmbeddingPart) and part.name == EMBEDDING)
        table = self._tensor(part, f"{EMBEDDING}.weight")
        return table[ids].float() * self.skeleton.multiplier

    def weight(self, name: str) -> Tensor:
        """The transformed weight of a member [out, in], or of a norm [size] with its offset, in float32."""
        part = next(part for part in self._weights if part.name == name)
        weight = self._tensor(part, f"{name}.weight").float()
        return weight + part.offset if isinstance(part, NormPart) else weight

    def gather(
        self, index: int, hidden: Tensor, hessians: bool, tick: Callable[[], None]
    ) -> tuple[Tensor, dict[str, InputStats]]:
        """Run a layer. Returns its outputs, and the statistics of its linears by the name of the linear's first member.

        tick: called before every sequence.
        """
        layer = self._layer(index)
        gatherers = {}
        for place, part in zip(PLACES, self.linears[index], strict=True):
            gatherers[part.members[0].name] = InputGatherer(getattr(layer, place), part.in_features, hessians)
            setattr(layer, place, gatherers[part.members[0].name])
        outputs = self._run(layer, hidden, tick)
        return outputs, {name: gatherer.stats() for name, gatherer in gatherers.items()}

    def error(self, index: int, hidden: Tensor, outputs: Tensor, weights: Mapping[str, Tensor]) -> float:
        """The error of a layer's outputs with new weights: squared difference by squared norm of a token, mean over tokens."""
        difference = self.run_with(index, hidden, weights, lambda: None) - outputs
        return float((difference.square().sum(-1) / outputs.square().sum(-1).clamp(min=1e-30)).mean())

    def run_with(self, index: int, hidden: Tensor, weights: Mapping[str, Tensor], tick: Callable[[], None]) -> Tensor:
        """Run a layer with new weights for some members."""
        layer = self._layer(index)
        for place, part in zip(PLACES, self.linears[index], strict=True):
            members = [part.alone(member) for member in part.members]
            if any(member.name in weights for member in members):
                pieces = [
                    weights[member.name] if member.name in weights else self.weight(member.name) for member in members
                ]
                biases = (
                    [self._tensor(member, f"{member.name}.bias").float() for member in members] if part.bias else []
                )
                setattr(layer, place, _Plain(torch.cat(pieces), torch.cat(biases) if biases else None))
        return self._run(layer, hidden, tick)

    def _run(self, layer: Layer, hidden: Tensor, tick: Callable[[], None]) -> Tensor:
        length = hidden.shape[1]
        angles = [rope.angles(torch.arange(length)) for rope in self.skeleton.ropes]
        window = self.skeleton.kv_groups[layer.group].window
        groups = [SimpleNamespace(slots=None)] * len(self.skeleton.kv_groups)
        batch, store = cast(Any, SimpleNamespace(groups=groups)), cast(Any, SimpleNamespace(write=lambda *values: None))
        attention = _WholeSequence(self.config.attention_scale, length, window)
        outputs = hidden.clone()
        for x in outputs:
            tick()
            before, out = self.skeleton.run_layer(
                layer, x, None, angles, None, batch, store, cast(Any, attention), None
            )
            x.copy_(before + out)
        return outputs

    def _layer(self, index: int) -> Layer:
        place = self.skeleton.layers[index]
        return Layer(self.config, self.builder, index, place.group, place.index_in_group, place.rope)

    def _linears_of(self, layer: int) -> tuple[LinearPart, ...]:
        at = LAYER.format(layer)
        return tuple(part for part in self.parts if isinstance(part, LinearPart) and part.name.startswith(at))

    @cached_property
    def _weights(self) -> list[LinearPart | NormPart]:
        members = [part.alone(member) for parts in self.linears for part in parts for member in part.members]
        return [*members, *(part for part in self.parts if isinstance(part, NormPart))]

    def _tensor(self, part: Part, name: str) -> Tensor:
        stored = {
            full.rpartition(".")[2]: self.source.weights.get(self.source.stored_name(full)) for full in part.shapes
        }
        tensors = stored if self.transform is None else self.transform(part, stored)
        return tensors[name.rpartition(".")[2]]


class _Plain:
    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class _WholeSequence:
    """Causal attention over one sequence of `length` tokens, without stored KV. window: tokens that a query sees (None: all)."""

    def __init__(self, scale: float, length: int, window: int | None) -> None:
        self.scale = scale
        self.mask = torch.ones(length, length, dtype=torch.bool).tril()
        if window is not None:
            self.mask &= ~torch.ones_like(self.mask).tril(-window)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, store: Any, layer: int, reads: Any) -> Tensor:
        q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, self.mask, scale=self.scale, enable_gqa=True)
        return out[0].transpose(0, 1)
