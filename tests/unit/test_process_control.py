"""Processes that outlive their parents are taken in by the one that is responsible for them, and leave no zombies."""

import subprocess
import sys

SCRIPT = """
import os, subprocess, sys, time
from pagoda.process_control import become_subreaper, reap_orphans

become_subreaper()
# A child that stays, and one that leaves a grandchild behind, which then ends.
own = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
leave = "import subprocess; print(subprocess.Popen(['sleep', '0.2'], stdout=subprocess.DEVNULL).pid)"
orphan = int(subprocess.run([sys.executable, "-c", leave], capture_output=True, text=True).stdout)
parent = int(open(f"/proc/{orphan}/stat").read().rpartition(")")[2].split()[1])
deadline = time.monotonic() + 20
while os.path.exists(f"/proc/{orphan}") and time.monotonic() < deadline:
    reap_orphans(own.pid)
    time.sleep(0.05)
own.kill()
time.sleep(0.3)
reap_orphans(own.pid)
print(parent == os.getpid(), os.path.exists(f"/proc/{orphan}"), own.wait())
"""


def test_orphans_are_taken_in_and_let_go_and_a_child_of_ones_own_is_left_alone() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == ["True", "False", "-9"], done.stderr
