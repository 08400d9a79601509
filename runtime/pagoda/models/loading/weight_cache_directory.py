"""Where files of packed weights lie, and how many of them."""

from __future__ import annotations

import logging
import os
import shutil
import threading
from contextlib import suppress
from pathlib import Path

from pagoda.config.values import format_bytes
from pagoda.models.loading.weight_cache import CachedWeights, WeightCacheError, WeightsToCache

logger = logging.getLogger(__name__)

SMALLEST_BYTES = 64 << 20
"""Smaller weights are packed in less time than it is worth to keep a file."""
FOLDER = ".pagoda"
_SUFFIX = ".weights"


class WeightCacheDirectory:
    """Files of packed weights by their keys, of at most `max_bytes` in all; the one that was not used for longest goes first.

    `directories`: the first that can be written to is written to, a file is looked for in all. Whatever is wrong with
    directories and files is logged, and weights are then packed as they are without.
    """

    def __init__(self, directories: list[Path], max_bytes: int) -> None:
        self._directories = directories
        self._max_bytes = max_bytes

    @classmethod
    def of(cls, setting: str, model: Path, max_bytes: int) -> WeightCacheDirectory | None:
        """`setting`: `weight_cache_dir`; `model`: directory or file of the checkpoint. None where there is to be none."""
        if setting == "none":
            return None
        if setting != "auto":
            return cls([Path(setting)], max_bytes)
        beside = (model if model.is_dir() else model.parent) / FOLDER
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        return cls([beside, cache / "pagoda" / "weights"], max_bytes)

    def open(self, key: str) -> CachedWeights | None:
        """The weights of that key, if there is a file of them that is whole."""
        for directory in self._directories:
            file = self._file(directory, key)
            try:
                cached = CachedWeights.open(file, key)
                with suppress(OSError):  # for the order in which files go; a directory may be read-only
                    os.utime(file)
                return cached
            except FileNotFoundError:
                continue
            except (OSError, WeightCacheError) as error:
                self.refuse(file, error)
        return None

    def refuse(self, file: Path, reason: Exception) -> None:
        """Say that a file is not used, and remove it so that it can be written anew."""
        logger.warning("%s is not used, the weights are read from the checkpoint: %s", file, reason)
        with suppress(OSError):
            file.unlink()

    def write(self, weights: WeightsToCache, key: str, stopping: threading.Event) -> None:
        """Write a file of them, where there is room for it, and delete others that have become too many."""
        if weights.nbytes < SMALLEST_BYTES:
            return
        if weights.nbytes > self._max_bytes:
            logger.info(
                "packed weights are not cached: %s are more than weight_cache_max_bytes=%s",
                format_bytes(weights.nbytes),
                format_bytes(self._max_bytes),
            )
            return
        reasons = []
        for directory in self._directories:
            try:
                directory.mkdir(parents=True, exist_ok=True)
                free = shutil.disk_usage(directory).free
                if free < 2 * weights.nbytes:
                    reasons.append(f"{directory} has {format_bytes(free)} free, less than twice what they take")
                    continue
                self._make_room(directory, weights.nbytes)
                if weights.write(self._file(directory, key), stopping):
                    logger.info(
                        "packed weights (%s) are in %s: the next start maps them",
                        format_bytes(weights.nbytes),
                        self._file(directory, key),
                    )
                return
            except OSError as error:
                reasons.append(str(error))
        logger.info("packed weights are not cached (weight_cache_dir): %s", "; ".join(reasons))

    def _file(self, directory: Path, key: str) -> Path:
        return directory / f"{key}{_SUFFIX}"

    def _make_room(self, directory: Path, num_bytes: int) -> None:
        """Delete files until `num_bytes` more are within the bound."""
        by_age = sorted((file.stat().st_mtime, file.stat().st_size, file) for file in directory.glob(f"*{_SUFFIX}"))
        held = sum(size for _, size, _ in by_age)
        for _, size, file in by_age:
            if held + num_bytes <= self._max_bytes:
                return
            file.unlink(missing_ok=True)
            held -= size
            logger.info("%s is deleted: weight_cache_max_bytes=%s", file, format_bytes(self._max_bytes))
