"""Text to tokens and back, with TransformerLens 3.9's rules for BOS, padding and truncation.

Every function takes the :class:`~tljax.text.tokenizer.Tokenizer` first and depends on no model. Tokens come
out as numpy arrays on the host and may go in as numpy, jax or torch arrays or as lists.
"""

import operator
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from tljax.errors import InputError, TokenizerError
from tljax.text.padding import pad_rows
from tljax.text.tokenizer import Tokenizer, check_padding_side
from tljax.text.warned import DoubledBosWarning as DoubledBosWarning
from tljax.text.warned import TruncationWarning as TruncationWarning
from tljax.text.warned import doubles_bos, warn_doubled_bos, warn_truncated
from tljax.typing import PaddingSide

TokensLike = Any
"""An integer array or nested lists of token ids."""


def to_tokens(
    tokenizer: Tokenizer,
    input: str | Sequence[str],
    *,
    prepend_bos: bool = True,
    padding_side: PaddingSide | None = None,
    truncate: bool = True,
    n_ctx: int | None = None,
) -> Int[np.ndarray, "batch pos"]:
    """Turns text into token ids.

    BOS is added once, whether or not the tokenizer adds it by itself, and left out when ``prepend_bos`` is
    off. A text that spells BOS out at its start keeps that one as well. Truncation counts a BOS that the
    tokenizer adds by itself, as in TransformerLens: with ``prepend_bos`` off such a tokenizer leaves
    ``n_ctx - 1`` tokens.

    Args:
        tokenizer: the tokenizer.
        input: one text, or a list of them.
        prepend_bos: whether each row starts with BOS.
        padding_side: where short rows are filled with PAD; ``None`` takes the tokenizer's side.
        truncate: whether rows longer than ``n_ctx`` are cut, with a :class:`TruncationWarning`.
        n_ctx: the model's context length; ``None`` never cuts.

    Returns:
        Token ids ``[batch, pos]``, int32; one row for a single text.

    Raises:
        InputError: ``input`` is empty or holds something other than strings, or ``padding_side`` is unknown.
        TokenizerError: BOS or PAD is needed and the tokenizer has none, or it cannot spell the text.

    Warns:
        TruncationWarning: a text is longer than ``n_ctx``.
        DoubledBosWarning: a text spells BOS and gets another; once for each tokenizer.

    >>> from tokenizers import Tokenizer as Backend, models, pre_tokenizers
    >>> from transformers import PreTrainedTokenizerFast
    >>> from tljax.text.tokenizer import wrap_tokenizer
    >>> backend = Backend(models.WordLevel({"<|endoftext|>": 0, "John": 1, "met": 2}))
    >>> backend.pre_tokenizer = pre_tokenizers.Whitespace()
    >>> tokenizer = wrap_tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))
    >>> to_tokens(tokenizer, ["John met", "John"], padding_side="left")
    array([[0, 1, 2],
           [0, 0, 1]], dtype=int32)
    """
    check_padding_side(padding_side)
    rows = to_rows(tokenizer, input, prepend_bos=prepend_bos, n_ctx=n_ctx if truncate else None)
    return _pad(tokenizer, rows, padding_side or tokenizer.padding_side)


def to_rows(
    tokenizer: Tokenizer,
    input: str | Sequence[str],
    *,
    prepend_bos: bool = True,
    n_ctx: int | None = None,
    warn: bool = True,
) -> list[list[int]]:
    """Turns texts into one list of ids per text, unpadded; otherwise like :func:`to_tokens`.

    ``warn=False`` turns off the warning about a doubled BOS.
    """
    texts = _texts(input)
    rows = _encode(tokenizer, texts, prepend_bos, n_ctx)
    if prepend_bos and warn:
        for index, (text, row) in enumerate(zip(texts, rows, strict=True)):
            if doubles_bos(tokenizer, text, row):
                warn_doubled_bos(tokenizer, index, len(rows))
                break
    return rows


def _texts(input: str | Sequence[str]) -> list[str]:
    if isinstance(input, str):
        return [input]
    if not isinstance(input, list | tuple):
        raise InputError(
            f"Expected text to tokenize, a string or a list of strings, got {type(input).__name__}. "
            "Token arrays need no to_tokens: pass them to the model as they are."
        )
    if not input:
        raise InputError("Got an empty list: there is nothing to tokenize. Give at least one string.")
    for index, text in enumerate(input):
        if not isinstance(text, str):
            raise InputError(f"Expected a list of strings, got {type(text).__name__} {text!r} at index {index}.")
    return list(input)


