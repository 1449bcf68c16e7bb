"""Numbers of a few bits, packed in 32-bit words."""

import numpy as np

WORD = 32


def unpack(words: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """Unpacks numbers that follow one another along an axis from the lowest bit of the first word.

    Args:
        words: int32, of any shape. Three-bit numbers cross the borders of words, so three words hold 32 of them, and
            there must be a multiple of three words.
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
        runs = last.view(np.uint32).reshape(*last.shape[:-1], -1, bits)
        numbers = np.empty((*runs.shape[:-1], WORD), np.uint8)
        for place in range(WORD):
            word, start = divmod(place * bits, WORD)
            number = runs[..., word] >> np.uint32(start)
            if start + bits > WORD:
                number |= runs[..., word + 1] << np.uint32(WORD - start)
            numbers[..., place] = number & np.uint32(mask)
        numbers = numbers.reshape(*last.shape[:-1], -1)
    return np.moveaxis(numbers, -1, axis)


def n_words(count: int, bits: int) -> int:
    """Returns how many words hold ``count`` numbers, where a word holds whole numbers only."""
    return -(-count // (WORD // bits))
