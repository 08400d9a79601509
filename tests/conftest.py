"""What the whole suite needs."""

from __future__ import annotations

import os
import signal

# A shell that starts the suite in the background has SIGINT ignored, and every process started here would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Triton runs kernels on the CPU if this is set before its first import, and transformers imports it in other tests. Where
# there is a GPU, TRITON_INTERPRET=0 leaves the kernels to it.
os.environ.setdefault("TRITON_INTERPRET", "1")