def _encode(tokenizer: Tokenizer, texts: list[str], prepend_bos: bool, n_ctx: int | None) -> list[list[int]]:
    tokenizer = tokenizer.ready()
    adds = prepend_bos and not tokenizer.prepends_bos
    bos = tokenizer.bos_token_id
    if adds and bos is None:
        raise TokenizerError(
            "prepend_bos is on, but the tokenizer has no BOS token. Pass prepend_bos=False, or load the model without "
            "BOS once and for all: from_pretrained(..., default_prepend_bos=False). If a token of its vocabulary "
            "starts texts, name that before you attach the tokenizer: hf_tokenizer.bos_token = '<s>'."
        )
    rows = tokenizer.encode(texts)
    room = None if n_ctx is None else n_ctx - adds
    if room is not None and max(map(len, rows)) > room:
        whole, rows = rows, tokenizer.encode(texts, max_length=room)
        warn_truncated([len(row) for row in whole], [len(row) for row in rows], n_ctx)
    if adds and bos is not None:
        return [[bos, *row] for row in rows]
    if tokenizer.prepends_bos and not prepend_bos:
        return [row[1:] for row in rows]
    return rows


def _pad(tokenizer: Tokenizer, rows: list[list[int]], padding_side: PaddingSide) -> Int[np.ndarray, "batch pos"]:
    width = max(map(len, rows))
    if tokenizer.pad_token_id is None and any(len(row) < width for row in rows):
        raise TokenizerError(
            f"Texts of {sorted({len(row) for row in rows})} tokens need padding, but the tokenizer has no "
            "PAD token. Use model.to_batch(texts), which needs none, give texts of one length, or name a token of its "
            "vocabulary before you attach the tokenizer: hf_tokenizer.pad_token = '</s>'."
        )
    return pad_rows(rows, padding_side, tokenizer.pad_token_id or 0)[0]


def to_string(tokenizer: Tokenizer, tokens: TokensLike, *, d_vocab: int | None = None) -> str | list[str]:
    """Turns token ids into text, special tokens and spaces as they are.

    Args:
        tokenizer: the tokenizer.
        tokens: one id, ids ``[pos]``, ids ``[batch, pos]``, or a list of rows of any lengths.
        d_vocab: the model's vocabulary size, if larger than the tokenizer's: ids between the two give an empty
            text. ``None`` refuses them.

    Returns:
        A string, or a list of strings for rows.

    Raises:
        InputError: ``tokens`` are not integers, are out of range, or have more than two axes.
    """
    if isinstance(tokens, list | tuple) and any(np.ndim(row) for row in tokens):
        return [tokenizer.decode(_flat_ids(tokenizer, row, d_vocab)) for row in tokens]
    ids = _ids(tokenizer, tokens, d_vocab)
    if ids.ndim > 2:
        raise InputError(f"to_string takes tokens of shape [pos] or [batch, pos], got {list(ids.shape)}.")
    if ids.ndim == 2:
        return [tokenizer.decode(row.tolist()) for row in ids]
    return tokenizer.decode(np.atleast_1d(ids).tolist())


def to_str_tokens(
    tokenizer: Tokenizer,
    input: str | Sequence[Any] | TokensLike,
    *,
    prepend_bos: bool = True,
    padding_side: PaddingSide | None = None,
    truncate: bool = True,
    n_ctx: int | None = None,
    d_vocab: int | None = None,
) -> list[str] | list[list[str]]:
    """Splits text or tokens into one string per token.

    There are always as many strings as tokens. A token with only part of a character's bytes becomes the
    replacement character, as in TransformerLens; :func:`to_string` of all the tokens restores the character.

    Args:
        tokenizer: the tokenizer.
        input: a text, tokens ``[pos]`` or ``[1, pos]``, or a list of texts or of token rows.
        prepend_bos, truncate, n_ctx: as in :func:`to_tokens`; they matter for text only.
        padding_side: accepted for symmetry; every text is split on its own, so nothing is padded.
        d_vocab: as in :func:`to_string`.

    Returns:
        A list of strings, or a list of such lists for a list input.

    Raises:
        InputError: tokens with a batch of more than one row, not integers or out of range.
    """
    check_padding_side(padding_side)
    if isinstance(input, str):
        return tokenizer.pieces(_encode(tokenizer, [input], prepend_bos, n_ctx if truncate else None)[0])
    if isinstance(input, list | tuple) and any(isinstance(item, str) or np.ndim(item) for item in input):
        options = {"prepend_bos": prepend_bos, "truncate": truncate, "n_ctx": n_ctx, "d_vocab": d_vocab}
        return [to_str_tokens(tokenizer, item, **options) for item in input]  # type: ignore[return-value]
    return tokenizer.pieces(_flat_ids(tokenizer, input, d_vocab))


