"""Put examples/ and its plugin packages on the import path: they are run from there and not installed."""

from __future__ import annotations

import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path[:0] = [str(EXAMPLES), *(str(folder) for folder in sorted(EXAMPLES.glob("pitlane-*/src")))]
