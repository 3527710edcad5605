"""Filling a new table with normal numbers, in parallel: what makes the construction of a large layer quick.

Torch draws on one thread, which for a table of ten million rows takes longer than everything else at the start.
Here the values are cut into chunks of a fixed size, and each chunk has a generator of its own, seeded with the seed
and the number of the chunk: however many threads share the chunks, the values are the same. They are not torch's,
and another version of NumPy may draw or round others: what must not change is saved.

    fill_normal(values, seed=0)

What does not fit into memory at once is drawn piece by piece, each told how many values come before it.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

_CHUNK = 1 << 18  # values: 1 MiB of float32, which stays in a core's cache until it is converted
_ROUNDED = 1 << 14  # values converted at a time: few enough for torch not to start threads of its own
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def fill_normal(values: Tensor, seed: int, start: int = 0) -> None:
    """Draw every value from the normal distribution with mean 0 and variance 1.

    Args:
        values: any shape, on the CPU, contiguous; float32, float64, or float16 and bfloat16, rounded from float32.
        seed: 0 or more.
        start: how many values of the same table come before these. Pieces that are filled one by one hold what the
            whole table would, if each begins at a multiple of 2^18 values.

    Raises:
        ValueError: another dtype or device, gaps between the values, a negative seed, or a start within a chunk.
    """
    if values.dtype not in _DTYPES or values.device.type != "cpu" or not values.is_contiguous():
        raise ValueError(
            f"values of shape {tuple(values.shape)}, {values.dtype} on {values.device}: "
            "give contiguous floating point numbers on the CPU"
        )
    if seed < 0:
        raise ValueError(f"seed={seed}: must be at least 0")
    if start < 0 or start % _CHUNK:
        raise ValueError(f"start={start}: pieces begin at multiples of {_CHUNK} values")
    chunks = list(enumerate(values.detach().view(-1).split(_CHUNK), start // _CHUNK))
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:
        # A thread is in no mode of the caller's, and without it may not write to what was made there.
        inference = values.is_inference()
        started = [pool.submit(_fill_share, chunks[first::threads], seed, inference) for first in range(threads)]
    for share in started:
        share.result()


def _fill_share(share: list[tuple[int, Tensor]], seed: int, inference: bool) -> None:
    """What one thread does, with one scratch memory for all its chunks."""
    scratch = np.empty((3, _CHUNK), dtype=np.float32)
    for number, chunk in share:
        generator = np.random.Generator(np.random.SFC64(np.random.SeedSequence(seed, spawn_key=(number,))))
        if chunk.dtype == torch.float64:
            generator.standard_normal(out=chunk.numpy())
        elif chunk.dtype == torch.float32:
            _draw(generator, chunk.numpy(), scratch)
        else:
            drawn = scratch[2, : len(chunk)]
            _draw(generator, drawn, scratch)
            with torch.inference_mode(inference):
                for part, rounded in zip(torch.from_numpy(drawn).split(_ROUNDED), chunk.split(_ROUNDED)):
                    rounded.copy_(part)


def _draw(generator: np.random.Generator, out: np.ndarray, scratch: np.ndarray) -> None:
    """Normal numbers for float32 `out` [n]: the cosines first, then the sines; none is beyond 5.8."""
    # Two uniform numbers u, v give two normal ones, sqrt(-2 log u) times the cosine and the sine of 2 pi v (Box and
    # Muller, 1958): whole arrays in less time than torch needs, where NumPy's own take three times as long as torch's.
    pairs = (len(out) + 1) // 2
    radius, angle = scratch[0, :pairs], scratch[1, :pairs]
    _uniform(generator, radius)
    np.subtract(np.float32(1), radius, out=radius)  # in (0, 1]
    np.log(radius, out=radius)
    radius *= np.float32(-2)
    np.sqrt(radius, out=radius)
    _uniform(generator, angle)
    angle *= np.float32(2 * np.pi)
    np.cos(angle, out=out[:pairs])
    np.sin(angle[: len(out) - pairs], out=out[pairs:])
    out[:pairs] *= radius
    out[pairs:] *= radius[: len(out) - pairs]


def _uniform(generator: np.random.Generator, out: np.ndarray) -> None:
    """Multiples of 2^-24 in [0, 1) for float32 `out` [n]; two from each 64 bits, in half the generator's own time."""
    bits = generator.bit_generator.random_raw((len(out) + 1) // 2).view(np.int32)[: len(out)]
    np.bitwise_and(bits, 0xFFFFFF, out=bits)
    np.copyto(out, bits)
    out *= np.float32(2**-24)
