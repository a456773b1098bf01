"""Writing files so that a failure leaves the one before in place."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from pitlane.training.errors import TrainingError


@contextmanager
def replacing(path: Path, what: str, otherwise: str) -> Iterator[Path]:
    """Write to the path that this gives; it becomes `path` in one step. A failure says what could not be written, and what is."""
    part = path.with_name(f"{path.name}.part")
    try:
        yield part
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        raise TrainingError(f"cannot write {what}: {error}; {otherwise}") from None
