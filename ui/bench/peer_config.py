"""transformers' configuration for a model, to measure the same shape in transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol


class Shape(Protocol):
    """A model, such as a `ModelSource`: its folder, or the name of a random preset."""

    @property
    def folder(self) -> Path | None: ...

    @property
    def name(self) -> str: ...


def peer_config(source: Shape) -> Any:
    """The `config.json` of the model's folder or of its random preset."""
    from transformers import AutoConfig

    from pitlane.models import config_json

    if source.folder is not None:
        return AutoConfig.from_pretrained(str(source.folder), local_files_only=True, trust_remote_code=False)
    return AutoConfig.for_model(**config_json(source.name.removeprefix("random:")))
