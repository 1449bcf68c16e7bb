"""Induction: random tokens that come twice, without a tokenizer."""

from typing import Any, Literal, Unpack

from tljax.checks import whole
from tljax.errors import InputError
from tljax.tasks.building import Row, assemble
from tljax.tasks.drawing import Draw
from tljax.tasks.making import TaskOptions, arrangement, arrangements, generator, too_many
from tljax.tasks.task import Task
from tljax.tasks.texts import Bounds
from tljax.text.tokenizer import check_padding_side

_MOST_NUMBERED = 2**16
"""Prompts up to this many are drawn by their number, without repeats; more are drawn at random, and repeats again."""


@generator
def induction(
    model: Any,
    n: int,
    *,
    corruption: Literal["answer", "first_copy"] = "answer",
    length: int = 20,
    **options: Unpack[TaskOptions],
) -> Task:
    """Makes sequences of different random tokens that come twice; the last token of the second copy is to be predicted.

    Special tokens are never drawn. Labelled parts: ``first`` and ``second`` (the copies, the second without its last
    token), ``answer`` (the right answer's place in the first copy), ``before`` (the token before it), ``end`` (that
    token again).

    Args:
        model: the model; needs no tokenizer.
        n: number of prompts, all different.
        corruption: ``"answer"``: another token in the first copy's last place. ``"first_copy"``: a whole first copy of
            other tokens, so that nothing is repeated. Wrong is the token that then stands in the last place.
        length: tokens of one copy, at least 2.
        **options: ``seed``, ``prepend_bos`` and ``padding_side``, as of every generator. A model without a tokenizer
            has no BOS.

    Raises:
        InputError: the vocabulary is too small, two copies do not fit the context, or there are fewer than ``n`` such
            prompts (the message says how many).
    """
    whole(n, "n", at_least=1)
    whole(length, "length", at_least=2)
    check_padding_side(side := options.get("padding_side"))
    ids, bos = _vocabulary(model, options.get("prepend_bos"))
    size = 2 * length - 1 + len(bos)
    if size > model.cfg.n_ctx:
        raise InputError(f"Two copies of length={length} are {size} tokens; the model takes n_ctx={model.cfg.n_ctx}.")
    if len(ids) < 2 * length:
        raise InputError(
            f"length={length} needs {2 * length} different tokens, two for each place; the vocabulary has {len(ids)} "
            "that are not special. Make the copies shorter."
        )
    most = arrangements(ids, length)
    if n > most:
        raise InputError(too_many("induction", n, most))
    draw = Draw(options.get("seed", 0))
    rows = [_row(once, ids, bos, corruption, draw) for once in _drawn(ids, length, n, draw)]
    return assemble(model, rows, name="induction", corruption=corruption, padding_side=side)


def _vocabulary(model: Any, prepend_bos: bool | None) -> tuple[list[int], list[int]]:
    """Returns the ids that are not special, and BOS as a list of one id, or of none."""
    tokenizer = model._tokenizer
    if tokenizer is None or tokenizer.hf is None:
        return list(range(model.cfg.d_vocab)), []
    known = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
    special = {*known, *tokenizer.hf.all_special_ids}
    ids = [one for one in range(min(model.cfg.d_vocab, tokenizer.d_vocab)) if one not in special]
    wanted = model.cfg.default_prepend_bos if prepend_bos is None else prepend_bos
    return ids, [tokenizer.bos_token_id] if wanted and tokenizer.bos_token_id is not None else []


def _drawn(ids: list[int], length: int, n: int, draw: Draw) -> list[list[int]]:
    """Draws ``n`` different sequences of different ids."""
    most = arrangements(ids, length)
    if most <= _MOST_NUMBERED:
        return [arrangement(ids, length, index)[0] for index, _ in zip(draw.order(most), range(n), strict=False)]
    found: dict[tuple[int, ...], None] = {}
    while len(found) < n:
        found[tuple(draw.some(ids, length))] = None
    return [list(one) for one in found]


def _row(once: list[int], ids: list[int], bos: list[int], corruption: str, draw: Draw) -> Row:
    used = set(once)
    count = len(once) if corruption == "first_copy" else 1
    fresh: list[int] = []
    while len(fresh) < count:  # rarely drawn in vain: the copies take less than half of the vocabulary
        if (token := draw.one(ids)) not in used:
            used.add(token)
            fresh.append(token)
    changed = [*once[: len(once) - count], *fresh]
    start, length = len(bos), len(once)
    spans: dict[str, Bounds] = {
        "first": (start, start + length),
        "before": (start + length - 2, start + length - 1),
        "answer": (start + length - 1, start + length),
        "second": (start + length, start + 2 * length - 1),
        "end": (start + 2 * length - 2, start + 2 * length - 1),
    }
    clean, corrupted = [*bos, *once, *once[:-1]], [*bos, *changed, *once[:-1]]
    return Row(clean, corrupted, spans, spans, once[-1:], changed[-1:], template=0)
