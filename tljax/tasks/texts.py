"""Texts with labelled parts, and the tokens at which these parts stand."""

import dataclasses
import itertools
import re
import string
from collections.abc import Iterable, Mapping, Sequence

from tljax.text.tokenizer import Tokenizer
from tljax.text.tokens import to_rows

Bounds = tuple[int, int]
"""Start and stop (exclusive), in characters or in tokens."""
ABSENT: Bounds = (-1, -1)
"""The tokens of a part that a prompt does not have."""
_LAST_WORDS = re.compile(r"\S+\s*\S*\s*$")


@dataclasses.dataclass(frozen=True)
class Text:
    """A text and where its labelled parts stand in it.

    Attributes:
        text: the text.
        parts: a label and start and stop, in characters; an empty part is absent.
    """

    text: str
    parts: Mapping[str, Bounds] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Pair:
    """A clean and a corrupted text with the answers to compare.

    Attributes:
        clean, corrupted: the texts.
        answers, wrongs: right and wrong continuations of ``clean``, with the space that they start with; or token ids.
        template: number of the template they were made from.
    """

    clean: Text
    corrupted: Text
    answers: tuple[str | int, ...]
    wrongs: tuple[str | int, ...]
    template: int = 0


def fill(template: str, words: Mapping[str, str]) -> Text:
    """Fills a template such as ``"When {IO} and {S1} met"``; each field becomes a labelled part.

    >>> fill("When {IO} came", {"IO": "Mary"})
    Text(text='When Mary came', parts={'IO': (5, 9)})
    """
    text, parts = "", {}
    for literal, field, _, _ in string.Formatter().parse(template):
        text += literal
        if field is not None:
            parts[field] = len(text), len(text) + len(words[field])
            text += words[field]
    return Text(text, parts)


def fields(template: str) -> list[str]:
    """Returns the names of a template's fields in order."""
    return [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]


