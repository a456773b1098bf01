"""The facts about model and device that the `build_*` hooks receive."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from pitlane.engine.calibration.recipe import Calibrator
    from pitlane.engine.models.config import DecoderConfig
    from pitlane.engine.models.quantized.packing import Packing


@dataclass(frozen=True, slots=True)
class BuildContext:
    """The model's config, its dtype, and the device that runs it.

    stored_name: canonical name of a tensor or a module -> its name in the checkpoint. fingerprint: returns a digest of the weights;
    the first call may read them. packings: the linears that a quantized checkpoint stores packed, by canonical name.
    settings: of the plan under which the model is built, by plugin. calibrator: makes and finds the recipes of plugins that need
    the inputs of linears; None: no weights are at hand.
    """

    config: DecoderConfig
    dtype: torch.dtype
    device: torch.device
    stored_name: Callable[[str], str] = str
    fingerprint: Callable[[], str] = str  # '' if the weights are not known
    packings: Mapping[str, Packing] = field(default_factory=dict)
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    calibrator: Calibrator | None = None

    @property
    def stored_dtype(self) -> torch.dtype:
        """The dtype of the checkpoint, by its config."""
        import torch

        dtype: torch.dtype = getattr(torch, self.config.dtype)
        return dtype
