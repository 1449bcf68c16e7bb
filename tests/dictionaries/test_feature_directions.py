"""Directions of features in the logits add up to logits; virtual weights are what a linear path carries."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from feature_models import D_MODEL, TOKENS, VOCAB, dictionary, plain_model, spliced_model

from tljax import HookedTransformer
from tljax.analysis import direct_logit_attribution
from tljax.dictionaries import Dictionary
from tljax.dictionaries.attribution import (
    direct_feature_attribution,
    feature_logits,
    similar_features,
    stream_directions,
    virtual_weights,
)

HEADS = 2 * 8
WHERE = [
    ("blocks.2.hook_resid_post", None), ("blocks.1.hook_attn_out", None), ("blocks.1.attn.hook_z", None),
    ("blocks.2.mlp.hook_post", None), ("blocks.2.ln2.hook_normalized", "blocks.2.hook_mlp_out"),
]  # fmt: skip


def at(reads: str, writes: str | None, **fields: Any) -> Dictionary:
    d_in = {"attn.hook_z": HEADS, "mlp.hook_post": 24}.get(reads.split(".", 2)[2], D_MODEL)
    return dictionary(reads, writes, d_in=d_in, seed=3, **fields)


def final_scale(model: HookedTransformer) -> np.ndarray:
    return np.asarray(model.run_with_cache(TOKENS)[1]["ln_final.hook_scale"])[..., 0]


@pytest.mark.parametrize("fields", [{"normalization_type": "LN"}, {"normalization_type": "RMS"}])
def test_feature_logits_are_what_a_unit_of_the_feature_adds(fields: Any) -> None:
    """With the final norm's scale held, adding a decoder row to the final stream moves the logits by just that."""
    model, one = plain_model(**fields), at("blocks.2.hook_resid_post", None)
    found = feature_logits(model, one, [4, 9], k=VOCAB)
    scale = final_scale(model)[0, -1]
    base = np.asarray(model(TOKENS))[0, -1]
    for row, feature in enumerate((4, 9)):

        def add(act: Any, hook: Any, feature: int = feature) -> Any:
            return act + one.W_dec[feature][None, None]

        def hold(act: Any, hook: Any) -> Any:
            return jnp.asarray(final_scale(model))[..., None]

        hooks = [("blocks.2.hook_resid_post", add), ("ln_final.hook_scale", hold)]
        moved = np.asarray(model.run_with_hooks(TOKENS, fwd_hooks=hooks))[0, -1] - base
        values = np.zeros(VOCAB)
        values[found.raised[row]] = found.raised_by[row] / scale
        np.testing.assert_allclose(values, moved, atol=2e-5)
        np.testing.assert_allclose(found.lowered_by[row][::-1], found.raised_by[row], atol=1e-6)
    assert "norm's scale" in str(found)
    plain = feature_logits(model, one, 4, k=3, norm=False)
    np.testing.assert_allclose(plain.raised_by[0], np.sort(np.asarray(one.W_dec[4] @ model.W_U))[::-1][:3], atol=1e-5)


@pytest.mark.parametrize(("reads", "writes"), WHERE)
def test_direct_attribution_of_features_sums_to_that_of_the_point(reads: str, writes: str | None) -> None:
    model, one = plain_model(), at(reads, writes)
    found = direct_feature_attribution(model, one, TOKENS, 3, 7)
    np.testing.assert_allclose(found.attribution.sum(axis=1) + found.bias + found.error, found.total, atol=1e-5)
    cache = model.run_with_cache(TOKENS)[1]
    features = np.asarray(one.encode(cache[reads][:, -1]))
    np.testing.assert_allclose(found.activations, features, atol=1e-5)
    assert not found.attribution[features == 0].any()
    feature, value = found.top(1)[0]
    assert abs(value) == pytest.approx(np.abs(found.attribution.mean(axis=0)).max())
    direction = np.asarray(stream_directions(model, one, feature)[0], np.float64)
    centred = direction - direction.mean()
    gain = np.asarray(model.params["ln_final"]["w"])
    logits = (centred * gain) @ np.asarray(model.W_U[:, 3] - model.W_U[:, 7])
    right = features[:, feature] * logits / final_scale(model)[:, -1]
    np.testing.assert_allclose(found.attribution[:, feature], right, atol=1e-5)
    parts = dict(direct_logit_attribution(model, TOKENS, 3, 7).top(100))
    part = {"attn": "1_attn_out", "mlp": "2_mlp_out", "ln2": "2_mlp_out", "hook_attn_out": "1_attn_out"}
    name = part.get(reads.split(".")[2])
    if name is not None and "hook_z" not in reads and "hook_post" not in reads:
        assert found.total.mean() == pytest.approx(parts[name], abs=1e-5)


