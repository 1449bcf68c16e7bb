"""Direct logit attribution: parts that add up to the logit, what each unit is, mistakes."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from variants import TOKENS, build

from tljax import HookedTransformer
from tljax.analysis.direct_logit_attribution import direct_logit_attribution
from tljax.errors import InputError, UnknownHookError

PROMPT = "When John and Mary went to the store, John gave a drink to"


@pytest.mark.parametrize("kind", ["multipliers", "sandwich"])
@pytest.mark.parametrize("unit", ["component", "head", "neuron"])
def test_parts_add_up_to_the_difference(kind: str, unit: str) -> None:
    model = build(kind)
    logits = model(TOKENS)
    answers, wrong = np.arange(len(TOKENS)) + 1, np.arange(len(TOKENS)) + 5
    rows = jnp.arange(len(TOKENS))
    found = direct_logit_attribution(model, TOKENS, answers, wrong, unit=unit)
    assert found.attribution.shape == (len(found.labels), len(TOKENS))
    expected = logits[rows, -1, answers] - logits[rows, -1, wrong]
    np.testing.assert_allclose(found.attribution.sum(0), expected, atol=1e-4)
    everywhere = direct_logit_attribution(model, TOKENS, 3, unit=unit, pos=None)
    np.testing.assert_allclose(everywhere.attribution.sum(0), logits[..., 3], atol=1e-4)


def test_neurons_are_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("gpt2")
    _, cache = model.run_with_cache(TOKENS)
    stack, labels = cache.stack_neuron_results(-1, pos_slice=-1, return_labels=True, incl_remainder=True)
    found = direct_logit_attribution(model, answer_tokens=3, unit="neuron", cache=cache)
    assert found.labels == (*labels, "bias")
    np.testing.assert_allclose(found.attribution[:-1], cache.logit_attrs(stack, 3, pos_slice=-1), atol=1e-5)


def test_layers_are_running_totals(tiny: HookedTransformer) -> None:
    found = direct_logit_attribution(tiny, PROMPT, " Mary", " John", unit="layer")
    parts = direct_logit_attribution(tiny, PROMPT, " Mary", " John")
    assert found.labels[0] == "0_pre"
    assert found.labels[-1] == "final_post"
    np.testing.assert_allclose(found.attribution[-1], parts.attribution[:-1].sum(0), atol=1e-4)


def test_the_largest_parts(tiny: HookedTransformer) -> None:
    found = direct_logit_attribution(tiny, [PROMPT, PROMPT], " Mary", " John", unit="head")
    table = found.by_head()
    assert table.shape == (4, 4, 2)
    (label, value), *_ = (pair for pair in found.top(18) if pair[0].startswith("L"))
    layer, head = int(label[1]), int(label[3])
    assert value == pytest.approx(float(table[layer, head].mean()))
    assert value == pytest.approx(float(table.mean(-1).max()))
    assert found.bottom(1)[0][1] == pytest.approx(float(found.mean().min()))
    assert repr(found).startswith("DirectLogitAttribution of 18 parts (unit='head'), largest: ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input": TOKENS, "answer_tokens": 1, "unit": "heads"}, "Did you mean 'head'"),
        ({"input": TOKENS}, "Give answer_tokens"),
        ({"answer_tokens": 1}, "a prompt or a cache"),
        ({"input": TOKENS, "answer_tokens": [1, 2, 3, 4, 5]}, "do not fit"),
        ({"input": TOKENS, "answer_tokens": [1, 2, 3, 4, 5], "unit": "neuron"}, "one answer, or one each"),
        ({"input": TOKENS, "answer_tokens": 1, "incorrect_tokens": [2, 3]}, "as many"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        direct_logit_attribution(build("gpt2"), **options)


def test_a_cache_that_lacks_activations_says_which() -> None:
    model = build("gpt2")
    _, cache = model.run_with_cache(TOKENS, names_filter="blocks.0.hook_resid_pre")
    with pytest.raises(UnknownHookError, match="names_filter"):
        direct_logit_attribution(model, answer_tokens=1, cache=cache)
    with pytest.raises(InputError, match="unit='head'"):
        direct_logit_attribution(model, TOKENS, 1).by_head()
