"""Checks of what pictures take: tokens, arrays without a batch axis, names."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from tljax.errors import InputError

Tokens = Sequence[str] | Sequence[int] | np.ndarray | jax.Array
"""A prompt's tokens to show: strings, or ids."""


def checked_tokens(tokens: Any) -> list[str]:
    """Returns the tokens of one prompt as strings, with ids as numbers; a list of one prompt is unwrapped."""
    if isinstance(tokens, str):
        raise InputError(
            f"tokens is one string, {tokens[:30]!r}. Give a list of strings, one a token: model.to_str_tokens(prompt)."
        )
    texts = _entries(tokens)
    if texts and isinstance(texts[0], list | tuple | np.ndarray | jax.Array) and np.ndim(texts[0]):
        one_prompt(len(texts), "tokens")
        texts = _entries(texts[0])
    if not texts:
        raise InputError("tokens is empty; a picture needs one token at least.")
    return [shown_token(text, "tokens") for text in texts]


def _entries(tokens: Any) -> list[Any]:
    return np.asarray(tokens).tolist() if isinstance(tokens, np.ndarray | jax.Array) else list(tokens)


def shown_token(token: Any, name: str) -> str:
    """Returns a token as it is shown: its text, or the number of a token id."""
    if isinstance(token, int | np.integer) and not isinstance(token, bool):
        return str(token)
    if isinstance(token, str):
        return token
    raise InputError(
        f"{name} holds {type(token).__name__} {token!r}; it must hold strings, or token ids. model.to_str_tokens makes "
        "strings of a prompt or of ids."
    )


def checked_array(values: Any, name: str) -> np.ndarray:
    """Returns values as float32, all finite."""
    try:
        array = np.asarray(values, np.float32)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} is not an array of numbers: {error}") from error
    if not array.size:
        raise InputError(f"{name} has shape {array.shape}: there is nothing to draw.")
    if not np.isfinite(array).all():
        place = tuple(map(int, np.argwhere(~np.isfinite(array))[0]))
        raise InputError(
            f"{name} holds {array[place]} at {place}; colours need finite values: mask it, or find its cause."
        )
    return array


def one_prompt(size: int, name: str) -> None:
    """Raises InputError for a batch axis of more than one."""
    if size != 1:
        raise InputError(
            f"{name} has a leading batch axis of {size}; a picture shows one prompt. Pick one first: {name}[0]."
        )


def between_zero_and_one(array: np.ndarray, name: str, fix: str) -> np.ndarray:
    """Clips values to 0 to 1; raises InputError if they are outside by more than rounding."""
    if array.min() < -0.01 or array.max() > 1.01:
        raise InputError(f"{name} is between 0 and 1; got values from {array.min():.3g} to {array.max():.3g}. {fix}")
    return array.clip(0, 1)


def checked_names(names: Sequence[str] | None, size: int, argument: str, what: str) -> list[str]:
    """Returns the names given, one for each of ``size``, or by default ``head 0``, ``head 1``, ..."""
    if names is None:
        return [f"{what} {number}" for number in range(size)]
    if isinstance(names, str) or len(names) != size:
        got = f"is {names!r}" if isinstance(names, str) else f"has {len(names)} entries"
        raise InputError(f"{argument} {got}; it must be a list of {size}, one for each {what}.")
    return [str(name) for name in names]
