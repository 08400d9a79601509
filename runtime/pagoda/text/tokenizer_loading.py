"""Loads a tokenizer.json that anyone may have made.

The library that reads it holds the interpreter lock meanwhile, and a file can make it panic, take all memory, which ends the
process, or never come back. So a file is first loaded, and tried, in a process with limits; what it passed there it does here.
"""

from __future__ import annotations

import hashlib
import json
import resource
import signal
import subprocess
import sys
from pathlib import Path

from tokenizers import Tokenizer as TokenizersTokenizer

from pagoda.errors import CheckpointError
from pagoda.models.checkpoint_files import read_file, shown_reason
from pagoda.process_control import NICENESS, environment_of_parser, lower_process_priority
from pagoda.text.tokenizer_bounds import check_steps, matches_in_decoder

TOKENIZER_FILE = "tokenizer.json"
MAX_TOKENIZER_BYTES = 64 << 20

# The largest there are have 35 MB, which take about 3 s and 300 MB of memory.
_MAX_SECONDS = 60.0
_MEMORY_BYTES = 1 << 30
_MEMORY_BYTES_PER_BYTE = 32
# One thread with one heap: the limit is one of address space, of which each takes much.
_ENVIRONMENT = {
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MALLOC_ARENA_MAX": "1",
    "RUST_BACKTRACE": "0",
}

_SAMPLE_TEXTS = (
    "",
    " ",
    "Hello, world!\n\n",
    "".join(map(chr, range(32, 127))),
    "塔 🙂 é e\u0301 \ufdfa \u200d \ufffd\t\r\n",
    "a" * 100,
)

_passed: set[bytes] = set()


def is_panic(error: BaseException) -> bool:
    """Whether a library in Rust came to a state that it does not provide for; the exception for that is no `Exception`."""
    return type(error).__name__ == "PanicException"


def read_tokenizer_json(directory: Path) -> tuple[bytes, bytes]:
    """The content of tokenizer.json, and its digest. Raises `CheckpointError`: it cannot be read, or is too large."""
    data = read_file(directory, TOKENIZER_FILE, MAX_TOKENIZER_BYTES)
    return data, hashlib.blake2b(data).digest()


def load_tokenizer_json(directory: Path, data: bytes, digest: bytes) -> TokenizersTokenizer:
    """The tokenizer that `data`, tokenizer.json of the checkpoint in `directory`, describes.

    Raises `CheckpointError`: the library does not take it or does not survive it, or its steps are beyond the bounds of
    `tokenizer_bounds`.
    """
    if digest not in _passed:
        problem = _try_in_process(data)
        if problem is not None:
            raise CheckpointError(f"{directory / TOKENIZER_FILE}: {problem}")
        _passed.add(digest)
    return TokenizersTokenizer.from_buffer(data)


def _try_in_process(data: bytes) -> str | None:
    """The error in the content of a tokenizer.json, without the file's name; None if there is none."""
    with subprocess.Popen(
        [sys.executable, "-m", "pagoda.text.tokenizer_loading"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment_of_parser(_ENVIRONMENT),
    ) as ended:
        lower_process_priority(ended.pid, NICENESS)
        try:
            answer, _ = ended.communicate(data, timeout=_MAX_SECONDS)
        except BaseException as error:  # raised on, but for one: without the process
            ended.kill()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return f"the tokenizers library was not done with it after {_MAX_SECONDS:g} s"
    if ended.returncode < 0:
        name = signal.Signals(-ended.returncode).name
        return f"it ends the process that loads it ({name}), as a file does that takes too much memory"
    if ended.returncode > 0:
        return f"the process that loads it ended with status {ended.returncode}"
    problem: str | None = json.loads(answer)
    return problem


def _problem_of(data: bytes) -> str | None:
    """Load and try a tokenizer; see `_try_in_process`."""
    try:
        backend = TokenizersTokenizer.from_buffer(data)
        check_steps(backend)
        backend.no_truncation()
        backend.no_padding()
        token_ids: set[int] = set()
        for add_special_tokens in (True, False):
            encodings = backend.encode_batch_fast(list(_SAMPLE_TEXTS), add_special_tokens=add_special_tokens)
            token_ids.update(*(encoding.ids for encoding in encodings))
        if matches_in_decoder(backend):
            token_ids.update(backend.get_vocab(with_added_tokens=True).values())
        backend.decode_batch([[token_id] for token_id in token_ids])
    except CheckpointError as error:
        return str(error)
    except MemoryError:
        return "it takes too much memory"
    except BaseException as error:  # the library raises bare Exception for faults of the file, and panics
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        return f"the tokenizers library cannot use it: {shown_reason(error)}"
    return None


def main() -> None:
    """Read the content of a tokenizer.json from standard input, and write what is wrong with it to standard output."""
    data = sys.stdin.buffer.read()
    with open("/proc/self/statm", encoding="ascii") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    limit = used + _MEMORY_BYTES + _MEMORY_BYTES_PER_BYTE * len(data)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.stdout.write(json.dumps(_problem_of(data)))


if __name__ == "__main__":
    main()
