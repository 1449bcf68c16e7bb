"""Files of prompts in pairs: sparse feature circuits (Marks et al. 2024) and RAVEL (Huang et al. 2024)."""

from collections import Counter
from collections.abc import Sequence
from os import PathLike
from typing import Any, Unpack

from tljax.checks import typed
from tljax.errors import InputError
from tljax.tasks.files.rows import need, numbered, read_rows
from tljax.tasks.prompts import FileOptions, of_pairs, reader_of
from tljax.tasks.task import Task
from tljax.tasks.texts import Pair, Text, find_word


@typed
def load_sfc(path: str | PathLike[str], model: Any, **options: Unpack[FileOptions]) -> Task:
    """Reads the JSONL files of sparse feature circuits, such as ``simple``, ``rc``, ``within_rc`` and ``nounpp``.

    A line has ``clean_prefix``, ``patch_prefix``, ``clean_answer``, ``patch_answer`` (the wrong one) and ``case``,
    whose values become the template numbers.

    Args:
        path: a ``.jsonl`` or ``.json`` file.
        model: the model.
        **options: ``equal_lengths`` (leaves out pairs of unequally many tokens; the default), ``prepend_bos``,
            ``padding_side``.

    Returns:
        The rows that suit the tokenizer, in their order; ``task.dropped`` counts the others.

    Raises:
        InputError: the file cannot be read, a row lacks a column, or no row suits.

    Warns:
        DroppedPromptsWarning: rows were left out.
    """
    rows = read_rows(path)
    cases = numbered([str(row.get("case")) for row in rows])
    columns = ("clean_prefix", "patch_prefix", "clean_answer", "patch_answer")
    pairs = []
    for number, row in enumerate(rows):
        clean, corrupted, answer, wrong = (need(row, column, path, number) for column in columns)
        pairs.append(Pair(Text(clean), Text(corrupted), (answer,), (wrong,), cases[str(row.get("case"))]))
    return of_pairs(model, pairs, Counter(), name="sfc", corruption="patch", **options)


@typed
def load_ravel(
    path: str | PathLike[str] | Sequence[str | PathLike[str]],
    model: Any,
    *,
    split: str | None = None,
    first_token: bool = True,
    **options: Unpack[FileOptions],
) -> Task:
    """Reads instances of RAVEL, from one JSON file or several.

    A row is an interchange: ``input`` is the base (here ``clean``), ``source_input`` the source (``corrupted``). The
    right answer is ``label``, the base's own; the wrong one ``inv_label``, what the base's question gives for the
    source's entity. An intervention that moves the attribute asked for should give ``task.wrong``, one that leaves it
    should give ``task.answer``. The two prompts ask for different attributes and are of any lengths unless
    ``equal_lengths=True``. Labelled parts: ``entity``, where it stands in the text. Template numbers tell the splits.

    Args:
        path: a ``.json`` or ``.jsonl`` file, or a list of them.
        model: the model.
        split: keeps the rows with this value of ``split``.
        first_token: whether labels of several tokens count by their first, as in the benchmark; a row whose two labels
            then are one token is left out. ``False`` leaves labels of several tokens out.
        **options: ``equal_lengths`` (here ``False`` by default), ``prepend_bos``, ``padding_side``.

    Returns:
        The rows that suit the tokenizer, in their order; ``task.dropped`` counts the others.

    Raises:
        InputError: a file cannot be read, a row lacks a column, there is no such split, or no row suits.

    Warns:
        DroppedPromptsWarning: rows were left out.
    """
    paths = [path] if isinstance(path, str | PathLike) else list(path)
    rows = [(file, number, row) for file in paths for number, row in enumerate(read_rows(file))]
    splits = numbered([str(row.get("split")) for _, _, row in rows])
    if split is not None and split not in splits:
        raise InputError(f"There are no rows of split={split!r}; there are: {', '.join(splits)}.")
    reader = reader_of(model, options.get("prepend_bos"))
    columns = ("input", "source_input", "label", "inv_label", "entity", "source_entity")
    pairs = []
    for file, number, row in rows:
        if split is not None and str(row.get("split")) != split:
            continue
        base, source, label, other, entity, source_entity = (need(row, column, file, number) for column in columns)
        clean, corrupted = _with_entity(base, entity), _with_entity(source, source_entity)
        answers = [_spaced(base, one) for one in (label, other)]
        right, wrong = (reader.begin(base, one) if first_token else one for one in answers)
        pairs.append(Pair(clean, corrupted, (right,), (wrong,), splits[str(row.get("split"))]))
    name = f"ravel {split}" if split else "ravel"
    return of_pairs(model, pairs, Counter(), name=name, corruption="source", **{"equal_lengths": False, **options})


def _with_entity(text: str, entity: str) -> Text:
    bounds = find_word(text, entity, last=True)
    return Text(text, {} if bounds is None else {"entity": bounds})


def _spaced(prompt: str, label: str) -> str:
    """Returns a label as it continues a prompt: with a space unless one of the two has it."""
    return label if label.startswith(" ") or prompt.endswith((" ", '"', "(")) else f" {label}"
