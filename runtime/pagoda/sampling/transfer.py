"""Copies of small arrays between host and device: free on a CPU, asynchronous on a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def to_device(array: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    """A tensor on `device` with the values of `array`; on a CPU it shares its memory."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def all_to_device(arrays: Sequence[npt.NDArray[np.generic]], device: torch.device) -> Sequence[Tensor]:
    """The same for several one-dimensional arrays of one dtype; they cross to a GPU in one copy."""
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    return torch.split(to_device(np.concatenate(arrays), device), [array.size for array in arrays])


def to_host(tensor: Tensor) -> Tensor:
    """A tensor on the host that will hold the values of `tensor` once the device has come so far (`DeviceEvent.wait`)."""
    if tensor.device.type == "cpu":
        return tensor
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


class DeviceEvent:
    """A point in the work given to a device so far."""

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def wait(self) -> None:
        """Return when the device has passed this point. Errors of the device's work up to it are raised here."""
        if self._event is not None:
            self._event.synchronize()
