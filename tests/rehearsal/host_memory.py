"""Page-locked host memory: registered ranges that refuse to overlap, counted when the process ends.

`RUNTIME` stands for `torch.cuda.cudart()`. Memory that torch allocated page-locked is a range, too, and is let go of
together with its tensor.
"""

import weakref

import torch

INSIDE, ACROSS, OUTSIDE = "inside one range", "across the end of a range", "in no range"
_ALREADY, _NOT_REGISTERED = 712, 713  # cudaErrorHostMemoryAlreadyRegistered, cudaErrorHostMemoryNotRegistered


class Runtime:
    """What is used of CUDA's runtime.

    Attributes:
        registered: bytes by address, of cudaHostRegister.
        allocated: likewise, of torch's own page-locked tensors.
        refused: registrations that overlapped another, and endings of some that were not there.
    """

    def __init__(self) -> None:
        self.registered: dict[int, int] = {}
        self.allocated: dict[int, int] = {}
        self.refused: list[str] = []

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        """0, or the number of the error."""
        for first, size in self.registered.items():
            if address < first + size and first < address + nbytes:
                self.refused.append(f"{nbytes} B at {address:#x}: {size} B at {first:#x} are registered already")
                return _ALREADY
        self.registered[address] = nbytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        """0, or the number of the error."""
        if self.registered.pop(address, None) is None:
            self.refused.append(f"{address:#x} is not registered")
            return _NOT_REGISTERED
        return 0

    def allocate(self, tensor: torch.Tensor) -> torch.Tensor:
        """Call a tensor's memory page-locked for as long as it lives."""
        storage = tensor.untyped_storage()
        if storage.nbytes():
            address = storage.data_ptr()
            self.allocated[address] = storage.nbytes()
            weakref.finalize(storage, self.allocated.pop, address, None)
            tensor._page_locked = storage  # the same object, or it would be let go of at once
        return tensor

    def holds(self, address: int, nbytes: int) -> str:
        """INSIDE, ACROSS or OUTSIDE."""
        for ranges in (self.registered, self.allocated):
            for first, size in ranges.items():
                if first <= address < first + size:
                    return INSIDE if address + nbytes <= first + size else ACROSS
                if address < first < address + nbytes:
                    return ACROSS
        return OUTSIDE

    def holds_all(self, address: int, nbytes: int) -> bool:
        """Whether every byte lies in some registered range: what a kernel needs."""
        end = address + nbytes
        while address < end:
            ends = [
                first + size
                for ranges in (self.registered, self.allocated)
                for first, size in ranges.items()
                if first <= address < first + size
            ]
            if not ends:
                return False
            address = max(ends)
        return True


RUNTIME = Runtime()