def test_attribution_knows_normalised_inputs_and_spliced_models() -> None:
    for mode in ("layer_norm", "constant_norm_rescale"):
        one = dictionary("blocks.1.hook_attn_out", seed=2, normalize_activations=mode)
        found = direct_feature_attribution(plain_model(), one, TOKENS, 3)
        np.testing.assert_allclose(found.attribution.sum(axis=1) + found.bias + found.error, found.total, atol=1e-5)
        changed = plain_model().with_dictionaries(one)
        point = "blocks.1.hook_attn_out.hook_sae_acts_post"
        acts = np.asarray(changed.run_with_cache(TOKENS)[1][point])[:, -1]
        np.testing.assert_allclose(found.activations, acts, atol=1e-5)
    model = spliced_model()
    found = direct_feature_attribution(model, model.dictionaries["blocks.1.hook_attn_out"], TOKENS, 3, 7)
    np.testing.assert_allclose(found.attribution.sum(axis=1) + found.bias + found.error, found.total, atol=1e-5)


def test_virtual_weights_are_what_the_stream_carries() -> None:
    """A unit of a source's feature, added where it writes, moves the target's pre-activations by a row of them."""
    model = plain_model(normalization_type=None)
    first, last = at("blocks.1.attn.hook_z", None), dictionary("blocks.2.hook_resid_mid", seed=5)
    weights = virtual_weights(first, last, model)
    assert weights.shape == (20, 20)
    cache = model.run_with_cache(TOKENS)[1]
    z, mid = cache["blocks.1.attn.hook_z"], cache["blocks.2.hook_resid_mid"]
    frozen = [(f"blocks.{layer}.{name}", lambda act, hook: cache[hook.name])
              for layer, name in ((1, "hook_mlp_out"), (2, "hook_attn_out"))]  # fmt: skip
    for feature in (0, 7):
        moved = z + first.W_dec[feature].reshape(1, 1, *z.shape[2:])
        hooks = [*frozen, ("blocks.1.attn.hook_z", lambda act, hook, moved=moved: moved)]
        with model.hooks(fwd_hooks=hooks) as hooked:
            after = hooked.run_with_cache(TOKENS)[1]["blocks.2.hook_resid_mid"]
        change = np.asarray((after - mid) @ last.W_enc)[0, -1]
        np.testing.assert_allclose(weights[feature].AB[0], change, atol=2e-5)
    some = virtual_weights(first, last, model, features=[7, 0], target_features=[3])
    np.testing.assert_allclose(some.AB[:, 0], weights.AB[jnp.asarray([7, 0]), 3], atol=1e-6)


def test_virtual_weights_go_through_a_head_and_through_norms() -> None:
    model = plain_model()
    first = dictionary("blocks.0.hook_resid_pre", seed=1)
    last = dictionary("blocks.2.ln2.hook_normalized", "blocks.2.hook_mlp_out", seed=5)
    through = virtual_weights(first, last, model, through=(1, 1)).AB
    gain = np.asarray(model.params["blocks"][1]["ln1"]["w"])
    rows = np.asarray(first.W_dec, np.float64)
    rows = (rows - rows.mean(axis=1, keepdims=True)) * gain
    rows = rows @ np.asarray(model.W_V[1, 1], np.float64) @ np.asarray(model.W_O[1, 1], np.float64)
    rows = rows - rows.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(through, rows @ np.asarray(last.W_enc), atol=2e-5)
    after = last.replace(cfg=last.cfg.replace(tap=dataclasses.replace(last.cfg.tap, gain=True)))
    gain = np.asarray(model.params["blocks"][2]["ln2"]["w"])
    rows = np.asarray(first.W_dec, np.float64)
    rows = (rows - rows.mean(axis=1, keepdims=True)) * gain
    np.testing.assert_allclose(virtual_weights(first, after, model).AB, rows @ np.asarray(last.W_enc), atol=2e-5)


def test_similar_features() -> None:
    one, other = dictionary("blocks.0.hook_resid_pre", seed=1), dictionary("blocks.1.hook_resid_pre", seed=2, d_sae=30)
    rows = np.asarray(one.W_dec)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    cosines = unit @ unit[6]
    values, numbers = similar_features(one, 6, 4)
    right = [n for n in np.argsort(-cosines) if n != 6][:4]
    assert numbers.tolist() == right
    np.testing.assert_allclose(values, cosines[right], atol=1e-6)
    same = similar_features(one, 6, 3, other=one)
    assert int(same.indices[0]) == 6
    assert float(same.values[0]) == pytest.approx(1.0, abs=1e-5)
    assert len(similar_features(one, 6, 99).indices) == 19
    assert len(similar_features(one, 6, 99, other=other).indices) == 30
