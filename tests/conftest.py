"""What the whole suite needs."""

from __future__ import annotations

import signal

# A shell that starts the suite in the background has SIGINT ignored, and every process started here would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