def find_word(text: str, word: str, last: bool = False) -> Bounds | None:
    """Returns where a whole word first (or last) stands in a text, in characters; ``None`` if it does not."""
    places = [match.span() for match in re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", text)]
    return places[-1 if last else 0] if places else None


class Reader:
    """Reads a tokenizer, and remembers what it read.

    Args:
        tokenizer: the tokenizer.
        prepend_bos: whether prompts start with BOS.
    """

    def __init__(self, tokenizer: Tokenizer, prepend_bos: bool) -> None:
        self.tokenizer, self.prepend_bos = tokenizer, prepend_bos
        self._plain: dict[str, list[int]] = {"": []}
        self._answers: dict[str, dict[str, int | None]] = {}
        self._pieces: dict[int, str] = {}

    def plain(self, texts: Iterable[str]) -> list[list[int]]:
        """Returns the ids of each text alone, without special tokens that the tokenizer adds."""
        texts = list(texts)
        if new := list(dict.fromkeys(text for text in texts if text not in self._plain)):
            self._plain.update(zip(new, self.tokenizer.plain_rows(new), strict=True))
        return [self._plain[text] for text in texts]

    def prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each prompt, as the model is given them."""
        return to_rows(self.tokenizer, list(texts), prepend_bos=self.prepend_bos, warn=False)

    def lengths(self, words: Sequence[str], before: str = "the") -> list[int | None]:
        """Returns how many tokens each word is after ``before`` and a space.

        ``None`` stands for a word that does not start a token of its own, or that the vocabulary cannot spell.
        """
        self.plain([before, *(f"{before} {word}" for word in words)])
        found = [self._after(before, f" {word}") for word in words]
        return [
            len(ids) if ids is not None and self._spell(ids, word) else None
            for ids, word in zip(found, words, strict=True)
        ]

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Returns the string of each token."""
        if new := list(dict.fromkeys(one for one in ids if one not in self._pieces)):
            self._pieces.update(zip(new, self.tokenizer.pieces(new), strict=True))
        return [self._pieces[one] for one in ids]

    def _spell(self, ids: Sequence[int], word: str) -> bool:
        """Whether tokens spell a word, spaces and case aside: an unknown token does not."""
        return "".join(self.pieces(ids)).strip().casefold() == word.strip().casefold()

    def single(self, words: Iterable[str], before: str = "the") -> list[str]:
        """Returns the words that are one token after ``before`` and a space."""
        words = list(words)
        return [word for word, length in zip(words, self.lengths(words, before), strict=True) if length == 1]

    def _after(self, before: str, more: str) -> list[int] | None:
        start, whole = self.plain([before, before + more])
        return whole[len(start) :] if whole[: len(start)] == start else None

    def answers(self, prompt: str, answers: Sequence[str]) -> list[int | None]:
        """Returns the id of the one token by which each answer continues a prompt; ``None`` if it is not one token.

        What stands before the prompt's last two words does not matter. Where an answer would merge with the prompt's
        last token, as "34" may with "17", its id is that of the answer alone.
        """
        end = _LAST_WORDS.search(prompt)
        tail = prompt if end is None else end.group()
        known = self._answers.setdefault(tail, {})
        if new := [answer for answer in answers if answer not in known]:
            self.plain([tail, *new, *(tail + answer for answer in new)])
        for answer in new:
            ids = self._after(tail, answer)
            ids = self.plain([answer])[0] if ids is None else ids
            known[answer] = ids[0] if len(ids) == 1 and self._spell(ids, answer) else None
        return [known[answer] for answer in answers]

    def begin(self, prompt: str, answer: str) -> int | str:
        """Returns the id of the first token of ``answer`` after a prompt; the answer itself if that cannot be told."""
        end = _LAST_WORDS.search(prompt)
        ids = self._after(prompt if end is None else end.group(), answer)
        return ids[0] if ids and answer.strip().startswith(self.pieces(ids[:1])[0].strip()) else answer

    def boundaries(self, text: str, ids: Sequence[int]) -> dict[int, int] | None:
        """Returns at which characters tokens begin, each with the token's number, and the text's end.

        ``None`` where the tokens' strings do not make up the text, as with tokenizers that drop a first space.
        """
        pieces = self.pieces(ids)
        if "".join(pieces) != text:
            return None
        ends = itertools.accumulate(map(len, pieces), initial=0)
        return {end: number for number, end in enumerate(ends)}


def locate(reader: Reader, texts: Sequence[Text]) -> list[tuple[list[int], dict[str, Bounds]] | None]:
    """Returns each prompt's ids and the tokens of its parts, counted in them.

    A space before a part belongs to its first token. ``"end"`` is the last token of the text.

    Returns:
        ``None`` for a prompt in which a part splits a token, or which the vocabulary cannot spell.
    """
    rows = reader.prompts([text.text for text in texts])
    bare = reader.plain(text.text for text in texts)
    return [_located(reader, *one) for one in zip(texts, rows, bare, strict=True)]


def _located(reader: Reader, text: Text, row: list[int], ids: list[int]) -> tuple[list[int], dict[str, Bounds]] | None:
    starts = [n for n in range(len(row) - len(ids) + 1) if row[n : n + len(ids)] == ids]
    if not ids or not starts or reader.tokenizer.unk_token_id in ids:
        return None
    first, spans = starts[0], {}
    begins = reader.boundaries(text.text, ids)
    for label, bounds in text.parts.items():
        if bounds[0] == bounds[1]:
            spans[label] = ABSENT
            continue
        cuts = _cuts(text.text, bounds)
        start, stop = (
            _tokens_before(reader, text.text[:cut], ids) if begins is None else begins.get(cut) for cut in cuts
        )
        if start is None or stop is None or start == stop:
            return None
        spans[label] = first + start, first + stop
    return row, {**spans, "end": (first + len(ids) - 1, first + len(ids))}


def _tokens_before(reader: Reader, head: str, ids: list[int]) -> int | None:
    """Returns how many of a text's tokens make up its beginning ``head``; ``None`` if ``head`` ends inside one."""
    own = reader.plain([head])[0]
    return len(own) if ids[: len(own)] == own else None


def _cuts(text: str, bounds: Bounds) -> Bounds:
    """Returns where a part begins, with the space that belongs to it, and where it ends."""
    start, stop = bounds
    return (start - 1 if text[:start].endswith(" ") else start), stop
