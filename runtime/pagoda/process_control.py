"""What the child processes of a server have in common: they end with their parent, and not by signals meant for it."""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TypeVar

T = TypeVar("T")

# Dumps the stacks of all threads to stderr, without ending the process.
STACKS_SIGNAL = signal.SIGUSR1

_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)
_SET_CHILD_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER

NICENESS = 5
"""Of what tokenizes: the engine, whose steps all requests wait for, goes first where processors are scarce."""
LOADING_NICENESS = 10
"""Of imports and start of an engine beside others that serve, which keep their time between tokens. It has what they leave,
and a tenth of a core where they leave none.
"""
_NICEST = 19
_SWITCH_SECONDS = sys.getswitchinterval()
_SHORT_SWITCH_SECONDS = 0.1 * _SWITCH_SECONDS

_owner = os.getpid()
_num_computing = 0
_computing = threading.Lock()


# Of an environment, what a process needs that parses what may be hostile. HF_TOKEN and the like are not among it.
_PLAIN = frozenset(
    {"PATH", "HOME", "LANG", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "XDG_CACHE_HOME", "HF_HOME"}
)
_PLAIN_PREFIXES = ("LC_", "PYTHON", "HF_MODULES", "HF_HUB_OFFLINE", "TOKENIZERS_", "RAYON_", "MALLOC_", "COVERAGE_")
_API_KEYS = ("PAGODA_API_KEY", "PAGODA_ADMIN_KEY", "VLLM_API_KEY")


def environment_of_parser(added: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a child process that parses what clients or checkpoints hold: no secrets of this one's."""
    kept = {name: value for name, value in os.environ.items() if name in _PLAIN or name.startswith(_PLAIN_PREFIXES)}
    return {**kept, **(added or {})}


def environment_without_keys() -> dict[str, str]:
    """The environment of an engine core, and so of its ranks: all of it but the API keys, which only the server compares."""
    return {name: value for name, value in os.environ.items() if not name.startswith(_API_KEYS)}


def owner_process() -> int:
    """Id of the process that this one runs for: its parent if it is a child of a server, else itself."""
    return _owner


def become_child() -> None:
    """Set up this process as one that its parent ends, and that does not outlive it."""
    global _owner
    _owner = os.getppid()
    # The terminal's Ctrl-C and the pod's SIGTERM are for the parent, which ends this process in order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end_with_parent(signal.SIGKILL)
    faulthandler.enable()
    faulthandler.register(STACKS_SIGNAL, all_threads=True)


def lower_thread_priority(niceness: int) -> None:
    """Let other threads of the machine go first, by `nice(2)` more; on Linux the calling thread alone, elsewhere nothing."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, min(_NICEST, os.getpriority(os.PRIO_PROCESS, thread) + niceness))


def lower_process_priority(pid: int, niceness: int) -> None:
    """Let others go before a child that has just been started, from its first instruction on."""
    with suppress(ProcessLookupError):
        os.setpriority(os.PRIO_PROCESS, pid, min(_NICEST, os.getpriority(os.PRIO_PROCESS, 0) + niceness))


def with_lower_priority(work: Callable[[], T], niceness: int) -> T:
    """What `work` returns or raises in a thread of its own, of lower priority, which threads that it starts have, too.

    The calling thread's own priority could not be raised again. Without `niceness` it does the work itself.
    """
    if not niceness:
        return work()
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        lower_thread_priority(niceness)
        try:
            results.append(work())
        except BaseException as error:  # raised on, in the calling thread
            errors.append(error)

    thread = threading.Thread(target=run, name="lower-priority")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


@contextmanager
def short_switches() -> Iterator[None]:
    """A thread that computes long in Python, beside an event loop that must not wait for it: others get the interpreter ten
    times as soon.
    """
    global _num_computing
    with _computing:
        _num_computing += 1
        sys.setswitchinterval(_SHORT_SWITCH_SECONDS)
    try:
        yield
    finally:
        with _computing:
            _num_computing -= 1
            if not _num_computing:
                sys.setswitchinterval(_SWITCH_SECONDS)


@contextmanager
def uncollected() -> Iterator[None]:
    """Imports, by the process that owns the interpreter: without collections meanwhile, nor of what they made later.

    They make hundreds of thousands of objects that stay: collecting among them takes a tenth of `import torch`'s time.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def end_with_parent(signal_number: int) -> None:
    """Have the kernel send this process a signal when its parent ends. Elsewhere than on Linux nothing happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_SET_PARENT_DEATH_SIGNAL, signal_number)


def become_subreaper() -> None:
    """Adopt descendants whose parents end, as the first process of a container has to anyway; see `reap_orphans`."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_SET_CHILD_SUBREAPER, 1)


def reap_orphans(child: int) -> None:
    """Reap every adopted descendant that has exited; `child` is left to whoever started it."""
    while sys.platform == "linux":
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if ended is None or ended.si_pid == child:
            return
        os.waitpid(ended.si_pid, 0)
