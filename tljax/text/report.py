"""``TokensReport``: the tokens of a prompt, and where the special ones come from."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from tljax.text.batch import Batch
from tljax.text.tokenizer import Tokenizer
from tljax.text.warned import doubles_bos

Source = Literal["tljax", "tokenizer", "text", "template", "ids"]
_PHRASE: dict[str, str] = {
    "tljax": "added by tljax",
    "tokenizer": "added by the tokenizer",
    "text": "spelled in the text",
    "template": "written by the chat template",
    "ids": "in the ids given",
}
_SHOWN_PROMPTS, _SHOWN_TOKENS = 16, 64


@dataclasses.dataclass(frozen=True)
class PromptReport:
    """One prompt's tokens.

    Attributes:
        ids: without padding.
        strings: one for each id.
        notes: for each id, what is special about it, or ``""``.
        bos: source of the BOS at the prompt's start, or ``None``.
        eos: source of the EOS at its end, or ``None``.
        doubled_bos: whether the text spells BOS and got another.
        padding: number of padding positions in the prompt's row.
    """

    ids: tuple[int, ...]
    strings: tuple[str, ...]
    notes: tuple[str, ...]
    bos: Source | None
    eos: Source | None
    doubled_bos: bool
    padding: int

    def lines(self) -> list[str]:
        width = len(str(max(self.ids, default=0)))
        shown = [
            f"  {index:>4}  {token:>{width}}  {string!r}{'  <- ' if note else ''}{note}"
            for index, (token, string, note) in enumerate(zip(self.ids, self.strings, self.notes, strict=True))
        ]
        if len(shown) > _SHOWN_TOKENS:
            left_out = len(shown) - _SHOWN_TOKENS
            shown = [*shown[: _SHOWN_TOKENS - 8], f"   ...  ({left_out} more tokens)", *shown[-8:]]
        return shown


@dataclasses.dataclass(frozen=True, repr=False)
class TokensReport:
    """Result of ``model.tokens_report``, to be printed.

    Attributes:
        prompts: one entry per prompt.
        summary: what was added and by whom, in sentences.
        padding_side: where shorter prompts are filled.
    """

    prompts: tuple[PromptReport, ...]
    summary: tuple[str, ...]
    padding_side: str

    def __repr__(self) -> str:
        lines = list(self.summary)
        for number, prompt in enumerate(self.prompts[:_SHOWN_PROMPTS]):
            count = f"{len(prompt.ids)} token{'s' * (len(prompt.ids) != 1)}"
            pads = f", {prompt.padding} of padding on the {self.padding_side}" if prompt.padding else ""
            lines += [f"Prompt {number}: {count}{pads}", *prompt.lines()]
        if len(self.prompts) > _SHOWN_PROMPTS:
            lines.append(f"... and {len(self.prompts) - _SHOWN_PROMPTS} more prompts")
        return "\n".join(lines)


def report_texts(
    tokenizer: Tokenizer, batch: Batch, texts: Sequence[str], prepend_bos: bool, because: str
) -> TokensReport:
    """Reports on texts.

    Args:
        tokenizer: the tokenizer.
        batch: the texts' tokens.
        texts: the texts.
        prepend_bos: whether BOS was wanted.
        because: the setting that says so.
    """
    prompts = []
    for row, text in zip(_rows(batch), texts, strict=True):
        sources = _sources(tokenizer, row, text, prepend_bos)
        prompts.append(_prompt(tokenizer, batch, row, sources, text))
    bos = _bos_sentence(tokenizer, prepend_bos, because)
    return _report(tokenizer, batch, prompts, bos)


def report_ids(tokenizer: Tokenizer, batch: Batch, source: Source | None) -> TokensReport:
    """Reports on tokens that were given as ids, or came from a chat template (``source="template"``)."""
    given: Source = source or "ids"
    prompts = [_prompt(tokenizer, batch, row, [given for _ in row], None) for row in _rows(batch)]
    if source is None:
        return _report(tokenizer, batch, prompts, "The prompts are token ids: nothing was added.")
    return _report(tokenizer, batch, prompts, "The chat template wrote every special token: none was added besides.")


def _rows(batch: Batch) -> list[list[int]]:
    tokens, mask = np.asarray(batch.tokens), np.asarray(batch.mask)
    return [ids[visible].tolist() for ids, visible in zip(tokens, mask, strict=True)]


def _sources(tokenizer: Tokenizer, row: list[int], text: str, prepend_bos: bool) -> list[Source]:
    """Returns the source of each token of a row."""
    before, after = _added(tokenizer, text)
    start: list[Source] = ["tokenizer"] * before
    if tokenizer.prepends_bos and not prepend_bos:
        start = start[1:]
    elif start and tokenizer.prepends_bos and tokenizer.told_to_add_bos:
        start[0] = "tljax"
    elif prepend_bos and not tokenizer.prepends_bos:
        start = ["tljax", *start]
    middle: list[Source] = ["text"] * max(len(row) - len(start) - after, 0)
    end: list[Source] = ["tokenizer"] * after
    sources: list[Source] = [*start, *middle, *end]
    return sources[: len(row)]


def _added(tokenizer: Tokenizer, text: str) -> tuple[int, int]:
    """Returns how many tokens the tokenizer adds before and after a text; for special tokens alone it is a guess."""
    bare, full = tokenizer.plain(text), tokenizer.encode([text])[0]
    extra, usual = len(full) - len(bare), tokenizer.added_around
    if usual is not None and sum(usual) == extra:
        return usual
    places = [n for n in range(extra + 1) if full[n : n + len(bare)] == bare]
    before = next((n for n in places if n >= tokenizer.prepends_bos), 0)
    return before, extra - before


def _prompt(
    tokenizer: Tokenizer, batch: Batch, row: list[int], sources: Sequence[Source], text: str | None
) -> PromptReport:
    doubled = text is not None and sources[:1] != ["text"] and doubles_bos(tokenizer, text, row)
    roles = [_role(tokenizer, index, token, doubled) for index, token in enumerate(row)]
    if text is not None:  # an unknown word may have BOS's id too: only what is spelled there is BOS
        spelled = {"BOS": tokenizer.hf.bos_token, "EOS": tokenizer.hf.eos_token}
        roles = [
            "" if source == "text" and role and spelled[role] not in text else role
            for role, source in zip(roles, sources, strict=True)
        ]
    known = [token for token in row if token < tokenizer.d_vocab]
    pieces = iter(tokenizer.pieces(known))
    starts, ends = roles[:1] == ["BOS"], roles[-1:] == ["EOS"]
    return PromptReport(
        ids=tuple(row),
        strings=tuple(next(pieces) if token < tokenizer.d_vocab else "" for token in row),
        notes=tuple(_note(role, source) for role, source in zip(roles, sources, strict=True)),
        bos=sources[0] if starts else None,
        eos=sources[-1] if ends else None,
        doubled_bos=doubled,
        padding=batch.shape[1] - len(row),
    )


def _role(tokenizer: Tokenizer, index: int, token: int, doubled: bool) -> str:
    """Returns ``"BOS"``, ``"EOS"`` or ``""``; one id that is both is BOS at the start and EOS after it."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if token == bos and (bos != eos or index == 0 or (index == 1 and doubled)):
        return "BOS"
    return "EOS" if token == eos else ""


