"""Write files so that a failure leaves the previous file in place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from pitlane.storage.files import replacing as whole
from pitlane.training.errors import TrainingError


@contextmanager
def replacing(path: Path, what: str, otherwise: str) -> Iterator[Path]:
    """Yield a temporary path to write to; at the end it is renamed to `path` in one step.

    what: names the file in the error message. otherwise: the end of that message, such as what is still intact.
    """
    try:
        with whole(path, path.with_name(f"{path.name}.part")) as part:
            yield part
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"cannot write {what}: {error}; {otherwise}") from None
