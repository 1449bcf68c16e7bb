"""TransformerLens's tokenizer functions: a corpus as rows of equal length, padding masks, adding and removing BOS."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from tljax.checks import typed
from tljax.errors import InputError, TokenizerError
from tljax.text import tokens as text
from tljax.text.padding import pad_axis
from tljax.text.tokenizer import wrap_tokenizer


@typed
def tokenize_and_concatenate(
    dataset: Any,
    tokenizer: Any,
    streaming: bool = False,
    max_length: int = 1024,
    column_name: str = "text",
    add_bos_token: bool = True,
    num_proc: int | None = None,
    set_format: bool = True,
) -> dict[str, Int[np.ndarray, "row max_length"]]:
    """Tokenizes documents, joins them with EOS between, and cuts the whole into rows.

    Args:
        dataset: texts; or rows that are mappings, such as a data set of Hugging Face's ``datasets``. All of it is read,
            so cut an endless stream first.
        tokenizer: a Hugging Face tokenizer, with EOS and, for ``add_bos_token``, BOS.
        streaming, num_proc, set_format: accepted as in TransformerLens; they change nothing here.
        max_length: tokens of a row, BOS included.
        column_name: where the text is in rows that are mappings.
        add_bos_token: start every row with BOS.

    Returns:
        ``{"tokens": [row, max_length]}``, int32. Tokens after the last full row are dropped; if
        there are fewer than one row in all, it is padded with PAD (with EOS, if there is no PAD).

    Raises:
        InputError: no text, rows without the column, a ``max_length`` without room for a token.
        TokenizerError: the tokenizer has no EOS, or no BOS where one is wanted.
    """
    _check(tokenizer, add_bos_token, max_length)
    texts = list(_texts(dataset, column_name))
    if not any(texts):
        raise InputError("There is no text to tokenize.")
    pieces: list[int] = []
    for number, row in enumerate(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]):
        pieces += [tokenizer.eos_token_id, *row] if number else row
    tokens, width = np.asarray(pieces, np.int32), max_length - add_bos_token
    if len(tokens) < width:
        filler = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        tokens = pad_axis(tokens, width, axis=0, fill=filler)
    rows = tokens[: len(tokens) // width * width].reshape(-1, width)
    if add_bos_token:
        rows = np.pad(rows, ((0, 0), (1, 0)), constant_values=tokenizer.bos_token_id)
    return {"tokens": rows}


def _check(tokenizer: Any, add_bos_token: bool, max_length: int) -> None:
    if max_length < 1 + add_bos_token:
        raise InputError(f"max_length={max_length} leaves no room for text.")
    if tokenizer.eos_token_id is None:
        raise TokenizerError("This tokenizer has no EOS token, which goes between documents: set tokenizer.eos_token.")
    if add_bos_token and tokenizer.bos_token_id is None:
        raise TokenizerError("This tokenizer has no BOS token: pass add_bos_token=False.")


def _texts(dataset: Any, column_name: str) -> Iterable[str]:
    rows = dataset[column_name] if isinstance(dataset, Mapping) and column_name in dataset else dataset
    if isinstance(rows, str):
        raise InputError("Pass a list of documents: [text] if there is one.")
    for row in rows:
        if isinstance(row, Mapping) and column_name not in row:
            raise InputError(f"A row has no column {column_name!r}, only {sorted(row)}: pass column_name=.")
        yield row[column_name] if isinstance(row, Mapping) else row


def get_attention_mask(tokenizer: Any, tokens: Any, prepend_bos: bool = True, padding_side: Any = None) -> Any:
    """Returns 1 at text, 0 at padding, ``[batch, pos]``: :func:`tljax.text.tokens.get_attention_mask`."""
    ids = tokens if isinstance(tokens, jax.Array) else np.asarray(tokens)
    return text.get_attention_mask(wrap_tokenizer(tokenizer), ids, prepend_bos, padding_side)


def get_tokenizer_with_bos(tokenizer: Any) -> Any:
    """Returns a copy of a Hugging Face tokenizer that puts BOS in front of every text, where it has one."""
    return wrap_tokenizer(tokenizer).hf


def get_input_with_manually_prepended_bos(bos_token: str | None, input: str | list[str]) -> str | list[str]:
    """Puts the BOS token's text in front of a text or of each; ``None`` changes nothing."""
    if bos_token is None:
        return input
    return bos_token + input if isinstance(input, str) else [bos_token + each for each in input]


def get_tokens_with_bos_removed(tokenizer: Any, tokens: Any, padding_side: Any = None) -> Any:
    """Returns ids ``[..., pos - 1]`` without each row's BOS: its first token, or the last BOS of its left padding."""
    if tokenizer.bos_token_id is None:
        return tokens
    ids = np.asarray(tokens)
    if (padding_side or tokenizer.padding_side) == "right":
        return tokens[..., 1:]
    is_bos = ids == tokenizer.bos_token_id
    padding = tokenizer.pad_token_id
    leading = np.cumprod(is_bos if padding is None else is_bos | (ids == padding), axis=-1).astype(bool) & is_bos
    if not leading.any(axis=-1).all():
        raise InputError("A row does not start with BOS, after padding on the left.")
    last = ids.shape[-1] - 1 - np.argmax(leading[..., ::-1], axis=-1)
    kept = ids[np.arange(ids.shape[-1]) != last[..., None]].reshape(*ids.shape[:-1], -1)
    return jnp.asarray(kept) if isinstance(tokens, jax.Array) else kept
