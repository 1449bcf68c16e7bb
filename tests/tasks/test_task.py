"""``Task``: choosing prompts, splits, batches, positions; what a model knows; metrics; prompts of one's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from task_models import untrained
from tiny_tokenizers import llama_like

from tljax import HookedTransformer, tasks
from tljax.errors import InputError
from tljax.patching import LogitDiff, ProbDiff, sweep
from tljax.tasks import Task


@pytest.fixture(scope="module")
def task(tiny: HookedTransformer) -> Task:
    return tasks.ioi(tiny, 40, corruption="s2_io_flip")


def test_choosing_prompts(task: Task) -> None:
    for index, numbers in ((3, [3]), (-1, [39]), (slice(2, 5), [2, 3, 4]), ([7, 1], [7, 1])):
        part = task[index]
        assert part.clean_texts == tuple(task.clean_texts[number] for number in numbers)
        assert (part.answer == task.answer[numbers]).all()
        assert (part.spans["IO"] == task.spans["IO"][numbers]).all()
        for row, number in enumerate(numbers):
            assert (part.corrupted.row(row) == task.corrupted.row(number)).all()
        assert part.clean.shape[1] == part.lengths.max()
    assert (task[task.lengths > 16].lengths > 16).all()
    assert len(list(task)) == 40


def test_splits_and_batches(task: Task) -> None:
    train, rest = task.split(0.75, seed=2)
    assert (len(train), len(rest)) == (30, 10)
    assert set(train.clean_texts) | set(rest.clean_texts) == set(task.clean_texts)
    assert task.split(30, seed=2)[0].clean_texts == train.clean_texts
    assert task.split(30, seed=3)[0].clean_texts != train.clean_texts
    assert [len(one) for one in task.batches(16)] == [16, 16, 8]
    alike = list(task.batches(4, by_length=True))
    assert sum(map(len, alike)) == 40
    assert all(bool(np.asarray(one.clean.mask).all()) for one in alike)
    assert list(task.by_length()) == sorted(set(task.lengths))


def test_it_shows_an_example(task: Task, tiny: HookedTransformer) -> None:
    shown = repr(task[:1])
    assert task.clean_texts[0] in shown
    assert f"answer     {tiny.to_string(task.answer[0])!r}" in shown
    assert "corruption s2_io_flip: 1 prompt of" in shown
    assert "traced" in str(jax.eval_shape(lambda one: one, task))


def test_it_is_a_pytree(task: Task) -> None:
    same = jax.tree.map(lambda leaf: leaf, task)
    assert same.clean_texts == task.clean_texts
    assert jax.jit(lambda one: one.clean.tokens.sum())(task) == task.clean.tokens.sum()


def test_a_model_on_a_task(task: Task, tiny: HookedTransformer) -> None:
    """The scores are those of single runs, in batches of any size."""
    found = task.evaluate(tiny)
    for size in (1, 7):
        again = task[:9].evaluate(tiny, batch_size=size)
        np.testing.assert_allclose(again.logit_diff, found.logit_diff[:9], atol=1e-4)
        np.testing.assert_allclose(again.corrupted_prob_diff, found.corrupted_prob_diff[:9], atol=1e-5)
    for number in (0, 11):
        logits = tiny(task.clean_texts[number])[0, -1]
        right, wrong = task.answer[number], task.wrong[number]
        np.testing.assert_allclose(found.logit_diff[number], logits[right] - logits[wrong], atol=1e-4)
        assert found.top[number] == (logits.argmax() == right)
    assert found.top.mean() > 0.8
    assert (found.logit_diff.mean(), -found.corrupted_logit_diff.mean()) > (5, 5)
    known = task.known_by(tiny)
    assert known.clean_texts == tuple(text for text, top in zip(task.clean_texts, found.top, strict=True) if top)


def test_metrics_take_the_answers(task: Task, tiny: HookedTransformer) -> None:
    logits = tiny(task.clean)
    found = task.evaluate(tiny)
    diff = LogitDiff(task.answer, task.wrong).in_text(task.clean)(logits)
    np.testing.assert_allclose(diff, found.logit_diff, atol=1e-4)
    probs = ProbDiff(**task.sets).in_text(task.clean)(logits)
    np.testing.assert_allclose(probs, found.prob_diff, atol=1e-5)
    few = task[task.templates == task.templates[0]]
    result = sweep(tiny, few.corrupted, few.clean, LogitDiff(few.answer, few.wrong), "resid_pre", axes=("pos",))
    names = [np.asarray(result.values)[0, few.pos(label)[0]] for label in ("S2", "place")]
    assert names[0] > 5  # the clean name restores the behaviour
    assert names[1] < -5  # the place, which is the same in both, does not


def test_sets_of_different_sizes(tiny: HookedTransformer, words: HookedTransformer) -> None:
    task = tasks.greater_than(words, 6)
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(6, 3, words.cfg.d_vocab)), jnp.float32)
    probs = np.asarray(jax.nn.softmax(logits[:, -1]))
    right = [
        probs[n, ids[mask]].sum() for n, (ids, mask) in enumerate(zip(task.answers, task.answer_mask, strict=True))
    ]
    wrong = [probs[n, ids[mask]].sum() for n, (ids, mask) in enumerate(zip(task.wrongs, task.wrong_mask, strict=True))]
    metric = ProbDiff(**task.sets)
    expected = np.subtract(right, wrong)
    np.testing.assert_allclose(metric(logits), expected, atol=1e-6)
    np.testing.assert_allclose(jax.jit(lambda one, rows: one(rows))(metric, logits), expected, atol=1e-6)
    with pytest.raises(InputError, match="not one array: use a metric of sets"):
        _ = task.answer


def test_a_sweep_of_a_metric_of_sets(tiny: HookedTransformer) -> None:
    """The engine's lazy logits give what a function of full logits gives."""
    task = tasks.ioi(tiny, 40).by_length()[15][:2]
    metric = ProbDiff(**task.sets)
    lazy, full = (
        sweep(tiny, task.corrupted, task.clean, one, "resid_pre", axes=("pos",), layers=[1]).values
        for one in (metric, lambda logits: metric(logits))
    )
    np.testing.assert_allclose(lazy, full, atol=1e-5)
    assert np.abs(np.asarray(lazy)).max() > 0.01


