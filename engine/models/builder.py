"""The builder: fills a decoder class with parts, one by one, so that loading needs little memory beyond the model itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from pitlane.engine.models.layers import Concat
from pitlane.engine.models.parts import EmbeddingPart, LinearPart, Part, Tensors
from pitlane.engine.models.quantized.folder import QuantizedFolder
from pitlane.engine.models.recorder import PartMaker
from pitlane.engine.models.weight_plan import Choice, WeightPlan
from pitlane.engine.models.weights import SafetensorsFolder, StoredName, WeightSource

Transform: TypeAlias = Callable[[Part, Tensors], Tensors]


class Builder(PartMaker):
    """Builds the parts of a weight plan from a source.

    The source must have the names and shapes of the parts (`weights.checked`). stored_name: canonical name of a tensor -> its name
    in the source. transform: changes the tensors of a part of the checkpoint before the part is built. built: the parts that
    plugins built, with their plugins.
    """

    def __init__(
        self,
        plan: WeightPlan,
        source: WeightSource,
        dtype: torch.dtype,
        device: torch.device,
        transform: Transform | None = None,
        stored_name: StoredName = str,
    ) -> None:
        super().__init__(dtype, device)
        self.plan, self.source, self.transform, self.stored_name = plan, source, transform, stored_name
        self.built: list[tuple[object, Any]] = []
        self.embeddings: dict[str, Any] = {}  # the tied embeddings, by name
        self.tables: dict[str, list[Tensors]] = {}  # tensors of the tied embeddings, by name, until the head is built

    def make(self, part: Part) -> Any:
        built = [self._build(choice) for choice in self.plan.choices[part]]
        return built[0] if len(built) == 1 else Concat(built)

    def _build(self, choice: Choice) -> Any:
        part, plan, plugin = choice
        if plan is None:
            assert isinstance(part, LinearPart) and part.tied_to, "only a tied head is built with its embedding"
            built = self.embeddings[part.tied_to].linear
        else:
            tensors = self._tensors(part)
            built = plan.build(tensors)
            if plugin is not None:
                self._release(part)
            if isinstance(part, EmbeddingPart) and part.is_tied:
                self.embeddings[part.name] = built
                if plugin is None or not plan.has_head:
                    self.tables[part.name] = tensors
        if plugin is not None:
            self.built.append((built, plugin))
        return built

    def _release(self, part: Part) -> None:
        """Give back the memory of the stored tensors of a part that a plugin has packed. A tied head shares its table."""
        if isinstance(self.source, SafetensorsFolder):
            tied_to = part.tied_to if isinstance(part, LinearPart) else None
            for name in [f"{tied_to}.weight"] if tied_to else part.shapes:
                self.source.release(self.stored_name(name))

    def _tensors(self, part: Part) -> list[Tensors]:
        """The tensors of a part, in a mapping per member."""
        if not isinstance(part, LinearPart):
            return [self._stored(part)]
        if part.tied_to is not None:
            return self.tables.pop(part.tied_to)
        return [self._stored(part.alone(member)) for member in part.members]

    def _stored(self, part: Part) -> Tensors:
        """The tensors of one part of the checkpoint, transformed. A part that is stored packed is decoded here first."""
        names = {name.rpartition(".")[2]: self.stored_name(name) for name in part.shapes}
        packed = None
        if isinstance(self.source, QuantizedFolder) and isinstance(part, LinearPart):
            packed = self.source.tensors(self.stored_name(part.name), names)
        tensors = packed or {last: self.source.get(name) for last, name in names.items()}
        return tensors if self.transform is None else self.transform(part, tensors)
