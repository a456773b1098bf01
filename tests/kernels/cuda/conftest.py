"""The Triton kernels by Triton's interpreter: `TRITON_INTERPRET=1 python -m pytest tests/kernels/cuda`, a process of its own.

Triton reads the variable when it is imported. Without it, only the tests that compile are collected.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

if find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]
elif os.environ.get("TRITON_INTERPRET") == "1":
    collect_ignore_glob = ["test_compile.py"]
else:
    collect_ignore_glob = [
        path.name for path in Path(__file__).parent.glob("test_*.py") if path.name != "test_compile.py"
    ]
