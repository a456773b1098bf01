"""Models of the Hugging Face hub and its cache: fetch, list, pull, remove.

Downloads safetensors, JSON and tokenizer files only. Every failure of the hub becomes a ModelError of one line.
huggingface_hub is imported on first use.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pitlane.engine.errors import ModelError
from pitlane.engine.models.families.core import read_config
from pitlane.engine.models.families.family import Families
from pitlane.engine.models.offline import is_offline, refusal
from pitlane.engine.models.pip_download import Progress
from pitlane.engine.models.weights import weight_files

PATTERNS = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.txt"]
IGNORED_PATTERNS = ["*/*", "consolidated*"]  # folders of other formats (onnx, original); Mistral's second copy
ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")
WAY_OUT = "connect, or give a local folder, `bundled` or `random:<preset>`"
SIGN_IN = "accept its terms on its page, then `hf auth login` or set HF_TOKEN"


@dataclass(frozen=True, slots=True)
class CachedModel:
    """A model in the Hugging Face cache. reason: why it is not supported; empty if it is."""

    name: str
    path: Path
    num_bytes: int
    reason: str

    @property
    def supported(self) -> bool:
        return not self.reason


def fetch(name: str, families: Families | None = None, progress: Progress | None = None) -> Path:
    """Return the folder of a model: the cached folder if the model in it can be opened, else a new download.

    In offline mode the cached folder is returned as it is.
    """
    try:
        folder = _snapshot(name, local_files_only=True)
    except ModelError:
        return pull(name, progress)
    return pull(name, progress) if _unsupported(folder, families) else folder


def pull(name: str, progress: Progress | None = None) -> Path:
    """Download a model and return its folder. progress: None shows the progress on standard error."""
    return _snapshot(name, local_files_only=False, progress=progress)


def cached_models(families: Families | None = None) -> list[CachedModel]:
    """All models in the cache, by name. families: the supported families (None: the core's)."""
    models = []
    cache = _scan()
    for repo in cache.repos if cache else ():
        revisions = sorted(repo.revisions, key=lambda revision: revision.last_modified)
        if repo.repo_type == "model" and revisions:
            folder = Path(revisions[-1].snapshot_path)
            models.append(CachedModel(repo.repo_id, folder, repo.size_on_disk, _unsupported(folder, families)))
    return sorted(models, key=lambda model: model.name)


def remove(name: str) -> int:
    """Delete a model from the cache; return the number of bytes freed."""
    cache = _scan()
    repos = {repo.repo_id: repo for repo in cache.repos if repo.repo_type == "model"} if cache else {}
    if name not in repos:
        raise ModelError(f"no cached model {name!r}; cached: {', '.join(sorted(repos)) or 'none'}")
    # A copied repository shares its commits with the original: search this repository alone for them.
    repo_alone = replace(cache, repos=frozenset({repos[name]}))
    strategy = repo_alone.delete_revisions(*(revision.commit_hash for revision in repos[name].revisions))
    freed = int(strategy.expected_freed_size)
    strategy.execute()
    return freed


def _scan() -> Any:
    """The cache as huggingface_hub lists it; None if there is no cache yet."""
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    try:
        return scan_cache_dir(constants.HF_HUB_CACHE)
    except CacheNotFound:
        return None


def _unsupported(folder: Path, families: Families | None = None) -> str:
    """Why the model in a folder is not supported; empty if it is."""
    try:
        read_config(folder, families)
        weight_files(folder)
    except ModelError as error:
        return str(error)
    return ""


def _snapshot(name: str, local_files_only: bool, progress: Progress | None = None) -> Path:
    from huggingface_hub import errors, snapshot_download

    if not ID.fullmatch(name):
        raise ModelError(
            f"{name!r} is no folder and no Hugging Face id (owner/name); also known: "
            "a .gguf file, bundled, smollm2, random:<preset>"
        )
    options: dict[str, Any] = {"allow_patterns": PATTERNS, "ignore_patterns": IGNORED_PATTERNS}
    if progress is not None:
        options["tqdm_class"] = _reporting(progress)
    try:
        return Path(snapshot_download(name, local_files_only=local_files_only or is_offline(), **options))
    except errors.GatedRepoError:
        raise ModelError(f"{name} is gated; {SIGN_IN}") from None
    except errors.RepositoryNotFoundError:
        raise ModelError(f"no model {name} on the hub (or it is private: {SIGN_IN}); check the name") from None
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError):
        if is_offline():
            raise ModelError(refusal(name)) from None
        raise ModelError(f"{name} is not in the cache and the hub cannot be reached; {WAY_OUT}") from None
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        way_out = SIGN_IN if status in (401, 403) else "try again later"
        raise ModelError(f"the hub refused {name} with status {status}; {way_out}") from None
    except Exception as error:  # errors of the disk, and of the HTTP client, whose types change with its version
        line = (str(error).splitlines() or [""])[0][:200]
        raise ModelError(f"{name} cannot be downloaded ({type(error).__name__}: {line}); {WAY_OUT}") from error


def _reporting(progress: Progress) -> type[Any]:
    """A progress bar for huggingface_hub that draws nothing and reports its bytes."""
    from huggingface_hub.utils import tqdm

    class Reporting(tqdm):  # type: ignore[misc]
        def __init__(self, *values: Any, **options: Any) -> None:
            is_second_count = str(options.get("name")).endswith(".transfer")  # of the same bytes, on their way
            self.counts_bytes, self.num_bytes = options.get("unit") == "B" and not is_second_count, 0
            super().__init__(*values, **options | {"disable": True})

        def update(self, n: float | None = 1) -> None:
            self.num_bytes += int(n or 0)
            if self.counts_bytes:
                progress(self.num_bytes, int(self.total or 0))

    return Reporting
