"""Opening the database imports nothing that it does not need."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys
import pitlane.storage.db
assert "pandas" not in sys.modules, "0.3 s at every start"
try:
    import pandas
except ImportError as error:
    assert error.path is None and "halted" not in str(error), error
"""


def test_the_database_leaves_pandas_alone() -> None:
    result = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
