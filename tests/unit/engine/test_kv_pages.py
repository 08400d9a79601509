from __future__ import annotations

import errno
import threading

import pytest
import torch

from pagoda.execution import kv_pages
from pagoda.execution.kv_pages import KVPages


@pytest.fixture
def populated(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What is populated, in order: each piece is set to one more than it was."""
    pieces: list[torch.Tensor] = []

    def populate(piece: torch.Tensor) -> None:
        piece.add_(1)
        pieces.append(piece)

    monkeypatch.setattr(kv_pages, "populate", populate)
    monkeypatch.setattr(kv_pages, "FIRST_SHARE_BYTES", 4096)
    monkeypatch.setattr(kv_pages, "_PIECE_BYTES", 1024)
    return pieces


def end_of(pages: KVPages) -> None:
    assert pages._thread is not None
    pages._thread.join(30)


def test_a_first_share_of_all_tensors_is_taken_at_once_and_all_of_them_in_the_background(populated) -> None:
    tensors = [torch.zeros(100, 256, dtype=torch.uint8) for _ in range(3)] + [torch.zeros(10, 7, dtype=torch.uint8)]
    pages = KVPages(tensors)
    pages.populate_first()
    first = populated[: len(tensors)]
    assert [piece.data_ptr() for piece in first] == [tensor.data_ptr() for tensor in tensors]
    assert 3000 < sum(piece.nbytes for piece in first) < 6000
    assert len(populated) == len(tensors)  # and nothing else before the first step
    pages.populate_rest()
    end_of(pages)
    for tensor in tensors:  # what was taken at first is taken once more, which costs nothing; nothing else is twice
        by_block = tensor[:, 0].tolist()
        assert set(by_block) == {1, 2}
        assert by_block == sorted(by_block, reverse=True)
    later = [piece for piece in populated[len(tensors) :] if piece.shape[1] == 256]
    starts = [piece.data_ptr() - tensors[index % 3].data_ptr() for index, piece in enumerate(later)]
    assert starts == sorted(starts)  # in the order of blocks, not of tensors


def test_a_small_cache_is_all_taken_at_once(populated) -> None:
    tensor = torch.zeros(4, 256, dtype=torch.uint8)
    pages = KVPages([tensor])
    pages.populate_first()
    pages.populate_rest()
    assert set(tensor.flatten().tolist()) == {1}


def test_stopping_ends_the_thread_at_its_piece(populated, monkeypatch: pytest.MonkeyPatch) -> None:
    at_piece, go_on = threading.Event(), threading.Event()
    count = 0

    def populate(piece: torch.Tensor) -> None:
        nonlocal count
        count += 1
        if count == 3:
            at_piece.set()
            assert go_on.wait(30)

    monkeypatch.setattr(kv_pages, "populate", populate)
    pages = KVPages([torch.zeros(1000, 256, dtype=torch.uint8)])
    pages.populate_first()
    pages.populate_rest()
    assert at_piece.wait(30)
    threading.Timer(0.05, go_on.set).start()
    pages.stop()
    assert count == 3


def test_where_the_system_cannot_populate_all_is_written_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(piece: torch.Tensor) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(kv_pages, "populate", refuse)
    tensor = torch.ones(4, 256, dtype=torch.uint8)
    pages = KVPages([tensor])
    pages.populate_first()
    pages.populate_rest()
    assert not tensor.any()


def test_memory_that_is_short_is_an_error_at_first_and_told_later(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    calls = 0

    def short(piece: torch.Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(kv_pages, "populate", short)
    monkeypatch.setattr(kv_pages, "FIRST_SHARE_BYTES", 4096)
    pages = KVPages([torch.zeros(1000, 256, dtype=torch.uint8)])
    pages.populate_first()
    pages.populate_rest()
    end_of(pages)
    assert "out of memory" in caplog.text
    with pytest.raises(MemoryError, match="the first"):
        pages.populate_first()
