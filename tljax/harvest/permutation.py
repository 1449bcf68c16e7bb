"""Seeded permutations that need no memory: any entry is computed from its index."""

import numpy as np

_ROUNDS = 4
_ODD = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def permute(index: np.ndarray, size: int, *key: int) -> np.ndarray:
    """Returns the entries of a random permutation of ``0 .. size - 1`` at these indices.

    A Feistel network over ``a * b >= size`` numbers, applied again to those that fall outside (at most one in a hundred
    for sizes that matter): Black and Rogaway, *Ciphers with Arbitrary Finite Domains* (2002).

    Args:
        index: which entries, each below ``size``.
        size: of the permutation.
        *key: whole numbers that choose it.

    Returns:
        int64, shaped like ``index``.

    >>> sorted(permute(np.arange(10), 10, 0, 1).tolist()) == list(range(10))
    True
    """
    b = np.uint64(int(np.ceil(np.sqrt(size))))
    a = np.uint64(-(-size // int(b)))
    keys = [_mixed(np.asarray([number], np.uint64), _folded(key)) for number in range(2 * _ROUNDS)]
    values = np.asarray(index).astype(np.uint64).reshape(-1)
    pending = np.arange(len(values))
    with np.errstate(over="ignore"):
        while len(pending):
            left, right = np.divmod(values[pending], b)
            for number in range(0, 2 * _ROUNDS, 2):
                left = (left + _mixed(right, keys[number])) % a
                right = (right + _mixed(left, keys[number + 1])) % b
            values[pending] = left * b + right
            pending = pending[values[pending] >= np.uint64(size)]
    return values.astype(np.int64).reshape(np.shape(index))


def _mixed(values: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Hashes whole numbers (the finaliser of splitmix64), into 32 bits so that sums cannot overflow."""
    with np.errstate(over="ignore"):
        mixed = (values + key) * _ODD[0]
        mixed = (mixed ^ (mixed >> np.uint64(30))) * _ODD[1]
        mixed = (mixed ^ (mixed >> np.uint64(27))) * _ODD[2]
    return mixed >> np.uint64(32)


def _folded(key: tuple[int, ...]) -> np.ndarray:
    state = np.zeros(1, np.uint64)
    for part in key:
        with np.errstate(over="ignore"):
            state = (state * _ODD[1] + np.uint64(part % 2**64)) * _ODD[0]
            state ^= state >> np.uint64(29)
    return state
