"""Checkpoints of a Hugging Face hub: downloads are resumed and checked, silence has a deadline, and errors say what to do.

`huggingface_hub` keeps what has come of a file, asks again for the rest where a connection breaks, and compares sizes. What it
leaves out is here: a download that stands still ends, whatever waits, and what has come is compared with its hash.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pagoda.errors import CheckpointError

logger = logging.getLogger(__name__)

STALL_SECONDS = 120.0
"""Longest time without a byte, several attempts of `huggingface_hub` included (HF_HUB_DOWNLOAD_TIMEOUT is that of one)."""
_LOOK_SECONDS = 1.0
_CHUNK_BYTES = 1 << 18
_SHA256_DIGITS, _SHA1_DIGITS = 64, 40


def download(
    model: str,
    revision: str | None,
    directory: str | None,
    patterns: Sequence[str],
    ignored: Sequence[str],
    *,
    stall_seconds: float = STALL_SECONDS,
) -> Path:
    """The snapshot with the files of `model` that match `patterns`, downloaded or found in the cache.

    `revision`: a branch, tag or commit. `directory`: in place of the hub's cache. Where the hub cannot be reached, a snapshot
    in the cache is taken. Raises `CheckpointError` for a model that cannot be had, a download that stands still for
    `stall_seconds`, and a file that is not what the hub says, twice.
    """
    from huggingface_hub import constants, snapshot_download

    constants.DOWNLOAD_CHUNK_SIZE = (
        _CHUNK_BYTES  # what is lost of a connection that breaks, and seen of one that is slow
    )
    repository = Path(directory or constants.HF_HUB_CACHE) / f"models--{model.replace('/', '--')}"

    def fetch() -> Path:
        return Path(
            snapshot_download(
                model,
                revision=revision,
                cache_dir=directory,
                allow_patterns=list(patterns),
                ignore_patterns=list(ignored),
            )
        )

    broken: list[str] = []
    for _ in range(2):
        before = set(_blobs(repository))
        try:
            snapshot = _while_it_moves(fetch, repository, model, stall_seconds)
        except Exception as error:  # of the hub's library, its HTTP client, the file system: each is a sentence here
            raise _explained(error, model, revision, repository) from error
        broken = [blob.name for blob in set(_blobs(repository)) - before if not _is_whole(blob)]
        if not broken:
            return snapshot
        logger.warning("%s: %d files are not what the hub says; they are downloaded again", model, len(broken))
        for name in broken:
            (repository / "blobs" / name).unlink()
    raise CheckpointError(
        f"{model}: what {constants.ENDPOINT} sends has not the hash {broken[0]} that it names, twice: a broken mirror or proxy"
    )


def _while_it_moves(fetch: Callable[[], Path], repository: Path, model: str, stall_seconds: float) -> Path:
    """The result of `fetch`; raises `TimeoutError` when nothing has come for so long. Its thread is left to itself then."""
    results: list[Path] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(fetch())
        except BaseException as error:  # handed to the thread that waits
            errors.append(error)

    thread = threading.Thread(target=run, name="hub-download", daemon=True)
    thread.start()
    seen, since = -1, time.monotonic()
    while thread.is_alive():
        thread.join(min(_LOOK_SECONDS, stall_seconds / 4))
        num_bytes = _num_bytes(repository)
        if num_bytes != seen:
            seen, since = num_bytes, time.monotonic()
        elif thread.is_alive() and time.monotonic() - since > stall_seconds:
            raise TimeoutError(f"no byte has come for {stall_seconds:g} s, {max(0, seen)} are there")
    if errors:
        raise errors[0]
    return results[0]


def _blobs(repository: Path) -> Iterator[Path]:
    """The files of a repository in the cache, which have the names of their hashes."""
    try:
        names = os.listdir(repository / "blobs")
    except OSError:
        return
    for name in names:
        if len(name) in (_SHA256_DIGITS, _SHA1_DIGITS):
            yield repository / "blobs" / name


def _num_bytes(repository: Path) -> int:
    total = 0
    try:
        for entry in os.scandir(repository / "blobs"):
            total += entry.stat().st_size
    except OSError:
        return total
    return total


def _is_whole(blob: Path) -> bool:
    """Whether a file has the hash that it is named by: sha256 of large files, git's of small ones."""
    is_large = len(blob.name) == _SHA256_DIGITS
    digest = hashlib.sha256() if is_large else hashlib.sha1(usedforsecurity=False)
    if not is_large:
        digest.update(f"blob {blob.stat().st_size}\0".encode())
    with blob.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest() == blob.name


def _explained(error: Exception, model: str, revision: str | None, repository: Path) -> CheckpointError:
    """The error as a sentence that says what to do."""
    from huggingface_hub import constants, errors

    hub = constants.ENDPOINT
    if isinstance(error, errors.GatedRepoError):
        return CheckpointError(
            f"{model} at {hub} is gated: ask for access on its page, and set HF_TOKEN to a token that has it"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return CheckpointError(f"{model} at {hub} has no revision {revision!r}")
    if isinstance(error, errors.RepositoryNotFoundError):
        return CheckpointError(
            f"there is no model {model} at {hub}, or it is private: set HF_TOKEN to a token that may read it"
        )
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        reason = "HF_HUB_OFFLINE forbids to ask" if constants.HF_HUB_OFFLINE else f"{hub} cannot be reached"
        return CheckpointError(
            f"there is no directory {model}, it is not in the Hugging Face cache {repository.parent}, and {reason}"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CheckpointError(f"{model} does not fit: no space is left in {repository.parent}")
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS):
        return CheckpointError(f"{model} cannot be written to {repository.parent}: {error.strerror}")
    text = " ".join(str(error).split())[:300]
    return CheckpointError(
        f"{model} could not be had from {hub}: {text or type(error).__name__}; what came is kept and resumed"
    )
