"""The LoRA adapters that ship with Pitlane, by the name that the option `lora.adapter` takes.

To ship another adapter, put its PEFT folder beside the others and add a line to `SHIPPED`. Knows no engine and reads no adapter:
plugins/lora.py does.
"""

from __future__ import annotations

import importlib.resources
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ShippedAdapter:
    """folder: adapter_config.json and adapter_model.safetensors. base: its model, as `--model` takes it.

    fingerprints: of the weights of its model (`WeightSource.fingerprint`). A model with these weights is recognised under any
    name.
    """

    folder: Path
    base: str
    fingerprints: frozenset[str]


def _folder(name: str) -> Path:
    return Path(str(importlib.resources.files("pitlane.storage.bundled") / name))


DOCUMENTS = "documents"  # on by default for questions about a document
SHIPPED = {
    DOCUMENTS: ShippedAdapter(
        _folder("document_adapter"),
        "smollm2",
        frozenset({"447e384659de2f0d94d98f2a778804786a437da761be01d8dae063bc433dd145"}),  # of its GGUF file, decoded
    )
}
