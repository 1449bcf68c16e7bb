"""Docstrings: the next argument of a function that a docstring must describe (Heimersheim and Janiak 2023)."""

from typing import Any, Literal, Unpack

from tljax.tasks.drawing import Draw
from tljax.tasks.making import TaskOptions, Template, arrangement, arrangements, begin, generator
from tljax.tasks.task import Task
from tljax.tasks.texts import Pair, fill
from tljax.tasks.words.things import CODE_WORDS, STORY_WORDS

_INDENT = "    "
SENTENCE = (
    "def {method}(self, {before1}, {before2}, {arg1}, {arg2}, {arg3}, {after1}):\n"
    f'{_INDENT}"""{{start}} {{text1}} {{text2}}\n\n'
    f"{_INDENT}:param {{doc1}}: {{text3}} {{text4}}\n"
    f"{_INDENT}:param {{doc2}}: {{text5}} {{text6}}\n"
    f"{_INDENT}:param"
)
"""Two arguments that are not described, three that are, and one more; the third one's name comes next."""
_NAMES = ("before1", "before2", "arg1", "arg2", "arg3", "after1")
_TEXTS = tuple(f"text{number}" for number in range(1, 7))


@generator
def docstring(
    model: Any,
    n: int,
    *,
    corruption: Literal["random_random", "random_def", "random_doc"] = "random_random",
    **options: Unpack[TaskOptions],
) -> Task:
    """Makes Python functions of six arguments whose docstring, in reST style, is about to name the next one.

    The right answer is the third described argument, the wrong ones are the other five of the definition. Labelled
    parts: ``method``; ``before1``, ``before2``, ``arg1`` to ``arg3``, ``after1`` (arguments in the definition);
    ``doc1``, ``doc2`` (in the docstring); ``start`` and ``text1`` to ``text6`` (words of descriptions); ``end``.

    Args:
        model: the model whose tokenizer the words must suit: all are single tokens.
        n: number of prompts, all different.
        corruption: ``"random_def"``: other arguments in the definition. ``"random_doc"``: others in the docstring.
            ``"random_random"``: both, different ones.
        **options: ``seed``, ``prepend_bos`` and ``padding_side``, as of every generator.

    Raises:
        InputError: there are fewer than ``n`` such prompts; the message says how many.
        TokenizerError: the model has no tokenizer.
    """
    making = begin(model, "docstring", **options)
    reader = making.reader
    words, texts = reader.single(CODE_WORDS, before="self,"), reader.single(STORY_WORDS, before=":")
    starts = [word for word, ids in zip(texts, reader.plain(texts), strict=True) if len(ids) == 1]
    enough = len(words) >= len(_NAMES) + 1 + 8 and len(texts) > len(_TEXTS) and starts

    def make(index: int, draw: Draw) -> Pair:
        (method, *names), _ = arrangement(words, 1 + len(_NAMES), index)
        start = draw.one(starts)
        described = draw.some([word for word in texts if word != start], len(_TEXTS))
        given = dict(zip(_NAMES, names, strict=True))
        docs = {"doc1": given["arg1"], "doc2": given["arg2"]}
        fixed = {"method": method, "start": start, **dict(zip(_TEXTS, described, strict=True))}
        fresh = draw.some([word for word in words if word not in (method, *names)], len(_NAMES) + 2)
        new_names = dict(zip(_NAMES, fresh, strict=False)) if corruption != "random_doc" else given
        new_docs = dict(zip(docs, fresh[len(_NAMES) :], strict=True)) if corruption != "random_def" else docs
        wrong = tuple(f" {word}" for name, word in given.items() if name != "arg3")
        clean, corrupted = fill(SENTENCE, fixed | given | docs), fill(SENTENCE, fixed | new_names | new_docs)
        return Pair(clean, corrupted, (f" {given['arg3']}",), wrong)

    size = min(arrangements(words, 1 + len(_NAMES)), 2**50) if enough else 0
    return making.task([Template(size, make)], n, corruption)