def to_single_token(tokenizer: Tokenizer, string: str) -> int:
    """Returns the id of a string that is exactly one token.

    Raises:
        TokenizerError: the string is several tokens, or none (shows them, and a spelling that is one token
            if there is one), or unknown to the vocabulary.
        InputError: ``string`` is not a string.
    """
    if not isinstance(string, str):
        raise InputError(f"to_single_token takes a string, got {type(string).__name__} {string!r}.")
    ids = _plain_ids(tokenizer, string)
    if ids == [tokenizer.unk_token_id] and tokenizer.pieces(ids) != [string]:
        raise TokenizerError(
            f"{string!r} is not in the vocabulary: it becomes the unknown token "
            f"{tokenizer.pieces(ids)[0]!r}. Choose a word that the tokenizer knows."
        )
    if len(ids) == 1:
        return ids[0]
    spellings = [form for form in (f" {string}", string.strip()) if form not in (string, "", " ")]
    single = [form for form in spellings if len(_plain_ids(tokenizer, form)) == 1]
    fix = "Choose a word that is one token, or take the first: to_tokens(string, prepend_bos=False)[0, 0]."
    if single:
        where = "after" if single[0].startswith(" ") else "without"
        fix = f"{single[0]!r} is one token: use that if the word stands {where} a space in your prompt."
    raise TokenizerError(f"{string!r} is {len(ids)} tokens, not one: {tokenizer.pieces(ids)}. {fix}")


def _plain_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.ready().plain(text)


def to_single_str_token(tokenizer: Tokenizer, int_token: int, *, d_vocab: int | None = None) -> str:
    """Returns the string of one token id.

    Raises:
        InputError: ``int_token`` is not an integer, or out of range.
    """
    return tokenizer.pieces([_one_id(tokenizer, int_token, d_vocab)])[0]


def _one_id(tokenizer: Tokenizer, token: Any, d_vocab: int | None) -> int:
    ids = _ids(tokenizer, token, d_vocab)
    if ids.size != 1:
        raise InputError(f"Expected one token id, got {ids.size} of them.")
    return operator.index(ids.item())


def get_token_position(
    tokenizer: Tokenizer,
    single_token: str | int,
    input: str | TokensLike,
    mode: Literal["first", "last"] = "first",
    *,
    prepend_bos: bool = True,
    padding_side: PaddingSide | None = None,
    truncate: bool = True,
    n_ctx: int | None = None,
    d_vocab: int | None = None,
) -> int:
    """Returns the position at which a token stands in a prompt.

    Args:
        tokenizer: the tokenizer.
        single_token: a token id, or a string that is one token.
        input: the prompt, as text or as tokens ``[pos]`` or ``[1, pos]``.
        mode: which occurrence to take, ``"first"`` or ``"last"``.
        prepend_bos, padding_side, truncate, n_ctx: as in :func:`to_tokens`; they matter for text only.
        d_vocab: as in :func:`to_string`.

    Raises:
        InputError: the token does not occur (shows the prompt's tokens), ``mode`` is unknown, or tokens of
            more than one row.
        TokenizerError: ``single_token`` is several tokens.
    """
    if mode not in ("first", "last"):
        raise InputError(f"mode must be 'first' or 'last', got {mode!r}.")
    check_padding_side(padding_side)
    if isinstance(input, str):
        prompt = _encode(tokenizer, [input], prepend_bos, n_ctx if truncate else None)[0]
    else:
        prompt = _flat_ids(tokenizer, input, d_vocab)
    text = isinstance(single_token, str)
    token = to_single_token(tokenizer, single_token) if text else _one_id(tokenizer, single_token, d_vocab)
    positions = [position for position, other in enumerate(prompt) if other == token]
    if not positions:
        raise InputError(
            f"The token {tokenizer.pieces([token])[0]!r} (id {token}) does not occur in the prompt, whose "
            f"tokens are {tokenizer.pieces(prompt)}. A leading space makes another token: check which form "
            "stands there."
        )
    return positions[0] if mode == "first" else positions[-1]


