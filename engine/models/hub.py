"""Models of the Hugging Face hub and its cache: fetch, list, pull, remove.

Only safetensors, JSON and tokenizer files are ever downloaded. Every way in which the hub can fail becomes a ModelError
of one line. huggingface_hub is imported when used.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pitlane.engine.errors import ModelError
from pitlane.engine.models.config import ModelConfig
from pitlane.engine.models.weights import weight_files

WANTED = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.txt"]
UNWANTED = ["*/*", "consolidated*"]  # other formats in folders (onnx, original), and Mistral's second copy
ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")
WAY_OUT = "connect, or give a local folder, `bundled` or `random:<preset>`"
SIGN_IN = "accept its terms on its page, then `hf auth login` or set HF_TOKEN"


@dataclass(frozen=True, slots=True)
class CachedModel:
    """A model in the Hugging Face cache. reason: why it is not supported, empty where it is."""

    name: str
    path: Path
    num_bytes: int
    reason: str

    @property
    def supported(self) -> bool:
        return not self.reason


def fetch(name: str) -> Path:
    """Folder of a model: from the cache when it is complete there, else downloaded."""
    return cached_folder(name) or pull(name)


def cached_folder(name: str) -> Path | None:
    """Folder of a model in the cache, None where it is not there or not complete."""
    try:
        folder = _snapshot(name, local_files_only=True)
    except ModelError:
        return None
    return None if _why_not(folder) else folder


def pull(name: str) -> Path:
    """Download a model, with progress on standard error, and return its folder."""
    return _snapshot(name, local_files_only=False)


def cached_models() -> list[CachedModel]:
    """All models in the cache, by name."""
    found = []
    cache = _scan()
    for repo in cache.repos if cache else ():
        revisions = sorted(repo.revisions, key=lambda revision: revision.last_modified)
        if repo.repo_type == "model" and revisions:
            folder = Path(revisions[-1].snapshot_path)
            found.append(CachedModel(repo.repo_id, folder, repo.size_on_disk, _why_not(folder)))
    return sorted(found, key=lambda model: model.name)


def remove(name: str) -> int:
    """Delete a model from the cache and return the bytes that were freed."""
    cache = _scan()
    repos = {repo.repo_id: repo for repo in cache.repos if repo.repo_type == "model"} if cache else {}
    if name not in repos:
        raise ModelError(f"no cached model {name!r}; cached: {', '.join(sorted(repos)) or 'none'}")
    alone = replace(cache, repos=frozenset({repos[name]}))  # a copied repository shares its commits with the original
    strategy = alone.delete_revisions(*(revision.commit_hash for revision in repos[name].revisions))
    freed = int(strategy.expected_freed_size)
    strategy.execute()
    return freed


def _scan() -> Any:
    """What huggingface_hub says of its cache; None where there is none yet."""
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    try:
        return scan_cache_dir(constants.HF_HUB_CACHE)
    except CacheNotFound:
        return None


def _why_not(folder: Path) -> str:
    """Why a folder cannot be run here; empty where it can."""
    try:
        ModelConfig.from_folder(folder)
        weight_files(folder)
    except ModelError as error:
        return str(error)
    return ""


def _snapshot(name: str, local_files_only: bool) -> Path:
    from huggingface_hub import errors, snapshot_download

    if not ID.fullmatch(name):
        raise ModelError(f"{name!r} is no folder and no Hugging Face id (owner/name); also: bundled, random:<preset>")
    options: dict[str, Any] = {"allow_patterns": WANTED, "ignore_patterns": UNWANTED}
    try:
        return Path(snapshot_download(name, local_files_only=local_files_only, **options))
    except errors.GatedRepoError:
        raise ModelError(f"{name} is gated; {SIGN_IN}") from None
    except errors.RepositoryNotFoundError:
        raise ModelError(f"no model {name} on the hub (or it is private: {SIGN_IN}); check the name") from None
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError):
        raise ModelError(f"{name} is not in the cache and the hub cannot be reached; {WAY_OUT}") from None
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        way = SIGN_IN if status in (401, 403) else "try again later"
        raise ModelError(f"the hub refused {name} with status {status}; {way}") from None
    except Exception as error:  # the disk's, and the HTTP client's own, whose names change with its version
        line = (str(error).splitlines() or [""])[0][:200]
        raise ModelError(f"{name} cannot be downloaded ({type(error).__name__}: {line}); {WAY_OUT}") from error
