"""The model object: immutable, its methods return new models, its weights and parts have TransformerLens's shapes."""

import copy
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import close
from tiny_tokenizers import llama_like, qwen_like
from variants import BASE, TOKENS, build

from tljax import HookedTransformer, HookedTransformerConfig, Scale, UnusedHooksWarning, Zero
from tljax.errors import ConfigError, FrozenModelError, InputError, UnknownHookError

Z0, Z1 = "blocks.0.attn.hook_z", "blocks.1.attn.hook_z"


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    return build("gpt2")


# hooks on a model


def names(model: HookedTransformer) -> dict[str, int]:
    return {name: len(functions) for name, functions in model.list_hooks().items()}


def test_hook_methods_return_new_models(model: HookedTransformer) -> None:
    before = np.asarray(model(TOKENS))
    one = model.add_hook(Z0, Zero())
    two = one.add_hook([Z0, Z1], Scale(2.0), dir="bwd")
    three = two.add_perma_hook(lambda name: name.endswith("hook_z"), Zero(head=1))
    assert [names(m) for m in (model, one, two, three)] == [{}, {Z0: 1}, {Z0: 2, Z1: 1}, {Z0: 3, Z1: 2}]
    assert names(three.reset_hooks()) == {Z0: 1, Z1: 1}
    assert names(three.reset_hooks(direction="fwd")) == {Z0: 2, Z1: 2}
    assert names(three.reset_hooks(direction="bwd")) == {Z0: 2, Z1: 1}
    assert names(three.reset_hooks(including_permanent=True)) == {}
    assert names(three.remove_hook(Z0)) == {Z1: 2}
    assert names(three.remove_hook(("z", 0), including_permanent=False)) == {Z0: 1, Z1: 2}
    assert names(three.remove_hook(Z0, dir="bwd")) == {Z0: 2, Z1: 2}
    assert names(three) == {Z0: 3, Z1: 2}
    np.testing.assert_array_equal(model(TOKENS), before)
    with model.hooks(fwd_hooks=[(Z0, Zero())]) as hooked:
        with hooked.hooks(fwd_hooks=[(Z1, Zero())], bwd_hooks=[("z1", Zero())]) as inner:
            assert names(inner) == {Z0: 1, Z1: 2}
        assert names(hooked) == {Z0: 1}
        assert np.abs(np.asarray(hooked(TOKENS)) - before).max() > 1e-3
    assert names(model) == {}
    np.testing.assert_array_equal(model(TOKENS), before)


def test_hooks_on_the_model_run_before_hooks_of_the_call(model: HookedTransformer) -> None:
    from tljax import Add

    hooked = model.add_hook(Z0, Scale(2.0))
    both = hooked.run_with_hooks(TOKENS, fwd_hooks=[(Z0, Add(1.0))])
    close(both, model.run_with_hooks(TOKENS, fwd_hooks=[(Z0, Scale(2.0)), (Z0, Add(1.0))]))


def test_hook_method_mistakes(model: HookedTransformer) -> None:
    with pytest.raises(UnknownHookError, match="Did you mean"):
        model.add_hook("blocks.0.attn.hook_zz", Zero())
    with pytest.raises(ValueError, match="dir='forward' is not one of 'fwd', 'bwd'"):
        model.add_hook(Z0, Zero(), dir="forward")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'fwd', 'bwd' or 'both', got 'forward'"):
        model.reset_hooks("forward")
    with pytest.raises(UnknownHookError):
        model.remove_hook("blocks.0.attn.hook_zz")


# frozen


def test_models_are_frozen(model: HookedTransformer) -> None:
    with pytest.raises(FrozenModelError, match=r"cannot change in place.*model.replace"):
        model.cfg = None  # type: ignore[assignment]
    with pytest.raises(FrozenModelError, match="deleting 'params'"):
        del model.params
    with pytest.raises(FrozenModelError, match=r"Setting blocks.0.attn.W_Q in place"):
        model.blocks[0].attn.W_Q = 3
    with pytest.raises(AttributeError):
        model.nothing  # noqa: B018


def test_replace(model: HookedTransformer) -> None:
    hooked = model.add_hook(Z0, Zero())
    doubled = hooked.replace(params=jax.tree.map(lambda x: 2 * x, model.params))
    close(doubled.W_E, 2 * model.W_E)
    assert names(doubled) == {Z0: 1}
    assert hooked.replace(cfg=model.cfg.to_dict()).cfg == model.cfg
    with pytest.raises(InputError, match=r"replace has no option 'hooks'. Options: params, cfg, tokenizer"):
        model.replace(hooks=None)


def test_both_ways_to_attach_a_tokenizer_agree() -> None:
    none, adds_bos = qwen_like(), llama_like()
    model = HookedTransformer(dict(BASE, d_vocab=300), tokenizer=adds_bos)
    assert model.cfg.tokenizer_prepends_bos
    for other in (none, adds_bos, None):
        replaced, attached = model.replace(tokenizer=other), model.set_tokenizer(other)
        assert replaced.cfg == attached.cfg
        assert repr(replaced._tokenizer) == repr(attached._tokenizer)
    moved = model.replace(cfg=model.cfg.replace(use_attn_result=True), tokenizer=none)
    assert (moved.cfg.tokenizer_prepends_bos, moved.cfg.use_attn_result) == (False, True)