def test_prompts_of_ones_own(tiny: HookedTransformer) -> None:
    task = tasks.from_prompts(
        tiny,
        ["When John and Mary went to the store, John gave a drink to", "John met Mary. Mary thanked"],
        ["When John and Mary went to the store, Mary gave a drink to", "John met Mary. John thanked"],
        [" Mary", " John"],
        [" John", [" Mary", tiny.to_single_token(" Bob")]],
        parts={"first": ["John", "John"], "verb": ["gave", "thanked"]},
    )
    assert task.pos("first").tolist() == [2, 1]
    assert [tiny.to_string(task.clean.row(n)[p]) for n, p in enumerate(task.pos("verb"))] == [" gave", " thanked"]
    assert task.wrong_mask.sum(axis=1).tolist() == [1, 2]
    assert task.align().tolist()[1][:7] == list(range(7))


def test_pairs_of_different_lengths(tiny: HookedTransformer) -> None:
    task = tasks.from_prompts(
        tiny,
        ["Yesterday John met Mary at the store, and John gave a bottle of milk to"],
        ["Mary met John at the store. Mary gave a drink to"],
        [" Mary"],
        [" John"],
        parts={"first": ["John"], "thing": ["bottle of milk"], "place": ["store"]},
        corrupted_parts={"first": ["Mary"], "thing": ["drink"], "place": ["store"]},
        equal_lengths=False,
    )
    aligned = task.align()[0]
    clean, corrupted = (np.asarray(one.tokens)[0] for one in (task.clean, task.corrupted))
    pairs = {
        (str(tiny.to_string(clean[at])), str(tiny.to_string(corrupted[to]))) for at, to in enumerate(aligned) if to >= 0
    }
    assert {(" John", "Mary"), (" milk", " drink"), (" store", " store"), (" to", " to")} <= pairs
    assert aligned[task.spans["thing"][0, 0]] == -1
    back = task.align("corrupted")[0]
    assert all(back[to] == at for at, to in enumerate(aligned) if to >= 0)


def test_parts_with_a_tokenizer_that_drops_a_first_space() -> None:
    model = untrained(llama_like(), 300)
    task = tasks.from_prompts(
        model, ["the cat sat the"], ["the sat cat the"], [" cat"], [" sat"], parts={"a": ["cat"], "b": ["sat the"]}
    )
    assert model.to_str_tokens("the cat sat the")[1:] == ["the", "cat", "sat", "the"]
    assert (task.spans["a"].tolist(), task.spans["b"].tolist()) == ([[2, 3]], [[3, 5]])
    assert model.to_str_tokens(task.answer)[0] == "cat"
