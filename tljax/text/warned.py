"""Warnings about text: cut at the context's end, BOS given twice, padding taken for text."""

import sys
import warnings
from collections.abc import Sequence

from tljax.text.tokenizer import Tokenizer


class TruncationWarning(UserWarning):
    """A text was longer than the model's context and lost its end."""


class DoubledBosWarning(UserWarning):
    """A text spells the BOS that is also put in front of it."""


class PaddingWarning(UserWarning):
    """Tokens look padded on the right, and nothing says that they are."""


def warn_truncated(before: list[int], after: list[int], n_ctx: int | None) -> None:
    dropped = [full - kept for full, kept in zip(before, after, strict=True)]
    cut = sum(count > 0 for count in dropped)
    which = "The text is" if len(dropped) == 1 else f"{cut} of {len(dropped)} texts are"
    total = sum(dropped)
    warn_every_time(
        f"{which} longer than n_ctx={n_ctx}: {total} token{'s' * (total != 1)} dropped. "
        "Shorten the text, or pass truncate=False to to_tokens and split the tokens yourself.",
        TruncationWarning,
    )


def warn_every_time(message: str, category: type[Warning]) -> None:
    """Warns at the caller's line every time, not only the first (unless the user's filters say otherwise).

    ``warnings.warn`` remembers by line what it has shown; without that registry every call counts as the first.
    """
    frame = sys._getframe(level_of_caller() - 1)
    warnings.warn_explicit(
        message, category, frame.f_code.co_filename, frame.f_lineno, frame.f_globals.get("__name__", "<string>")
    )


def level_of_caller() -> int:
    """Returns the stack level, counted from the calling function, of the first frame outside tljax."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("tljax."):
        frame, level = frame.f_back, level + 1
    return level


def doubles_bos(tokenizer: Tokenizer, text: str, row: Sequence[int]) -> bool:
    """Whether a row starts with two BOS because its text spells one."""
    bos = tokenizer.bos_token_id
    return bos is not None and list(row[:2]) == [bos, bos] and text.lstrip().startswith(tokenizer.hf.bos_token)


def warn_doubled_bos(tokenizer: Tokenizer, index: int, count: int) -> None:
    if DoubledBosWarning in tokenizer.warned:
        return
    tokenizer.warned.add(DoubledBosWarning)
    bos = tokenizer.hf.bos_token
    which = "The text" if count == 1 else f"Text {index}"
    warnings.warn(
        f"{which} starts with {bos!r}, and prepend_bos puts another in front: the model sees BOS twice. Leave it out "
        "of the text, or pass prepend_bos=False. (Said once for each tokenizer; model.tokens_report(text) shows it.)",
        DoubledBosWarning,
        stacklevel=level_of_caller(),
    )


def warn_padded_right(row: int) -> None:
    warnings.warn(
        f"Prompt {row} ends in the PAD token, which counts as text. If it is padding, pass the texts themselves, "
        "model.to_batch(texts), or attention_mask=.",
        PaddingWarning,
        stacklevel=level_of_caller(),
    )
