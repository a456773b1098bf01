"""transformers' configuration for a model, to measure the same shape in transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pitlane.models import ModelSource


def peer_config(source: ModelSource) -> Any:
    """The `config.json` of the model's folder or of its random preset."""
    from transformers import AutoConfig

    from pitlane.models import config_json

    if source.folder is not None:
        return AutoConfig.from_pretrained(str(source.folder), local_files_only=True, trust_remote_code=False)
    return AutoConfig.for_model(**config_json(source.name.removeprefix("random:")))