def get_attention_mask(
    tokenizer: Tokenizer,
    tokens: Int[np.ndarray, "batch pos"] | Int[jax.Array, "batch pos"],
    prepend_bos: bool = True,
    padding_side: PaddingSide | None = None,
) -> Any:
    """Marks which positions are text and which are padding.

    Padding is recognised by position, because PAD often is BOS or EOS too: the unbroken run of PAD ids at the
    padding side is padding, any PAD id further in is text. Under left padding with ``prepend_bos``, if BOS
    and PAD are the same id, the last of the run is the BOS and stays visible.

    Args:
        tokenizer: the tokenizer.
        tokens: ids ``[batch, pos]``; a jax array may be traced.
        prepend_bos: whether the rows start with BOS.
        padding_side: the side that was padded; ``None`` takes the tokenizer's side.

    Returns:
        int32 ``[batch, pos]``, 1 for text and 0 for padding; a jax array for a jax array, else numpy.

    Raises:
        InputError: ``padding_side`` is unknown.

    >>> ids = {"bos_token_id": 9, "eos_token_id": 9, "pad_token_id": 9}
    >>> gpt2 = Tokenizer(hf=None, prepends_bos=True, padding_side="left", d_vocab=10, **ids)
    >>> get_attention_mask(gpt2, np.array([[9, 9, 9, 5], [9, 5, 9, 6]]))
    array([[0, 0, 1, 1],
           [1, 1, 1, 1]], dtype=int32)
    """
    check_padding_side(padding_side)
    xp = jnp if isinstance(tokens, jax.Array) else np
    ids = xp.asarray(tokens)
    if tokenizer.pad_token_id is None:
        return xp.ones(ids.shape, dtype=np.int32)
    is_text = ids != tokenizer.pad_token_id
    if (padding_side or tokenizer.padding_side) == "right":
        return (xp.cumsum(is_text[..., ::-1], axis=-1)[..., ::-1] > 0).astype(np.int32)
    visible = xp.cumsum(is_text, axis=-1) > 0
    if prepend_bos and tokenizer.bos_token_id == tokenizer.pad_token_id:
        next_visible = xp.concatenate([visible[..., 1:], xp.ones_like(visible[..., :1])], axis=-1)
        visible = visible | next_visible
    return visible.astype(np.int32)


def _flat_ids(tokenizer: Tokenizer, tokens: TokensLike, d_vocab: int | None) -> list[int]:
    """Returns the ids of one row, given in shape ``[]``, ``[pos]`` or ``[1, pos]``."""
    ids = _ids(tokenizer, tokens, d_vocab)
    if ids.squeeze().ndim > 1:
        raise InputError(
            f"Expected one row of tokens, [pos] or [1, pos], got shape {list(ids.shape)}. "
            "Pass one row, tokens[i], or for to_str_tokens a list of rows, list(tokens)."
        )
    return ids.reshape(-1).tolist()


def _ids(tokenizer: Tokenizer, tokens: TokensLike, d_vocab: int | None) -> np.ndarray:
    """Checks ids of any shape and returns them as a numpy array."""
    if isinstance(tokens, str):
        raise InputError(f"Expected token ids, got the text {tokens!r}. Use to_tokens to turn text into ids.")
    ids = np.asarray(tokens)
    if ids.size == 0:
        return ids.astype(np.int32)
    if not np.issubdtype(ids.dtype, np.integer):
        raise InputError(f"Token ids must be integers, got {type(tokens).__name__} of dtype {ids.dtype}.")
    limit = max(tokenizer.d_vocab, d_vocab or 0)
    outside = ids[(ids < 0) | (ids >= limit)]
    if outside.size:
        raise InputError(
            f"Token id {outside[0]} is out of range: the vocabulary has ids 0 to {limit - 1}. "
            "Check that the tokens come from this model's tokenizer."
        )
    return ids
