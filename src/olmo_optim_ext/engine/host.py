"""
Small tensors that the host needs to know, without ever waiting for the device.
"""

import numpy as np
import torch

__all__ = ["HostMirror"]


class HostMirror:
    """
    A copy on the host of a small tensor on a device. :meth:`update` starts the copy, and
    :meth:`read`, a step later, finds it done: the device has worked since on what was queued before
    the copy and after. For CUDA this was only reasoned; on a CPU both are plain copies.

    :param like: Gives shape and device; float32.
    """

    def __init__(self, like: torch.Tensor):
        on_cuda = like.device.type == "cuda"
        self._host = torch.zeros(like.shape, dtype=torch.float32, pin_memory=on_cuda)
        self._values = self._host.numpy()  # shares its memory
        self._copied = torch.cuda.Event() if on_cuda else None
        self.update(like)

    def update(self, source: torch.Tensor) -> None:
        """Start to copy the tensor as it will be once the device has done what is queued."""
        self._host.copy_(source, non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def read(self) -> np.ndarray:
        """The values of the last :meth:`update`; valid until the next."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values
