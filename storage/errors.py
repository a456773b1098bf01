"""The root of all errors that a user can cause, and those of storage and of documents. Messages are one line.

PitlaneError                 engine/errors.py grows further branches
├── StorageError             the database, the home folder or a file in it cannot be used
│   ├── NotFound             no stored thing of that name; lists the known
│   └── PrefixMismatch       a saved prefix is not what its row says: discard it and compute it again
└── DocumentError            a file given as a document cannot be read as one
"""

from __future__ import annotations

import errno

FULL = (errno.ENOSPC, errno.EDQUOT)
FORBIDDEN = (errno.EACCES, errno.EPERM)


class PitlaneError(Exception):
    """Root of everything a user can cause: what, the value, what to do."""


class StorageError(PitlaneError):
    """The database, the home folder or a file in it cannot be used."""


class NotFound(StorageError):
    """No stored thing of that name."""


class PrefixMismatch(StorageError):
    """A saved prefix is missing, damaged or of another kind than its row says."""


class DocumentError(PitlaneError):
    """A file given as a document cannot be read as one."""


def reason_of(error: OSError) -> str:
    """Why the system refused a file, and what to do about it."""
    reason = error.strerror or str(error)
    if error.errno in FULL:
        return f"{reason}: the disk is full, or your share of it; free some space"
    if error.errno == errno.EROFS:
        return f"{reason}; choose another disk, or make this one writable"
    return f"{reason}; check its permissions" if error.errno in FORBIDDEN else reason
