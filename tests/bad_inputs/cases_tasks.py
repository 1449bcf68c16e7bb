"""Tasks: prompts that cannot be made, files that are broken, alignments that contradict."""

import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any

import jax
from table import Case, World

from tljax import tasks
from tljax.errors import ArgumentError, InputError, TokenizerError
from tljax.patching import ProbDiff
from tljax.tasks import Task
from tljax.text import align


@functools.cache
def ioi(w: World) -> Task:
    return tasks.ioi(w.tiny, 4)


def own(w: World, clean: Any = None, corrupted: Any = None, answer: Any = " Mary", **options: Any) -> Task:
    given = ([w.P] if clean is None else clean, [w.Q] if corrupted is None else corrupted)
    return tasks.from_prompts(w.tiny, *given, [answer], [" John"], **options)


def file(text: str, name: str = "rows.jsonl") -> Path:
    path = Path(tempfile.mkdtemp()) / name
    path.write_text(text)
    return path


ROW = '{"clean_prefix": "John met", "patch_prefix": "Mary met", "clean_answer": " Mary", "patch_answer": " John"}'
CSV = "clean,corrupted,correct_idx,incorrect_idx\n"


CASES: tuple[Case, ...] = (
    Case("no prompts", lambda w: tasks.ioi(w.tiny, 0), InputError, "n=0 must be a whole number of at least 1"),
    Case("a number of prompts as text", lambda w: tasks.ioi(w.tiny, "10"), InputError, "n='10'", "a whole number"),
    Case("more prompts than there are", lambda w: tasks.ioi(w.tiny, 10**9), InputError, "at most", "n=1000000000"),
    Case("a corruption that is misspelt", lambda w: tasks.ioi(w.tiny, 4, corruption="s2_flip"), InputError,
         "'s2_flip'", "Did you mean 's2_io_flip'"),
    Case("an option that is misspelt", lambda w: tasks.ioi(w.tiny, 4, sede=1), ArgumentError, "Did you mean 'seed'"),
    Case("a negative seed", lambda w: tasks.ioi(w.tiny, 4, seed=-1), InputError, "seed=-1", "at least 0"),
    Case("a template without a field", lambda w: tasks.ioi(w.tiny, 4, templates=["{first} and {second} met"]),
         InputError, "templates[0]", "{S2}"),
    Case("names that are not single tokens", lambda w: tasks.ioi(w.tiny, 4, names=["Zbigniew", "Aleksandra"]),
         InputError, "tasks.ioi can make no prompt"),
    Case("years that do not split in two", lambda w: tasks.greater_than(w.tiny, 4), InputError,
         "tasks.greater_than can make no prompt", "single tokens"),
    Case("words without a tokenizer", lambda w: tasks.ioi(w.small, 4), TokenizerError, "tasks.ioi", "set_tokenizer"),
    Case("copies longer than the context", lambda w: tasks.induction(w.small, 1, length=3), InputError,
         "5 tokens", "n_ctx=4"),
    Case("a vocabulary too small for two copies", lambda w: tasks.induction(w.tiny, 1, length=600), InputError,
         "1200 tokens", "n_ctx=128"),
    Case("prompts longer than the context", lambda w: own(w, ["The" + " dog" * 128], ["The" + " cat" * 128]),
         InputError, "n_ctx=128"),
    Case("a prompt that a task does not have", lambda w: ioi(w)[7], IndexError, "no prompt 7", "0 to 3"),
    Case("a choice of no prompts", lambda w: ioi(w)[4:], InputError, "keeps none of the 4"),
    Case("a mask of the wrong length", lambda w: ioi(w)[[True, False]], InputError, "4 booleans"),
    Case("a part that is misspelt", lambda w: ioi(w).pos("s2"), InputError, "'s2'", "Did you mean 'S2'"),
    Case("a part that some prompts lack", lambda w: _lacking(w).pos("object"), InputError, "1 of 4", "Leave them out"),
    Case("a split of everything", lambda w: ioi(w).split(1.0), InputError, "train=1.0", "1 to 3"),
    Case("a split of half a prompt", lambda w: ioi(w).split(2.5), InputError, "train=2.5", "share between"),
    Case("batches of none", lambda w: ioi(w).batches(0), InputError, "batch_size=0"),
    Case("a rule that is misspelt", lambda w: ioi(w).known_by(w.tiny, rule="tops"), InputError, "Did you mean 'top'"),
    Case("another model's task", lambda w: ioi(w).evaluate(w.small), InputError, "outside the model's vocabulary",
         "another model's tokenizer"),
    Case("a pair of unequal lengths", lambda w: own(w, corrupted=["When John"]), InputError, "unequal numbers",
         "equal_lengths=False"),
    Case("an answer of several tokens", lambda w: own(w, answer=" Mary and"), InputError, "not one token", "Prompt 0"),
    Case("an answer without its space", lambda w: own(w, answer="zebra"), InputError, "not one token"),
    Case("right and wrong alike", lambda w: own(w, answer=" John"), InputError, "both right and wrong"),
    Case("an answer that is no token", lambda w: own(w, answer=10**6), InputError, "no token 1000000"),
    Case("no answer", lambda w: own(w, answer=[]), InputError, "answer[0] is empty"),
    Case("one text for a list", lambda w: own(w, clean=w.P), InputError, "clean= must be a list"),
    Case("lists of different lengths", lambda w: own(w, corrupted=[w.Q, w.Q]), InputError, "corrupted=", "1 clean"),
    Case("a part that the text lacks", lambda w: own(w, parts={"IO": ["Bob"]}), InputError, "'Bob'", "does not stand"),
    Case("half a token as a part", lambda w: own(w, parts={"IO": ["Mar"]}), InputError, "does not begin and end with"),
    Case("parts of unequal texts", lambda w: own(w, parts={"IO": ["Mary"]}, equal_lengths=False), InputError,
         "corrupted_parts="),
    Case("answers of different numbers as one array", lambda w: own(w, answer=[" Mary", " Bob"]).answer.tolist(),
         equals=lambda w: [[w.tiny.to_single_token(" Mary"), w.tiny.to_single_token(" Bob")]]),
    Case("a file that is not there", lambda w: tasks.load_sfc("/nowhere.jsonl", w.tiny), InputError, "no file",
         "download it first"),
    Case("a file of another kind", lambda w: tasks.load_sfc(file("", "rows.txt"), w.tiny), InputError, "'.txt'"),
    Case("an empty file", lambda w: tasks.load_sfc(file(""), w.tiny), InputError, "has no rows"),
    Case("a half-written line", lambda w: tasks.load_sfc(file(f"{ROW}\n{ROW[:40]}"), w.tiny), InputError, "line 2",
         "half written"),
    Case("a half-written table", lambda w: tasks.load_faithfulness(file(CSV + "a b,c", "a.csv"), w.tiny, task="ioi"),
         InputError, "row 2", "2 values for the 4 columns"),
    Case("a column that is missing", lambda w: tasks.load_sfc(file(ROW.replace("patch_prefix", "patch")), w.tiny),
         InputError, "no column 'patch_prefix'", "It has: clean_prefix"),
    Case("ids of another tokenizer",
         lambda w: tasks.load_faithfulness(file(CSV + "John,Mary,5335,1", "a.csv"), w.tiny, task="ioi"), InputError,
         "'correct_idx'", "0 to 968", "made for this model"),
    Case("code for a list of ids", lambda w: tasks.load_faithfulness(
        file("clean,corrupted,answers_idx,corrupted_answers_idx\nJohn,Mary,__import__('os'),[1]", "a.csv"), w.tiny,
        task="hypernymy"), InputError, "not a list of token ids"),
    Case("rows none of which suits", lambda w: tasks.load_sfc(file(ROW.replace(" John", " Zbigniew")), w.tiny),
         InputError, "None of the 1 rows", "not one token"),
    Case("a counterfactual that is not there", lambda w: tasks.load_mib(file(ROW), w.tiny, task="ioi"), InputError,
         "'s2_io_flip_counterfactual'", "none"),
    Case("prompts to align in other numbers", lambda _: align([[1]], [[1], [2]]), InputError, "1 base", "2 source"),
    Case("texts to align", lambda _: align("John", "Mary"), InputError, "to_batch"),
    Case("parts of one side only", lambda _: align([[1]], [[1, 2]], spans={"a": [0]}), InputError, "source_spans="),
    Case("parts of other names", lambda _: align([[1]], [[1, 2]], spans={"a": [0]}, source_spans={"b": [0]}),
         InputError, "only one of them has a, b"),
    Case("a part beyond the text", lambda _: align([[1]], [[1, 2]], spans={"a": [3]}, source_spans={"a": [0]}),
         InputError, "no position 3 in prompt 0"),
    Case("positions of unequal prompts", lambda _: align([[1]], [[1, 2]], method="position"), InputError, "1 tokens",
         "its source 2"),
    Case("an alignment under jit", lambda _: jax.jit(lambda rows: align(rows, rows))(jax.numpy.ones((1, 2), int)),
         InputError, "outside jax.jit"),
    Case("a mask of other ids", lambda _: ProbDiff([[1, 2]], [[3]], answer_mask=[[True]]), InputError, "answer_mask"),
    Case("a mask of numbers", lambda _: ProbDiff([[1, 2]], [[3]], answer_mask=[[1, 0]]), InputError, "booleans"),
    Case("a set of nothing", lambda _: ProbDiff([[1]], [[3]], wrong_mask=[[False]]), InputError, "at least one True"),
)  # fmt: skip


def _lacking(w: World) -> Task:
    task = ioi(w)
    spans = {label: span.copy() for label, span in task.spans.items()}
    spans["object"][2] = -1
    return dataclasses.replace(task, spans=spans)
