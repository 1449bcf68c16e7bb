"""Patchscopes: against hooks by hand, generation, another model's states, mistakes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from variants import build

import tljax
from tljax import HookedTransformer
from tljax.analysis.patchscopes import identity_prompt, patchscope, patchscope_generate
from tljax.errors import InputError

SOURCE, TARGET = [1, 2, 3], [4, 5, 6, 7]


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    return build("gpt2", n_layers=3)


def by_hand(model: HookedTransformer, source: int, target: int, source_pos: int, target_pos: int) -> jax.Array:
    _, cache = model.run_with_cache(jnp.array(SOURCE))
    put = tljax.Replace(cache["resid_post", source][0, source_pos], pos=target_pos)
    return model.run_with_hooks(jnp.array(TARGET), fwd_hooks=[(f"blocks.{target}.hook_resid_post", put)])[0, -1]


def test_every_pair_of_layers(model: HookedTransformer) -> None:
    found = patchscope(model, SOURCE, TARGET, source_pos=1, target_pos=-2, top_k=2)
    assert found.top_ids.shape == (3, 3, 2)
    for source in range(3):
        for target in range(3):
            log_probs = jax.nn.log_softmax(by_hand(model, source, target, 1, -2))
            np.testing.assert_allclose(found.top_log_probs[source, target, 0], log_probs.max(), atol=1e-5)
            assert found.top_ids[source, target, 0] == log_probs.argmax()


def test_another_target_layer_compiles_nothing(model: HookedTransformer, compilations: Any) -> None:
    patchscope(model, SOURCE, TARGET, target_layers=[0])
    before = compilations.count
    patchscope(model, SOURCE, TARGET, target_layers=[1])
    assert compilations.count == before


def test_the_same_place_of_the_same_prompt_changes_nothing(tiny: HookedTransformer) -> None:
    prompt = "When John and Mary went to the store, John gave a drink to"
    found = patchscope(tiny, prompt, prompt, source_layers=[1, 2], target_layers=[1, 2])
    assert [found.top_tokens(tiny)[n][n][0] for n in range(2)] == [" Mary", " Mary"]
    texts = patchscope_generate(tiny, prompt, prompt, source_layers=[1], target_layers=[1], max_new_tokens=3)
    plain = tiny.generate(prompt, 3, do_sample=False, verbose=False)
    assert texts == [[plain.removeprefix(prompt)]]


def test_states_of_another_model_need_a_mapping(model: HookedTransformer) -> None:
    wide = build("gpt2", d_model=20, n_layers=1)
    with pytest.raises(InputError, match=r"d_model=16\]. Give a mapping="):
        patchscope(model, SOURCE, TARGET, source_model=wide)
    found = patchscope(model, SOURCE, TARGET, source_model=wide, mapping=lambda states: states[:, :16])
    assert found.entropy.shape == (1, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source_pos": 3}, "source_pos=3 is out of range: the prompt has 3 tokens"),
        ({"target_pos": -5}, "target_pos=-5"),
        ({"source_layers": [3]}, "source_layers"),
        ({"target_layers": []}, "target_layers"),
        ({"target": [[1, 2], [3, 4]]}, "must be one prompt, got 2"),
    ],
)
def test_mistakes(model: HookedTransformer, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        patchscope(model, SOURCE, options.pop("target", TARGET), **options)


def test_the_identity_prompt() -> None:
    assert identity_prompt(["a", "b"], slot="x") == "a->a; b->b; x"