def _note(role: str, source: Source) -> str:
    if role:
        return f"{role}, {_PHRASE[source]}"
    return _PHRASE[source] if source in ("tljax", "tokenizer") else ""


def _bos_sentence(tokenizer: Tokenizer, prepend_bos: bool, because: str) -> str:
    if not prepend_bos:
        taken = (
            " (the tokenizer's own was taken out)" if tokenizer.prepends_bos and not tokenizer.told_to_add_bos else ""
        )
        return f"BOS: not added, because {because} is off{taken}."
    name = f"BOS {tokenizer.hf.bos_token!r} (id {tokenizer.bos_token_id})"
    if tokenizer.prepends_bos and not tokenizer.told_to_add_bos:
        return f"{name}: added by the tokenizer itself, and kept, because {because} is on."
    return f"{name}: added by tljax, because {because} is on; the tokenizer adds none by itself."


def _report(tokenizer: Tokenizer, batch: Batch, prompts: list[PromptReport], bos: str) -> TokensReport:
    summary = [bos]
    if any(prompt.eos == "tokenizer" for prompt in prompts):
        summary.append(
            f"EOS {tokenizer.hf.eos_token!r} (id {tokenizer.eos_token_id}): added by the tokenizer itself. The model "
            "reads it as the end of the text: switch it off with hf_tokenizer.add_eos_token = False before you attach "
            "the tokenizer, or drop the last token."
        )
    doubled = [number for number, prompt in enumerate(prompts) if prompt.doubled_bos]
    if doubled:
        summary.append(
            f"BOS stands twice at the start of prompt {', '.join(map(str, doubled))}: the text spells it and another "
            "was added. Leave it out of the text, or pass prepend_bos=False."
        )
    if any(prompt.padding for prompt in prompts):
        summary.append(f"Padding: on the {batch.padding_side}, to {batch.shape[1]} tokens; masked, so never seen.")
    return TokensReport(tuple(prompts), tuple(summary), batch.padding_side)
