"""Reads which tokens and strings end a text, and which token fills the positions after its end."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from tljax.config import HookedTransformerConfig
from tljax.errors import InputError
from tljax.text.padding import pad_rows
from tljax.text.tokenizer import need_tokenizer

if TYPE_CHECKING:
    from tljax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Ends:
    """When a text ends.

    Attributes:
        eos: ``[batch, n]``, tokens that end it, or ``None``.
        fill: ``[batch]``, the token that fills the positions after its end.
        strings: strings that end it.
    """

    eos: np.ndarray | None
    fill: np.ndarray
    strings: tuple[str, ...]


def read_ends(
    cfg: HookedTransformerConfig,
    tokenizer: "Tokenizer | None",
    batch: int,
    stop_at_eos: bool,
    eos_token_id: Any,
    stop_strings: str | Sequence[str] | None,
) -> Ends:
    """Reads when texts end: by the EOS tokens of the call, else of the config, else of the tokenizer.

    Raises:
        InputError: ``stop_at_eos`` without an EOS token, an id outside the vocabulary, a wrong number of lists.
        TokenizerError: stop strings without a tokenizer.
    """
    strings = () if stop_strings is None else (stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings)
    if strings:
        need_tokenizer(tokenizer, "stop_strings=")
    if any(not isinstance(string, str) or not string for string in strings):
        raise InputError(f"stop_strings={stop_strings!r}: give a text, or several, none of them empty.")
    d_vocab = cfg.d_vocab_out
    known, filler = _known_ends(cfg, tokenizer)
    usual = np.full(batch, filler if filler is not None else max(known[0], 0) if known else 0, np.int32)
    if not stop_at_eos:
        return Ends(None, usual, strings)
    if eos_token_id is None and known is not None:
        return Ends(np.tile(np.asarray(known, np.int32), (batch, 1)), usual, strings)
    eos = eos_token_id
    if eos is None:
        raise InputError(
            "stop_at_eos is on and there is no EOS token. Pass eos_token_id=, or stop_at_eos=False to generate "
            "max_new_tokens for every prompt."
        )
    lists: Any = eos if _is_nested(eos) else [eos]
    rows = [np.atleast_1d(np.asarray(row)) for row in lists]
    rows = rows * batch if len(rows) == 1 else rows
    if len(rows) != batch:
        raise InputError(f"eos_token_id= has {len(rows)} lists for {batch} prompts: give one list, or one for each.")
    for row in rows:
        if row.size == 0 or row.dtype.kind not in "iu" or row.min() < 0 or row.max() >= d_vocab:
            raise InputError(f"eos_token_id={eos!r}: give token ids, whole numbers from 0 to {d_vocab - 1}.")
    padded, _ = pad_rows(rows, fill=-1)
    own = cfg.eos_token_ids is not None or filler is None  # the call's tokens take the checkpoint's place
    fill = padded[:, 0] if own else usual
    return Ends(padded, fill.astype(np.int32), strings)


def _known_ends(cfg: HookedTransformerConfig, tokenizer: "Tokenizer | None") -> tuple[list[int] | None, int | None]:
    """Returns the default EOS tokens and the token that fills the positions after them; ``None`` if unknown.

    The checkpoint's EOS tokens take precedence over the tokenizer's, as in transformers. Ids that the model cannot
    choose are ignored; if there are no others, no text ends.
    """
    if met := [one for one in cfg.eos_token_ids or () if 0 <= one < cfg.d_vocab_out]:
        padding = cfg.pad_token_id
        return met, padding if padding is not None and 0 <= padding < cfg.d_vocab else None
    eos = None if tokenizer is None else tokenizer.eos_token_id
    if eos is not None:
        return [eos], eos
    return [-1] if cfg.eos_token_ids else None, None if tokenizer is None else tokenizer.pad_token_id


def _is_nested(eos: Any) -> bool:
    if isinstance(eos, np.ndarray | jax.Array):
        return eos.ndim == 2
    return isinstance(eos, list | tuple) and len(eos) > 0 and np.ndim(eos[0]) == 1
