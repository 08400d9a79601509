"""One part of `benchmarks.gpu` in this process: python -m benchmarks.gpu.part PART OUT SECONDS [--dry-run]

OUT/scratch/PART.json has what was measured so far, from the start on, so that nothing is lost when the process is ended.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
import traceback
from pathlib import Path


def main() -> int:
    """Run the part; what goes wrong in it is a result too."""
    name, out, seconds, *dry_run = sys.argv[1:]
    if dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which is after this
    started = time.perf_counter()

    from benchmarks.gpu.__main__ import PARTS
    from benchmarks.gpu.context import Context

    context = Context.create(Path(out), deadline=time.monotonic() + float(seconds), dry_run=bool(dry_run))
    context.begin(name, PARTS[name].about)
    try:
        figures = importlib.import_module(f"benchmarks.gpu.{name}").run(context)
        result = {"status": "ok" if figures.pop("passed", True) else "failed", **figures}
    except Exception as error:
        traceback.print_exc()
        result = {"status": "failed", "error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
        result["results"] = context.entries
    context.write({**result, "seconds": time.perf_counter() - started})
    return 0


if __name__ == "__main__":
    sys.exit(main())
