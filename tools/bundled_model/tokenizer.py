"""The bundled model's tokenizer: one token a word, GPT-2's conventions, every text round-trips.

A token carries its leading space, as in GPT-2: ``" Mary"`` and ``"Mary"`` are two tokens, and joining the tokens
of a text gives the text back. A word outside the vocabulary is spelled in single-byte tokens, so it is never
silently replaced by an "unknown" token.
"""

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int

from tljax.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPECIAL_TOKEN = "<|endoftext|>"
"""Begins and ends every document, and pads: one token in three roles, as in GPT-2."""

BOS_ID = 0
N_BYTES = 256
FIRST_WORD_ID = 1 + N_BYTES

_WORDS = re.compile(r"'s|'t| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+")


def split_words(text: str) -> list[str]:
    """Splits English text as the tokenizer does: words, numbers and punctuation with their leading space.

    >>> split_words("It's here, Mary.")
    ['It', "'s", ' here', ',', ' Mary', '.']
    """
    return _WORDS.findall(text)


def byte_symbols() -> list[str]:
    """Returns GPT-2's printable stand-in for each of the 256 byte values, in byte order."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(N_BYTES)]


def build_tokenizer(words: Iterable[str]) -> "Tokenizer":
    """Builds the tokenizer whose vocabulary is the special token, the 256 bytes, then ``words`` in their order.

    Args:
        words: words as they appear in text, leading space included (``" Mary"``), each one pre-token of GPT-2's
            splitting rule. Repeats and single-byte words are dropped.

    Returns:
        A ``tokenizers.Tokenizer``. It does not add the special token by itself, as GPT-2's does not.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    symbols = byte_symbols()
    vocab = {symbol: index for index, symbol in enumerate([SPECIAL_TOKEN, *symbols])}
    for word in words:
        token = "".join(symbols[byte] for byte in word.encode())
        vocab.setdefault(token, len(vocab))
    # A BPE model with no merges that looks a whole pre-token up first: word-level, falling back to bytes.
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(SPECIAL_TOKEN, special=True, normalized=False)])
    return tokenizer


def encode_rows(
    tokenizer: "Tokenizer", texts: Sequence[str], pos: int
) -> tuple[Int[np.ndarray, "n pos"], Float[np.ndarray, "n pos_minus_1"]]:
    """Encodes documents as rows of training data: special token, the text, special token to the end.

    Args:
        tokenizer: what :func:`build_tokenizer` returns.
        texts: documents of at most ``pos - 2`` tokens.
        pos: length of a row.

    Returns:
        ``(ids [n, pos], weights [n, pos - 1])``; the first special token after the text counts, the rest do not.

    Raises:
        InputError: a document is too long.
    """
    rows = np.full((len(texts), pos), BOS_ID, np.int32)
    weights = np.zeros((len(texts), pos - 1), np.float32)
    for index, encoded in enumerate(tokenizer.encode_batch(list(texts))):
        length = len(encoded.ids)
        if length > pos - 2:
            raise InputError(f"{texts[index]!r} has {length} tokens; a row of {pos} holds at most {pos - 2}.")
        rows[index, 1 : length + 1] = encoded.ids
        weights[index, : length + 1] = 1.0
    return rows, weights
