"""A grid for all finite numbers that nobody has to agree on, and counts on it."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Codes = NDArray[np.int64]

FINE_BITS = 5
COARSE_BITS = 3

_MANTISSA_BITS = 23
LARGEST = float(np.finfo(np.float32).max)
"""Beyond it, either way, a number is not compared nor judged: the sums of its fourth powers would
be infinite, and all figures with them."""


def is_finite(values: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which are numbers up to `LARGEST`."""
    finite: NDArray[np.bool_] = np.abs(values) <= LARGEST
    return finite


def codes(values: NDArray[np.float64], bits: int = FINE_BITS) -> Codes:
    """The bin of each finite number: the sign, exponent and first `bits` bits of the mantissa of
    the float32 that is next to it.

    They are in the order of the numbers, 0 is that of exactly 0, and -c mirrors c. A bin is
    2^-bits of its lower end wide at most. What is beyond float32 is in the last bin.
    """
    near = np.clip(values, -LARGEST, LARGEST).astype(np.float32)
    magnitudes = (near.view(np.int32) & 0x7FFF_FFFF) >> (_MANTISSA_BITS - bits)
    return np.sign(values).astype(np.int64) * (magnitudes + 1)


def edges(
    bins: ArrayLike, bits: int = FINE_BITS
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The lower and the upper end of each bin, those of 0 being 0."""
    of = np.asarray(bins, dtype=np.int64)
    magnitudes = np.abs(of)
    inner = _number(np.maximum(magnitudes - 1, 0), bits)
    outer = _number(magnitudes, bits)
    low = np.where(of > 0, inner, np.where(of < 0, -outer, 0.0))
    high = np.where(of > 0, outer, np.where(of < 0, -inner, 0.0))
    return low, high


def middles(bins: ArrayLike, bits: int = FINE_BITS) -> NDArray[np.float64]:
    """What stands for the numbers of each bin: none of them is further from it than 2^-(bits + 1)
    of itself, but for those below the smallest normal float32, 1.2e-38."""
    low, high = edges(bins, bits)
    return (low + high) / 2


def _number(magnitudes: Codes, bits: int) -> NDArray[np.float64]:
    floats = (magnitudes << (_MANTISSA_BITS - bits)).astype(np.int32).view(np.float32)
    return np.minimum(floats.astype(np.float64), LARGEST)
