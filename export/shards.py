"""A folder of safetensors shards. The journal `quantize.json` lists the finished shards, so that a killed run can resume.

A shard is written under a temporary name, synced and renamed. The journal also holds the model and the settings: a run resumes only
with the same model and settings. The last step writes the index and config.json and removes the journal.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from pitlane.export.errors import ExportError
from pitlane.storage.files import replacing, write_whole

JOURNAL, PART = "quantize.json", ".part"


class Journal:
    """The journal of a run. identity: the model and the settings. done: the finished shards, {shard: {name: bytes}}."""

    def __init__(self, folder: Path, identity: Mapping[str, Any], resume: bool) -> None:
        self.folder, self.identity, self.file = folder, dict(identity), folder / JOURNAL
        self.done: dict[str, Any] = {}
        if resume:
            self._read()
        elif self.file.is_file():
            raise ExportError(
                f"{folder} holds an unfinished quantization; go on with --resume, or choose another --out"
            )
        elif any(any(folder.glob(pattern)) for pattern in ("*.safetensors", "*.gguf", "config.json")):
            raise ExportError(f"{folder} holds a model; choose another --out")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ExportError(f"cannot make the folder {folder}: {error}; choose another --out") from None
        self.write()

    def _read(self) -> None:
        if not self.file.is_file():
            raise ExportError(f"nothing to resume: no {JOURNAL} in {self.folder}; start without --resume")
        try:
            saved = json.loads(self.file.read_text(encoding="utf-8"))
            identity, done = saved["identity"], dict(saved["done"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ExportError(f"cannot read {self.file}: {error}; remove {self.folder} and start again") from None
        changed = [key for key in self.identity if identity.get(key) != self.identity[key]]
        if changed:
            raise ExportError(
                f"{self.folder} was begun with another {', '.join(changed)}; use the same values, or choose another --out"
            )
        self.done = done

    def write(self) -> None:
        text = json.dumps({"identity": self.identity, "done": self.done}, indent=1)
        write(self.file, text.encode())

    def finish(self, name: str, entry: Any) -> None:
        self.done[name] = entry
        self.write()

    def keep(self, names: Iterable[str]) -> None:
        """Forget the finished parts whose bytes are not on the disk. names: the parts with bytes on the disk."""
        self.done = {name: self.done[name] for name in names}
        self.write()

    def remove(self) -> None:
        self.file.unlink(missing_ok=True)


def write(file: Path, content: bytes) -> None:
    """Write a file in one step. Raises ExportError."""
    try:
        write_whole(file, content, file.with_name(file.name + PART))
    except OSError as error:
        raise ExportError(f"cannot write {file}: {error}; make room, then go on with --resume") from None


def write_shard(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a shard in one step. The same tensors give the same bytes."""
    try:
        with replacing(file, file.with_name(file.name + PART)) as part:
            save_file({name: tensors[name].contiguous() for name in sorted(tensors)}, part, {"format": "pt"})
            part.chmod(0o644)  # safetensors lets only the owner read
    except (OSError, SafetensorError) as error:
        raise ExportError(f"cannot write {file}: {error}; make room, then go on with --resume") from None
