"""Why pip failed, as one line with the way out. Reads what pip writes: versions 23 to 26 word their errors in two ways."""

from __future__ import annotations

import re
import sys
from urllib.parse import urlsplit

NO_PIP = f"this Python has no pip; get it with `{sys.executable} -m ensurepip`, or with `uv pip install pip`"
CONNECT = "connect, or check index and proxy in the settings of pip (`pip config list`)"
NOT_REACHED = f"the package index cannot be reached (no connection); {CONNECT}"
OTHER_FILE = (
    "the wheel has another SHA-256 than the pinned one, so it was not used; check the index in the settings of pip"
)
NO_SPACE = "the disk is full, or your share of it; free some space, or set PITLANE_HOME to a folder on another disk"

MISMATCH = "DO NOT MATCH THE HASHES"
FOUND = "Collecting "  # the index answered, and has the wheel
FAILED_PAGE = re.compile(r"Could not fetch URL (\S+): (.*) - skipping")
VERSIONS = re.compile(r"\(from versions: ([^)]*)\)")
FULL = re.compile(r"No space left on device|Errno 28|Errno 122|Disk quota exceeded|not enough space on the disk")
NETWORK = re.compile(
    r"connection|timed ?out|time-?out|didn't respond|max retries|proxy ?error|ssl|resolve|incomplete|retries exceeded",
    re.I,
)
CAUSES = {  # words of both wordings -> what the user reads
    r"refused": "connection refused",
    r"resolv|getaddrinfo|not known|name resolution": "its address is unknown",
    r"timed ?out|time-?out|didn't respond": "no answer",
    r"ssl|certificate": "its certificate is not trusted",
    r"proxy": "the proxy refuses",
}


def reason_in(text: str, requirement: str) -> str:
    """The reason in log and output of pip for a failed download of `name==version`, and the way out."""
    name, _, version = requirement.partition("==")
    if MISMATCH in text:
        return OTHER_FILE
    if FULL.search(text):
        return NO_SPACE
    versions = VERSIONS.findall(text)
    if versions and versions[-1].strip() not in ("", "none"):
        return f"the package index has no wheel of {name} {version} for this machine; it has {versions[-1]}"
    failed = [(urlsplit(url).hostname, why) for url, why in FAILED_PAGE.findall(text) if not why.startswith("404 ")]
    for host, why in failed:
        if host:
            return f"the package index {host} cannot be reached ({_cause(why)}); {CONNECT}"
    if versions:
        return f"the package index has no wheel of a distribution {name}; check the name"
    if "No module named pip" in text:
        return NO_PIP
    if _is_broken_off(text):
        return f"the download broke off ({_cause(_last_line(text))}); try again"
    return f"pip failed ({_last_line(text)})"


def may_pass(text: str) -> bool:
    """Whether a second try may succeed. For older versions of pip, a wheel that ended early is a wheel with another hash."""
    return MISMATCH in text or _is_broken_off(text)


def _is_broken_off(text: str) -> bool:
    return FOUND in text and NETWORK.search(_last_line(text)) is not None


def _cause(why: str) -> str:
    for words, cause in CAUSES.items():
        if re.search(words, why, re.I):
            return cause
    return why[:120]


def _last_line(text: str) -> str:
    """The last line that means something: no warning, no notice, no advice."""
    lines = [line.strip() for line in text.splitlines()]
    errors = [line for line in lines if line.startswith(("ERROR:", "error:"))]
    meaning = [
        line for line in lines if line and not line.startswith(("WARNING:", "[notice]", "hint:", "note:", "╰", "│"))
    ]
    last = (errors or meaning or ["it wrote nothing"])[-1]
    if last == "ERROR: Exception:":  # a traceback follows
        last = meaning[-1]
    return last.removeprefix("ERROR:").removeprefix("error:").strip()[:200]
