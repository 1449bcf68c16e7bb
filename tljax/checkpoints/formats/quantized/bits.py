"""Numbers of a few bits, packed in 32-bit words."""

import numpy as np

WORD = 32


def unpack(words: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """Unpacks numbers that follow one another along an axis from the lowest bit of the first word.

    Args:
        words: int32, of any shape. Three-bit numbers cross the borders of words, so three words hold 32 of them.
        bits: how many bits a number has.
        axis: the packed axis.

    Returns:
        uint8, ``32 / bits`` times as long along ``axis``.

    >>> import numpy as np
    >>> unpack(np.array([0x76543210], np.int32), 4, 0)
    array([0, 1, 2, 3, 4, 5, 6, 7], dtype=uint8)
    """
    last = np.ascontiguousarray(np.moveaxis(words, axis, -1), "<i4")
    mask = (1 << bits) - 1
    if 8 % bits == 0:
        octets = last.view(np.uint8)[..., None]
        numbers = (octets >> np.arange(0, 8, bits, dtype=np.uint8)) & np.uint8(mask)
        numbers = numbers.reshape(*last.shape[:-1], -1)
    else:
        length = last.shape[-1]
        starts = np.arange(length * WORD // bits) * bits
        unsigned = last.view(np.uint32)
        low = unsigned[..., starts // WORD].astype(np.uint64)
        high = unsigned[..., np.minimum(starts // WORD + 1, length - 1)].astype(np.uint64)
        shifted = (low | high << np.uint64(WORD)) >> (starts % WORD).astype(np.uint64)
        numbers = (shifted & np.uint64(mask)).astype(np.uint8)
    return np.moveaxis(numbers, -1, axis)


def n_words(count: int, bits: int) -> int:
    """Returns how many words hold ``count`` numbers, where a word holds whole numbers only."""
    return -(-count // (WORD // bits))
