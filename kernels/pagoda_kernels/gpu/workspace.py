"""Memory in which decode attention leaves the partial results of split contexts."""

from __future__ import annotations

import torch

from pagoda_kernels.gpu.tuning import SegmentRule

Partials = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class DecodeWorkspace:
    """One buffer a device, shared by all layers, since they run one after the other.

    Reserved before the KV cache is sized, it never grows afterwards. A buffer that was outgrown all the same is kept: CUDA
    graphs that were captured with it go on using its address.
    """

    def __init__(self) -> None:
        self._buffers: dict[torch.device, list[torch.Tensor]] = {}

    def reserve(self, num_rows: int, num_heads: int, segments: SegmentRule, head_dim: int, device: torch.device) -> int:
        """Make room for batches of up to `num_rows` decode rows; returns the bytes now held on the device."""
        self._buffer(num_rows * num_heads * segments.max_segments * (head_dim + 2), device)
        return sum(buffer.nbytes for buffer in self._buffers[_with_index(device)])

    def partials(
        self, num_rows: int, num_heads: int, segments: SegmentRule, head_dim: int, device: torch.device
    ) -> Partials:
        """Weighted values [R, heads, segments, head_dim], maxima and sums [R, heads, segments], float32, contiguous."""
        parts = num_rows * num_heads * segments.max_segments
        buffer = self._buffer(parts * (head_dim + 2), device)
        shape = (num_rows, num_heads, segments.max_segments)
        used = buffer[: parts * (head_dim + 2)]
        weighted, maxima, sums = torch.split(used, [parts * head_dim, parts, parts])
        return weighted.view(*shape, head_dim), maxima.view(shape), sums.view(shape)

    def unused(self, device: torch.device) -> Partials:
        """Placeholders where the kernel writes no partial results."""
        buffer = self._buffer(1, device)
        return buffer, buffer, buffer

    def _buffer(self, size: int, device: torch.device) -> torch.Tensor:
        buffers = self._buffers.setdefault(_with_index(device), [])
        if not buffers or buffers[-1].numel() < size:
            buffers.append(torch.empty(size, dtype=torch.float32, device=device))
        return buffers[-1]


def _with_index(device: torch.device) -> torch.device:
    """`cuda` as tensors on it name it: with its number, without which the two devices are unequal."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


DECODE_WORKSPACE = DecodeWorkspace()
