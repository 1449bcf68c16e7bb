"""QK, OV, composition scores and accumulated biases: what they are, and which models are refused them."""

import functools
from typing import Any

import compare
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from variants import TOKENS, build

from tljax import FactoredMatrix, HookedTransformer, Zero
from tljax.errors import ConfigError, InputError

close = functools.partial(compare.close, atol=2e-5, rtol=1e-7)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "neox", "alibi", "sandwich"])
def test_circuits_are_products_of_weights(kind: str) -> None:
    model = build(kind, clip_qkv=None)
    QK, OV = model.QK, model.OV
    shape = (model.cfg.n_layers, model.cfg.n_heads, model.cfg.d_model, model.cfg.d_model)
    assert QK.shape == OV.shape == shape
    close(QK.AB, jnp.einsum("lhde,lhfe->lhdf", model.W_Q, model.W_K))
    close(OV.AB, jnp.einsum("lhde,lhef->lhdf", model.W_V, model.W_O))
    attn = model.blocks[1].attn
    assert isinstance(attn.QK, FactoredMatrix)
    close(attn.QK.AB, QK[1].AB)
    close(attn.OV.AB, OV[1].AB)


def test_seed_code_on_one_head_and_one_layer() -> None:
    model, layer = build("gpt2"), 1
    QK = FactoredMatrix(model.W_Q[layer], jnp.swapaxes(model.W_K[layer], -1, -2))
    OV = FactoredMatrix(model.W_V[layer], model.W_O[layer])
    close(QK.AB, model.QK[layer].AB)
    U, S, V = QK.svd()
    close((U * S[..., None, :]) @ jnp.swapaxes(V, -1, -2), QK.AB)
    close(OV[2].AB, model.OV[layer, 2].AB)
    close(FactoredMatrix(model.W_Q[layer, 2], model.W_K[layer, 2].T).AB, QK[2].AB)
    with pytest.raises(InputError, match=r"write .mT, or use model.QK"):
        FactoredMatrix(model.W_Q[layer], model.W_K[layer].T)


def test_qk_gives_the_scores() -> None:
    model = build("gpt2", normalization_type="LNPre")
    _, cache = model.run_with_cache(TOKENS)
    x = cache["normalized", 1, "ln1"]
    q, k = x @ model.QK[1, 2].A + model.b_Q[1, 2][None, None], x @ model.QK[1, 2].B.T + model.b_K[1, 2][None, None]
    scores = jnp.einsum("bqe,bke->bqk", q, k) / model.cfg.attn_scale
    lower = np.tril(np.ones(scores.shape[-2:], bool))
    close(scores[:, lower], cache["attn_scores", 1][:, 2][:, lower])


@pytest.mark.parametrize(
    ("kind", "name", "reason"),
    [
        ("latent", "QK", "heads have no QK matrix: a normalised latent"),
        ("latent", "OV", "heads have no OV matrix: a normalised latent"),
        ("qk_norm", "QK", "queries and keys are normalised between W_Q and W_K"),
        ("clipped", "QK", r"clipped to ±0.5 \(clip_qkv\)"),
        ("clipped", "OV", r"clipped to ±0.5 \(clip_qkv\)"),
    ],
)
def test_what_is_no_matrix_is_refused(kind: str, name: str, reason: str) -> None:
    model = build(kind)
    with pytest.raises(ConfigError, match=reason):
        getattr(model, name)
    with pytest.raises(ConfigError, match=reason):
        getattr(model.blocks[0].attn, name)
    with pytest.raises(ConfigError, match="heads have no"):
        model.all_composition_scores("Q")


def test_qk_norm_leaves_ov() -> None:
    model = build("qk_norm")
    assert model.OV.shape == (2, 4, 16, 16)
    assert model.all_composition_scores("V").shape == (2, 4, 2, 4)


def test_composition_is_of_earlier_heads_with_later_ones(model: HookedTransformer) -> None:
    scores = {mode: np.asarray(model.all_composition_scores(mode)) for mode in "QKV"}
    for values in scores.values():
        assert values.shape == (3, 4, 3, 4)
        for first in range(3):
            assert not values[first, :, : first + 1].any()
            assert (values[first, :, first + 1 :] > 0).all()
    left, right = np.asarray(model.OV.AB[0, 1]), np.asarray(model.QK.AB[2, 3])
    norms = np.linalg.norm(left) * np.linalg.norm(right)
    assert scores["Q"][0, 1, 2, 3] == pytest.approx(np.linalg.norm(left @ right) / norms, abs=1e-6)
    assert scores["K"][0, 1, 2, 3] == pytest.approx(np.linalg.norm(left @ right.T) / norms, abs=1e-6)
    with pytest.raises(InputError, match="'Q', 'K' or 'V'; got 'q'"):
        model.all_composition_scores("q")


def test_composition_under_jit(model: HookedTransformer) -> None:
    compiled = jax.jit(lambda model: model.all_composition_scores("K"))(model)
    close(compiled, model.all_composition_scores("K"))


@pytest.mark.parametrize("kind", ["gpt2", "llama", "neox", "multipliers", "attn_only"])
def test_accumulated_bias_is_what_remains_when_heads_and_neurons_are_off(kind: str) -> None:
    model = build(kind)
    hooks: list[Any] = [(lambda name: name.endswith("attn.hook_z"), Zero())]
    if not model.cfg.attn_only:
        hooks.append((lambda name: name.endswith("mlp.hook_post"), Zero()))
    resid = {}
    hooked = model.add_hook(*hooks[0])
    for hook in hooks[1:]:
        hooked = hooked.add_hook(*hook)
    _, cache = hooked.run_with_cache(TOKENS)
    for layer in range(3):
        resid[layer] = cache["resid_post", 1] if layer == 2 else cache["resid_pre", layer]
        change = resid[layer] - cache["resid_pre", 0]
        close(change, jnp.broadcast_to(model.accumulated_bias(layer)[None, None], change.shape))
    if kind == "gpt2":
        change = cache["resid_mid", 1] - cache["resid_pre", 0]
        close(change, jnp.broadcast_to(model.accumulated_bias(1, mlp_input=True)[None, None], change.shape))
    if kind == "neox":
        close(model.accumulated_bias(1, mlp_input=True), model.accumulated_bias(1))
    heads_only = model.accumulated_bias(2, include_mlp_biases=False)
    close(heads_only, model.b_O.sum(axis=0) * model.cfg.residual_multiplier)


@pytest.mark.parametrize("kind", ["sandwich", "post_norm_only", "residual_norm"])
def test_biases_that_pass_a_norm_are_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match="pass a norm on their way into the residual stream"):
        build(kind).accumulated_bias(1)


def test_biases_of_experts() -> None:
    options = {"num_experts": 4, "experts_per_token": 2, "gated_mlp": True, "act_fn": "silu"}
    model = build("llama", **options)
    close(model.accumulated_bias(2), model.b_O.sum(axis=0))
    biased = build("llama", **options, expert_biases=True)
    with pytest.raises(ConfigError, match=r"depends on the token.*include_mlp_biases=False"):
        biased.accumulated_bias(2)
    close(biased.accumulated_bias(2, include_mlp_biases=False), biased.b_O.sum(axis=0))


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("gpt2", (3,), r"layer=3 is out of range: 0 \(no layer\) to 2"),
        ("gpt2", (-1,), "layer=-1 is out of range"),
        ("gpt2", (2, True), "no layer 2, so no input of an MLP"),
        ("attn_only", (1, True), "attention-only, so no input of an MLP"),
    ],
)
def test_layers_that_are_not_there(kind: str, arguments: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(kind).accumulated_bias(*arguments)