def test_copies(model: HookedTransformer) -> None:
    for other in (copy.copy(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        close(other(TOKENS), model(TOKENS))


def test_moving(model: HookedTransformer) -> None:
    half = model.to("bf16")
    assert half.cfg.dtype == "bfloat16"
    assert {leaf.dtype for leaf in jax.tree.leaves(half.params)} == {jnp.dtype("bfloat16")}
    assert model.cfg.dtype == "float32"
    assert model.to(jnp.float16).cfg.dtype == "float16"
    cpu = jax.devices("cpu")[0]
    for where in ("cpu", "cpu:0", cpu, jax.sharding.SingleDeviceSharding(cpu)):
        moved = model.to(where)
        assert moved.W_E.devices() == {cpu}
        assert moved.cfg == model.cfg
    for wrong in ("gpux", "cpu:99", "int32", None):
        with pytest.raises((InputError, ConfigError)):
            model.to(wrong)


def test_flags(model: HookedTransformer) -> None:
    for name in ("attn_result", "split_qkv_input", "attn_in", "hook_mlp_in"):
        flagged = getattr(model, f"set_use_{name}")(True)
        assert getattr(flagged.cfg, f"use_{name}")
        assert not getattr(model.cfg, f"use_{name}")
    with pytest.raises((ConfigError, InputError)):
        build("llama").set_use_attn_in(True)
    with pytest.raises((ConfigError, InputError)):
        build("attn_only").set_use_hook_mlp_in(True)


# fresh parameters


def test_without_init_weights_parameters_are_zero() -> None:
    blank = HookedTransformer(HookedTransformerConfig(**BASE, init_weights=False))
    drawn = HookedTransformer(HookedTransformerConfig(**BASE))
    assert jax.tree.structure(blank.params) == jax.tree.structure(drawn.params)
    assert all(not leaf.any() for leaf in jax.tree.leaves(blank.params))
    assert [leaf.shape for leaf in jax.tree.leaves(blank.params)] == [x.shape for x in jax.tree.leaves(drawn.params)]


def test_fresh_parameters_follow_the_seed() -> None:
    fields = {"d_model": 64, "n_layers": 1, "n_ctx": 8, "d_vocab": 64, "n_heads": 4}
    models = [HookedTransformer({**fields, "seed": seed}) for seed in (0, 0, 1)]
    leaves = [jax.tree.leaves(m.params) for m in models]
    assert all((a == b).all() for a, b in zip(leaves[0], leaves[1], strict=True))
    assert (models[0].W_E != models[2].W_E).any()
    for name in ("W_E", "W_pos", "W_Q", "W_O", "W_in", "W_out", "W_U"):
        weight = np.asarray(getattr(models[0], name))
        assert abs(weight.std() / 0.1 - 1) < 0.15, name
        assert abs(weight.mean()) < 0.02, name
    for name in ("b_Q", "b_O", "b_in", "b_out", "b_U"):
        assert (np.asarray(getattr(models[0], name)) == 0).all()
    assert (np.asarray(models[0].ln_final.w) == 1).all()


# weights


@pytest.mark.parametrize("kind", ["gpt2", "neox", "llama", "attn_only"])
def test_weight_shapes(kind: str) -> None:
    model = build(kind)
    cfg = model.cfg
    L, H, D, E, M, V = cfg.n_layers, cfg.n_heads, cfg.d_model, cfg.d_head, cfg.d_mlp, cfg.d_vocab
    shapes = {
        "W_E": (V, D), "W_U": (D, V), "b_U": (V,), "W_O": (L, H, E, D), "b_O": (L, D),
        **{f"W_{n}": (L, H, D, E) for n in "QKV"}, **{f"b_{n}": (L, H, E) for n in "QKV"},
    }  # fmt: skip
    if not cfg.attn_only:
        shapes |= {"W_in": (L, D, M), "W_out": (L, M, D), "b_in": (L, M), "b_out": (L, D)}
    if cfg.positional_embedding_type == "standard":
        shapes |= {"W_pos": (cfg.n_ctx, D), "W_E_pos": (V + cfg.n_ctx, D)}
    for name, shape in shapes.items():
        assert getattr(model, name).shape == shape, name
    stored = model.params["blocks"][1]["attn"]
    close(model.W_Q[1, 2], stored["W_Q"][:, 2])
    groups = H // cfg.kv_heads
    for head in range(H):
        close(model.W_K[1, head], stored["W_K"][:, head // groups])
        close(model.b_V[1, head], stored["b_V"][head // groups])
    assert model.all_head_labels() == [f"L{layer}H{head}" for layer in range(L) for head in range(H)]
    assert model.n_params_total == sum(np.size(leaf) for leaf in jax.tree.leaves(model.params))
    if cfg.n_key_value_heads is None:
        matrices = ["W_Q", "W_K", "W_V", "W_O"] + ([] if cfg.attn_only else ["W_in", "W_out"])
        assert cfg.n_params == sum(getattr(model, name).size for name in matrices)


def test_weights_a_model_does_not_have() -> None:
    with pytest.raises(ConfigError, match="no W_pos: its positions are 'rotary'"):
        build("llama").W_pos  # noqa: B018
    with pytest.raises(ConfigError, match="attention-only: it has no W_in"):
        build("attn_only").W_in  # noqa: B018
    assert build("gpt2").W_gate is None
    assert build("llama").W_gate.shape == (2, 16, 64)  # type: ignore[union-attr]


def test_residual_directions(model: HookedTransformer) -> None:
    W_U = np.asarray(model.W_U)
    close(model.tokens_to_residual_directions(3), W_U[:, 3])
    close(model.tokens_to_residual_directions(TOKENS), W_U.T[TOKENS])


# parts


@pytest.mark.parametrize("kind", ["gpt2", "llama", "inverse_scale"])
def test_parts_compute_what_the_model_does(kind: str) -> None:
    model = build(kind)
    logits, cache = model.run_with_cache(TOKENS)
    embedded = model.embed(TOKENS)
    close(embedded, cache["hook_embed"])
    if kind == "gpt2":
        close(model.pos_embed(TOKENS), cache["hook_pos_embed"])
    residual = cache["resid_pre", 0]
    for layer, block in enumerate(model.blocks):
        normalized = block.ln1(residual)
        close(block.attn(normalized, normalized, normalized), cache["attn_out", layer])
        if not model.cfg.parallel_attn_mlp:
            mid = cache["resid_mid", layer]
            close(block.mlp(block.ln2(mid)), cache["mlp_out", layer])
        residual = block(residual)
        close(residual, cache["resid_post", layer])
    close(model.ln_final(residual), cache["unembed.hook_in"])
    close(model.unembed(model.ln_final(residual)), logits)
    close(jax.jit(lambda m, x: m.blocks[1].ln1(x))(model, residual), model.blocks[1].ln1(residual))


def test_parts_show_parameters_in_public_shapes(model: HookedTransformer) -> None:
    block = model.blocks[1]
    close(block.attn.W_Q, model.W_Q[1])
    close(block.attn.b_O, model.b_O[1])
    close(block.mlp.W_in, model.W_in[1])
    close(block.ln2.w, model.params["blocks"][1]["ln2"]["w"])
    close(model.embed.W_E, model.W_E)
    close(model.pos_embed.W_pos, model.W_pos)
    close(model.unembed.W_U, model.W_U)
    assert set(dir(block)) == {"ln1", "attn", "ln2", "mlp"}
    assert "W_Q" in repr(block.attn)
    with pytest.raises(AttributeError, match=r"blocks.1.attn has no parameter or part 'W_QQ'. Did you mean 'W_Q'"):
        block.attn.W_QQ  # noqa: B018
    with pytest.raises(IndexError):
        model.blocks[2]


def test_grouped_heads_are_repeated_in_parts() -> None:
    model = build("llama")
    close(model.blocks[1].attn.W_K, model.W_K[1])
    close(model.blocks[1].attn.b_V, model.b_V[1])


def test_parts_a_model_does_not_have() -> None:
    with pytest.raises((ConfigError, AttributeError), match=r"pos_embed|position"):
        build("llama").pos_embed(TOKENS)


def test_a_folded_norm_says_where_its_weight_went(model: HookedTransformer) -> None:
    with pytest.raises(
        AttributeError, match=r"folded into the matrices that read the norm. Load the model with fold_ln"
    ):
        _ = model.process_weights().blocks[0].ln2.w


def test_forward_is_another_name_of_calling(model: HookedTransformer, tokens: jax.Array) -> None:
    np.testing.assert_array_equal(model.forward(tokens, return_type="loss"), model(tokens, return_type="loss"))


def test_setting_a_weight_says_what_to_replace(model: HookedTransformer) -> None:
    with pytest.raises(FrozenModelError, match=r"setting 'W_E'.*model.replace\(params="):
        model.W_E = None


def test_repr(model: HookedTransformer) -> None:
    text = repr(model.add_hook(Z0, Zero()))
    for piece in ("2 layers", "d_model 16", "4 heads", "d_vocab 13", "float32", "1 hooks"):
        assert piece in text


def test_model_of_a_dict() -> None:
    fields: dict[str, Any] = {"d_model": 8, "n_layers": 1, "n_heads": 2, "n_ctx": 4, "d_vocab": 5}
    model = HookedTransformer(fields)
    assert model.cfg == HookedTransformerConfig(**fields)
    assert model([1, 2]).shape == (1, 2, 5)


def test_a_hooks_block_without_as_warns_that_nothing_was_hooked(model: HookedTransformer) -> None:
    forgotten = model.hooks(fwd_hooks=[("blocks.0.hook_resid_post", Zero())])
    with pytest.warns(UnusedHooksWarning, match=r"Write `with model.hooks\(...\) as hooked:`"), forgotten:
        model(TOKENS)
    with model.hooks(fwd_hooks=[("blocks.0.hook_resid_post", Zero())]) as hooked:
        assert len(hooked.list_hooks()) == 1
