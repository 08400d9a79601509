"""What the API process imports, and what it does not."""

from __future__ import annotations

import subprocess
import sys

FRONTENDS = """
import sys
import pagoda.serving.build, pagoda.serving.frontends
print(sorted({name.split(".")[0] for name in sys.modules} & {"kserve", "kubernetes", "pandas", "torch", "transformers"}))
"""


def test_a_server_imports_neither_kserve_nor_what_only_the_engine_needs() -> None:
    """KServe's SDK brings its client of clusters and pandas: half of what a server would import, and half of its memory."""
    done = subprocess.run([sys.executable, "-c", FRONTENDS], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"
