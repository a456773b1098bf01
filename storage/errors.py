"""The root of all errors that a user can cause, and the errors of storage and documents. A message is one line.

PitlaneError                 engine/errors.py adds further branches
├── StorageError             the database, the data folder or a file in it cannot be used
│   ├── NotFound             nothing stored has this name; the message lists the known names
│   └── PrefixMismatch       a saved prefix does not match its row: discard it and compute it again
└── DocumentError            a file cannot be read as a document
"""

from __future__ import annotations

import errno

FULL = (errno.ENOSPC, errno.EDQUOT)
FORBIDDEN = (errno.EACCES, errno.EPERM)


class PitlaneError(Exception):
    """Root of all errors that a user can cause. A message says what failed, shows the value, and says what to do."""


class StorageError(PitlaneError):
    """The database, the data folder or a file in it cannot be used."""


class NotFound(StorageError):
    """Nothing stored has this name."""


class PrefixMismatch(StorageError):
    """A saved prefix is missing, damaged, or does not match its row."""


class DocumentError(PitlaneError):
    """A file cannot be read as a document."""


def reason_of(error: OSError) -> str:
    """The reason of the operating system for an error, and what to do about it."""
    reason = error.strerror or str(error)
    if error.errno in FULL:
        return f"{reason}: the disk is full, or your share of it; free some space"
    if error.errno == errno.EROFS:
        return f"{reason}; choose another disk, or make this one writable"
    return f"{reason}; check its permissions" if error.errno in FORBIDDEN else reason
