"""Readers of public files: MIB, EAP-IG faithfulness, sparse feature circuits, RAVEL."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tljax import HookedTransformer, tasks
from tljax.errors import InputError
from tljax.tasks import DroppedPromptsWarning

CLEAN = "When John and Mary went to the store, John gave a drink to"
OTHER = "When John and Mary went to the store, Mary gave a drink to"


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def make(rows: Any, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        if name.endswith("csv"):
            with path.open("w", newline="") as stream:
                writer = csv.DictWriter(stream, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        else:
            path.write_text(json.dumps(rows) if name.endswith("json") else "\n".join(map(json.dumps, rows)))
        return path

    return make


def ioi_row(**fields: Any) -> dict[str, Any]:
    metadata = {"subject": "John", "indirect_object": "Mary", "random_c": "Bob", "object": "drink", "place": "store"}
    flip = {"prompt": OTHER, "choices": [" John", " Mary"], "answerKey": 0}
    row = {"prompt": CLEAN, "metadata": metadata, "template": "one", "s2_io_flip_counterfactual": flip}
    return row | {"abc_counterfactual": None, "choices": [" John", " Mary"], "answerKey": 1} | fields


def test_mib_ioi(tiny: HookedTransformer, write: Callable[..., Path]) -> None:
    longer = {"prompt": OTHER.replace("a drink", "a bottle of milk")}
    rows = [ioi_row(), ioi_row(s2_io_flip_counterfactual=longer), ioi_row(s2_io_flip_counterfactual=None), ioi_row()]
    with pytest.warns(DroppedPromptsWarning, match="Left out 2 of 4 rows: 1 .*no counterf.*, 1 .*unequal") as told:
        task = tasks.load_mib(write(rows), tiny, task="ioi")
    assert told[0].filename == __file__
    assert dict(task.dropped) == {"no counterfactual": 1, "unequal numbers of tokens": 1}
    assert task.corrupted_texts == (OTHER, OTHER)
    assert task.corruption == "s2_io_flip"
    assert [tiny.to_string(one[:1])[0] for one in (task.answers, task.wrongs)] == [" Mary", " John"]
    tokens = np.asarray(task.clean.tokens)[0]
    found = {label: str(tiny.to_string(tokens[task.pos(label)[0]])) for label in task.spans}
    assert found == {"IO": " Mary", "S1": " John", "S2": " John", "object": " drink", "place": " store", "end": " to"}
    assert task.pos("S1")[0] < task.pos("S2")[0]
    assert "left out" in repr(task)
    with pytest.raises(InputError, match=r"no column 's1_counterfactual'. Its counterfactuals: abc_counterfactual, s2"):
        tasks.load_mib(write([ioi_row()]), tiny, task="ioi", corruption="s1")


def test_mib_choices_and_sums(words: HookedTransformer, write: Callable[..., Path]) -> None:
    prompt = "The sky is blue. What color is the sky?\n{}. blue\n{}. red\nAnswer:"
    choices = {"label": [" A", " B"], "text": ["blue", "red"]}
    other = {"label": [" X", " Y"], "text": ["blue", "red"]}
    row = {"prompt": prompt.format("A", "B"), "choices": choices, "answerKey": 0}
    row |= {"symbol_counterfactual": {"prompt": prompt.format("X", "Y"), "choices": other, "answerKey": 0}}
    for task in ("mcqa", "arc"):
        found = tasks.load_mib(write([row], "rows.json"), words, task=task)
        assert words.to_string(np.r_[found.answer, found.wrong]) == " A X"
    sums = [
        {"prompt": f"Q: How much is {a} plus {b}?\nA:", "label": f" {a + b}", "operator": operator,
         "random_counterfactual": {"prompt": "Q: How much is 20 plus 21?\nA:", "label": " 41"}}
        for a, b, operator in ((34, 21, "+"), (50, 21, "-"))
    ]  # fmt: skip
    found = tasks.load_mib(write(sums), words, task="arithmetic")
    assert words.to_string(np.r_[found.answer, found.wrong]) == " 55 41"


def test_faithfulness(words: HookedTransformer, write: Callable[..., Path]) -> None:
    base = {"clean": CLEAN, "corrupted": OTHER, "corrupted_hard": CLEAN.replace("John gave", "Bob gave")}
    ids = {"correct_idx": 7, "incorrect_idx": 8}
    task = tasks.load_faithfulness(write([base | ids], "a.csv"), words, task="ioi", corruption="corrupted_hard")
    assert (task.answer.tolist(), task.wrong.tolist()) == ([7], [8])
    assert task.corrupted_texts == (base["corrupted_hard"],)
    lists = {"answers_idx": "[7, 9]", "corrupted_answers_idx": "[8]"}
    task = tasks.load_faithfulness(write([base | lists], "b.csv"), words, task="hypernymy")
    assert (task.answers.tolist(), task.wrongs.tolist()) == ([[7, 9]], [[8]])
    year = "The war lasted from the year 17{} to the year 17"
    rows = [{"clean": year.format(one), "corrupted": year.format("01"), "correct_idx": one} for one in ("97", "30")]
    task = tasks.load_faithfulness(write(rows, "c.csv"), words, task="greater-than")
    assert words.to_str_tokens(task.answers[0][task.answer_mask[0]], prepend_bos=False) == ["98", "99"]
    assert task.wrong_mask.sum(axis=1).tolist() == [98, 31]
    rows = [
        {"clean": "The boys", "corrupted": "The boy", "group": "simple", "plural": "1"},
        {"clean": "The boy", "corrupted": "The boys", "group": "simple", "plural": "0"},
    ]
    task = tasks.load_faithfulness(write(rows, "d.csv"), words, task="sva")
    assert words.to_string(task.answers[0][:2]) == " are were"
    assert (task.answers[0] == task.wrongs[1]).all()
    assert task.templates.tolist() == [0, 0]
    for task_name, columns in (
        ("gender-bias", ("clean_answer_idx", "corrupted_answer_idx")),
        ("fact-retrieval", ("country_idx", "corrupted_country_idx")),
    ):
        path = write([base | dict(zip(columns, (5, 6), strict=True))], "e.csv")
        assert tasks.load_faithfulness(path, words, task=task_name).sets["wrong"].tolist() == [[6]]


def test_sfc(words: HookedTransformer, write: Callable[..., Path]) -> None:
    row = {"clean_prefix": "The boys near the car", "patch_prefix": "The boy near the car"}
    answers = {"clean_answer": " are", "patch_answer": " is"}
    rows = [row | answers | {"case": "plural_singular"}, row | answers | {"clean_answer": " arezz", "case": "other"}]
    with pytest.warns(DroppedPromptsWarning, match="an answer that is not one token"):
        task = tasks.load_sfc(write(rows), words)
    assert words.to_string(np.r_[task.answer, task.wrong]) == " are is"


def test_ravel(words: HookedTransformer, write: Callable[..., Path]) -> None:
    row = {"input": "We flew to Paris, the capital of", "label": "France", "source_label": "Italy"}
    row |= {
        "source_input": "People in Rome speak",
        "inv_label": "Italy",
        "split": "Country",
        "source_split": "Language",
    }
    row |= {"entity": "Paris", "source_entity": "Rome"}
    files = [write({"Country": [row], "Language": [row | {"split": "Language"}]}, "a.json"), write([row], "b.json")]
    task = tasks.load_ravel(files, words)
    assert (len(task), task.templates.tolist()) == (3, [0, 1, 0])
    assert words.to_string(np.r_[task.answer[:1], task.wrong[:1]]) == " France Italy"
    at, to = task.pos("entity")[0], task.pos("entity", corrupted=True)[0]
    assert (at, to) == (4, 3)
    assert task.align()[0, at] == to
    assert len(tasks.load_ravel(files, words, split="Language")) == 1
    with pytest.raises(InputError, match="no rows of split='Colour'; there are: Country, Language"):
        tasks.load_ravel(files, words, split="Colour")
