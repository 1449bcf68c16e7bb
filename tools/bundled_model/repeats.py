"""Rows of random words that repeat: text in which only induction predicts anything."""

import numpy as np
from jaxtyping import Float, Int

from tljax.errors import InputError
from tools.bundled_model.data import vocabulary
from tools.bundled_model.tokenizer import BOS_ID, FIRST_WORD_ID

LONGEST_GAP = 8


def repeated_words(n: int, length: int, seed: int, d_vocab: int | None = None) -> Int[np.ndarray, "n pos"]:
    """Makes random words said twice, for measuring induction.

    Args:
        n: rows.
        length: words in one copy.
        seed: the rows are a pure function of it.
        d_vocab: draw word ids below this; ``None`` takes the bundled tokenizer's whole vocabulary.

    Returns:
        Ids ``[n, 1 + 2 * length]``: BOS, the words, the same words.

    >>> rows = repeated_words(2, 5, seed=0)
    >>> rows.shape, bool((rows[:, 1:6] == rows[:, 6:]).all())
    ((2, 11), True)
    """
    if n < 1 or length < 1:
        raise InputError(f"n and length must be at least 1, got n={n}, length={length}.")
    d_vocab = FIRST_WORD_ID + len(vocabulary()) if d_vocab is None else d_vocab
    words = np.random.default_rng(seed).integers(FIRST_WORD_ID, d_vocab, (n, length), dtype=np.int32)
    return np.concatenate([np.full((n, 1), BOS_ID, np.int32), words, words], axis=1)


def repeating_rows(
    rng: np.random.Generator, n: int, pos: int, d_vocab: int
) -> tuple[Int[np.ndarray, "n pos"], Float[np.ndarray, "n pos_minus_1"]]:
    """Makes training rows: a random segment that returns again and again, half the time after random gaps.

    Any token but BOS may occur, single bytes included. Segments have 4 to ``pos // 2`` tokens, short ones more
    often. Only what can be predicted counts: the tokens of a returning segment after its first one.

    Args:
        rng: source of randomness.
        n: rows.
        pos: tokens in a row, BOS included.
        d_vocab: draw ids below this.

    Returns:
        ``(ids [n, pos], weights [n, pos - 1])``.
    """
    rows = np.full((n, pos), BOS_ID, np.int32)
    weights = np.zeros((n, pos - 1), np.float32)
    for row, weight in zip(rows, weights, strict=True):
        length = int(np.exp(rng.uniform(np.log(4), np.log(pos // 2))))
        segment = rng.integers(BOS_ID + 1, d_vocab, length)
        gaps = bool(rng.integers(2))
        row[1:] = rng.integers(BOS_ID + 1, d_vocab, pos - 1)
        start, first = 1 + (int(rng.integers(pos - 2 * length)) if gaps else 0), True
        while start < pos:
            end = min(start + length, pos)
            row[start:end] = segment[: end - start]
            weight[start : end - 1] = not first
            start, first = end + (int(rng.integers(LONGEST_GAP)) if gaps else 0), False
    return rows, weights
