"""What the server's process gives itself: open files, and an end that comes whatever holds it up."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

from pagoda.serving.http.listener import MAX_OPEN_FILES, raise_open_file_limit

HANGS = "import time; from pagoda.serving import forced_exit; forced_exit.force_exit_after(0.2, {status}); {then}"


@pytest.mark.parametrize(("then", "expected"), [("time.sleep(60)", 7), ("pass", 0)])
def test_a_process_that_hangs_while_it_ends_is_ended_with_its_status(then: str, expected: int) -> None:
    code = HANGS.format(status=7, then=then)
    done = subprocess.run([sys.executable, "-c", code], timeout=50, capture_output=True, text=True)
    assert done.returncode == expected


def test_the_soft_limit_of_open_files_is_raised_and_never_lowered() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        raise_open_file_limit()
        raised, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert raised == (MAX_OPEN_FILES if before[1] == resource.RLIM_INFINITY else min(before[1], MAX_OPEN_FILES))
        raise_open_file_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (raised, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
