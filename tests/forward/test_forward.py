"""The forward driver: the hook table against what fires, identities between activations, splits of the layer loop."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import close
from variants import TOKENS, VARIANTS, build

import tljax
from tljax import ActivationCache, HookedTransformer
from tljax.errors import ConfigError
from tljax.hooks.points import point_table

ALL = pytest.mark.parametrize("kind", list(VARIANTS))
FEW = pytest.mark.parametrize("kind", ["gpt2", "neox", "llama", "attn_only"])
OPTIONAL_FLAGS = {
    "use_attn_result": ["attn.hook_result"],
    "use_split_qkv_input": ["hook_q_input", "hook_k_input", "hook_v_input"],
    "use_attn_in": ["hook_attn_in"],
    "use_hook_mlp_in": ["hook_mlp_in"],
    "use_hook_tokens": ["hook_tokens"],
}


@functools.cache
def full(kind: str) -> tuple[Any, ActivationCache]:
    """Logits, and a full cache as numpy arrays."""
    logits, cache = build(kind).run_with_cache(TOKENS)
    return np.asarray(logits), jax.tree.map(np.asarray, cache)


def firing_order(model: HookedTransformer, optional: bool = False) -> list[tuple[str, tuple[int, ...]]]:
    """What fires, in the order it fires: inside a trace every Python hook is called where its point is."""
    fired = []
    names = [name for name, spec in point_table(model.cfg).items() if optional or not spec.optional]
    hooks = [(name, lambda x, hook: fired.append((hook.name, x.shape))) for name in names]
    jax.eval_shape(lambda t: model.run_with_hooks(t, fwd_hooks=hooks), TOKENS)
    return fired


@ALL
def test_full_cache_is_the_table(kind: str) -> None:
    model = build(kind)
    expected = [(name, spec.shape(2, 6)) for name, spec in point_table(model.cfg).items() if not spec.optional]
    logits, cache = full(kind)
    assert [(name, value.shape) for name, value in cache.items()] == expected
    assert firing_order(model) == expected
    assert [(p.name, p.shape(2, 6)) for p in model.hook_points() if not p.optional] == expected
    if kind in ("gpt2", "llama", "soft_caps"):
        close(model(TOKENS), logits)


def added(model: HookedTransformer, cache: ActivationCache, out: Any, layer: int, norm: str) -> Any:
    """What a sublayer's output adds to the residual stream: through its norm, if it has one, and its multiplier."""
    if model.cfg.has_norms_after:
        scale, normalized = cache["scale", layer, norm], cache["normalized", layer, norm]
        close(np.sqrt((out**2).mean(-1, keepdims=True) + model.cfg.eps), scale)
        close(out / scale, normalized)
        out = normalized * (np.asarray(model.params["blocks"][layer][norm]["w"]) + model.cfg.rmsnorm_uses_offset)
    return out * model.cfg.residual_multiplier


def after(model: HookedTransformer, cache: ActivationCache, residual: Any, layer: int, norm: str) -> Any:
    """The residual stream after an addition: normalised, where its norms are on the stream itself."""
    if not model.cfg.use_normalization_of_residual:
        return residual
    centred = residual - residual.mean(-1, keepdims=True)
    scale, normalized = cache["scale", layer, norm], cache["normalized", layer, norm]
    close(np.sqrt((centred**2).mean(-1, keepdims=True) + model.cfg.eps), scale)
    close(centred / scale, normalized)
    parameters = model.params["blocks"][layer][norm]
    return normalized * np.asarray(parameters["w"]) + np.asarray(parameters["b"])


@ALL
def test_identities(kind: str) -> None:
    model = build(kind)
    logits, cache = full(kind)
    cfg = model.cfg
    residual = cache["hook_embed"] + cache.get("hook_pos_embed", 0)
    for layer in range(cfg.n_layers):
        close(cache["resid_pre", layer], residual)
        pattern, v = cache["pattern", layer], cache["v", layer]
        close(pattern.sum(-1), np.ones(pattern.shape[:3]))
        v = v if cfg.clip_qkv is None else np.clip(v, -cfg.clip_qkv, cfg.clip_qkv)
        v = np.repeat(v, cfg.n_heads // cfg.kv_heads, axis=2)
        close(np.einsum("bhqk,bkhe->bqhe", pattern, v), cache["z", layer])
        W_O, b_O = np.asarray(model.W_O[layer]), np.asarray(model.b_O[layer])
        attn_out = np.einsum("bqhe,hed->bqd", cache["z", layer], W_O) + b_O
        close(added(model, cache, attn_out, layer, "ln1_post"), cache["attn_out", layer])
        residual = after(model, cache, residual + cache["attn_out", layer], layer, "ln1")
        if not cfg.attn_only:
            if not cfg.parallel_attn_mlp:
                close(cache["resid_mid", layer], residual)
            mlp = model.params["blocks"][layer]["mlp"]
            if "experts" not in mlp:
                mlp_out = cache["post", layer] @ np.asarray(mlp["W_out"]) + np.asarray(mlp["b_out"])
                close(added(model, cache, mlp_out, layer, "ln2_post"), cache["mlp_out", layer])
            residual = after(model, cache, residual + cache["mlp_out", layer], layer, "ln2")
        close(cache["resid_post", layer], residual)
    W_U, b_U = np.asarray(model.W_U), np.asarray(model.b_U)
    close(cache["unembed.hook_in"] @ W_U + b_U, cache["unembed.hook_out"])
    cap = cfg.output_logits_soft_cap
    out = cache["unembed.hook_out"] * cfg.logits_multiplier
    close(cap * np.tanh(out / cap) if cap > 0 else out, logits)


@ALL
def test_norms_and_masks(kind: str) -> None:
    cfg = build(kind).cfg
    _, cache = full(kind)
    for layer in range(cfg.n_layers):
        query, key = np.arange(6)[:, None], np.arange(6)[None, :]
        seen = np.ones((6, 6), bool) if cfg.attention_dir == "bidirectional" else key <= query
        if cfg.layer_kind(layer).local:
            seen = seen & (key > query - cfg.window_size)
        hidden = cache["attn_scores", layer] == -np.inf
        assert (hidden == ~seen[None, None]).all()
        q, k = (cache[f"rot_{n}" if "rot_q0" in cache else n, layer] for n in "qk")
        if cfg.clip_qkv is not None and cfg.positional_embedding_type != "rotary":
            q, k = (np.clip(x, -cfg.clip_qkv, cfg.clip_qkv) for x in (q, k))
        if cfg.qk_norm_after_rotary:
            norms = [build(kind).params["blocks"][layer]["attn"][f"{n}_norm"]["w"] for n in "qk"]
            scales = [np.sqrt((x**2).mean(-1, keepdims=True) + cfg.eps) for x in (q, k)]
            q, k = (x / scale * np.asarray(w) for x, scale, w in zip((q, k), scales, norms, strict=True))
        k = np.repeat(k, cfg.n_heads // cfg.kv_heads, axis=2)
        divisor = cfg.attn_scale * (layer + 1 if cfg.scale_attn_by_inverse_layer_idx else 1)
        scores = np.einsum("bqhe,bkhe->bhqk", q, k) / divisor
        if cfg.attn_scores_soft_cap > 0:
            scores = cfg.attn_scores_soft_cap * np.tanh(scores / cfg.attn_scores_soft_cap)
        if cfg.positional_embedding_type == "alibi":
            slopes = 2.0 ** -np.array({6: [2, 4, 6, 8, 1, 3], 4: [2, 4, 6, 8]}[cfg.n_heads])
            bias = slopes[:, None, None] * (key / cfg.attn_scale if cfg.alibi_rounded else key - query)
            scores = scores + bias
        close(np.where(seen, scores, -np.inf), cache["attn_scores", layer])
        if cfg.has_norms_before:
            x = cache["resid_pre", layer]
            x = x - x.mean(-1, keepdims=True) if cfg.normalization_type.startswith("LN") else x
            scale = np.sqrt((x**2).mean(-1, keepdims=True) + cfg.eps)
            close(cache["scale", layer, "ln1"], scale)
            close(cache["normalized", layer, "ln1"], x / scale)
    if cfg.has_final_norm:
        x = cache["resid_post", -1]
        centred = cfg.normalization_type.startswith("LN") and not cfg.final_rms
        x = x - x.mean(-1, keepdims=True) if centred else x
        close(cache["scale"], np.sqrt((x**2).mean(-1, keepdims=True) + cfg.eps))


@FEW
def test_optional_points_appear_when_named_and_change_nothing(kind: str) -> None:
    model = build(kind)
    table = point_table(model.cfg)
    optional = [name for name, spec in table.items() if spec.optional and name != "hook_attn_in"]
    logits, cache = model.run_with_cache(TOKENS, names_filter=optional)
    assert list(cache) == optional
    for name in optional:
        assert cache[name].shape == table[name].shape(2, 6), name
    plain, base = full(kind)
    close(logits, plain)
    for layer in range(model.cfg.n_layers):
        result = np.asarray(cache["result", layer]).sum(2) + np.asarray(model.b_O[layer])
        close(result, base["attn_out", layer])
        for name in ("q_input", "k_input", "v_input"):
            close(cache[name, layer], np.broadcast_to(base["resid_pre", layer][:, :, None], cache[name, layer].shape))
    assert (cache["hook_tokens"] == TOKENS).all()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("flag", list(OPTIONAL_FLAGS))
def test_flags_put_optional_points_into_full_caches(kind: str, flag: str) -> None:
    model = build(kind)
    if flag == "use_attn_in" and kind == "llama":
        with pytest.raises(ConfigError, match="use_attn_in needs as many key/value as query heads"):
            model.cfg.replace(use_attn_in=True)
        return
    flagged = model.replace(cfg=model.cfg.replace(**{flag: True}))
    logits, cache = flagged.run_with_cache(TOKENS)
    close(logits, full(kind)[0])
    for relative in OPTIONAL_FLAGS[flag]:
        prefix = "" if flag == "use_hook_tokens" else "blocks.1."
        assert prefix + relative in cache
    assert [(n, v.shape) for n, v in cache.items()] == [
        (name, spec.shape(2, 6)) for name, spec in point_table(flagged.cfg).items() if not spec.optional
    ]


def test_attn_in_and_split_inputs_feed_the_heads_they_belong_to() -> None:
    model = build("gpt2")
    _, base = full("gpt2")
    _, cache = model.add_hook("blocks.1.hook_attn_in", tljax.Zero(head=1)).run_with_cache(TOKENS)
    changed = {n: np.abs(np.asarray(cache[n, 1] - base[n, 1])).max((0, 1, 3)) > 1e-6 for n in "qkv"}
    for mask in changed.values():
        assert mask.tolist() == [False, True, False, False]
    _, cache = model.add_hook("blocks.1.hook_k_input", tljax.Zero(head=2)).run_with_cache(TOKENS)
    changed = {n: (np.abs(np.asarray(cache[n, 1] - base[n, 1])).max((0, 1, 3)) > 1e-6).tolist() for n in "qkv"}
    assert changed == {"q": [False] * 4, "k": [False, False, True, False], "v": [False] * 4}


@pytest.mark.parametrize("kind", ["gpt2", "neox", "inverse_scale"])
def test_start_and_stop_chain_equals_the_whole(kind: str) -> None:
    model = build(kind)
    logits, cache = full(kind)
    for split in range(model.cfg.n_layers + 1):
        residual = model(TOKENS, stop_at_layer=split)
        expected = cache["resid_pre", split] if split < model.cfg.n_layers else cache["resid_post", -1]
        close(residual, expected)
        if split < model.cfg.n_layers:
            close(model(residual, start_at_layer=split), logits)
            loss = model(residual, start_at_layer=split, tokens=TOKENS, return_type="loss")
            close(loss, model(TOKENS, return_type="loss"), atol=1e-6)
    close(model(cache["resid_pre", 0], start_at_layer=0, stop_at_layer=1), cache["resid_post", 0])
    close(model(cache["resid_pre", 1], start_at_layer=-1), logits)
    close(model(TOKENS, stop_at_layer=-1), cache["resid_pre", 1])


def test_the_head_alone_runs_from_the_final_residual_stream() -> None:
    model = build("gpt2")
    residual = model(TOKENS, stop_at_layer=model.cfg.n_layers)
    close(model(residual, start_at_layer=model.cfg.n_layers), model(TOKENS))


def test_partial_runs_cache_what_they_reach() -> None:
    model = build("gpt2")
    residual, cache = model.run_with_cache(TOKENS, stop_at_layer=1)
    assert all(name.startswith(("hook_", "blocks.0.")) for name in cache)
    assert "hook_embed" in cache
    _, cache = model.run_with_cache(residual, start_at_layer=1)
    assert all(name.startswith(("ln_final.", "unembed.", "blocks.1.")) for name in cache)


def test_no_layers() -> None:
    model = build("gpt2", n_layers=0)
    logits, cache = model.run_with_cache(TOKENS)
    close(model.unembed(model.ln_final(cache["hook_embed"] + cache["hook_pos_embed"])), logits)


@pytest.mark.parametrize(("kind", "dtype"), [("gpt2", "bfloat16"), ("llama", "float16"), ("soft_caps", "bfloat16")])
def test_half_precision(kind: str, dtype: str) -> None:
    model = build(kind).to(dtype)
    logits, cache = model.run_with_cache(TOKENS)
    assert logits.dtype == dtype
    for name, value in cache.items():
        is_norm = name.endswith(("hook_scale", "hook_normalized"))
        assert value.dtype == ("float32" if is_norm else dtype), name
    exact, _ = full(kind)
    error = np.abs(np.asarray(logits, np.float32) - exact).max() / np.abs(exact).max()
    assert error < 0.1
    hooked = model.run_with_hooks(
        TOKENS, fwd_hooks=[("z0", tljax.Scale(2.0, head=1)), ("resid_post1", lambda x, hook: x.astype(jnp.float32) * 2)]
    )
    assert hooked.dtype == dtype
    assert np.isfinite(np.asarray(model(TOKENS, return_type="loss"), np.float32))


@pytest.mark.parametrize("kind", ["gpt2", "llama", "local", "bidirectional"])
def test_padding_on_the_left_changes_nothing(kind: str) -> None:
    model = build(kind)
    mask = np.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    batched, cache = model.run_with_cache(TOKENS, attention_mask=mask)
    close(batched[0, 2:], model(TOKENS[:1, 2:])[0])
    close(batched[1], full(kind)[0][1])
    assert (np.asarray(cache["pattern", 0])[0, :, :, :2] == 0).all()
    pattern_sums = np.asarray(cache["pattern", 0])[0].sum(-1)
    close(pattern_sums[:, 2:], np.ones((4, 4)))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_no_nan_gradient_under_left_padding(kind: str) -> None:
    mask = np.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    gradient = jax.grad(lambda m: m(TOKENS, attention_mask=mask, return_type="loss"))(build(kind))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_padding_on_the_right_changes_nothing() -> None:
    model = build("bidirectional")
    mask = np.array([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    batched = model(TOKENS, attention_mask=mask)
    close(batched[0, :4], model(TOKENS[:1, :4])[0])


def test_loss_ignores_padding() -> None:
    model = build("gpt2")
    mask = np.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    per_token = model(TOKENS, attention_mask=mask, return_type="loss", loss_per_token=True)
    single = model(TOKENS[:1, 2:], return_type="loss", loss_per_token=True)
    assert (per_token[0, :2] == 0).all()
    close(per_token[0, 2:], single[0])
    close(model(TOKENS, attention_mask=mask, return_type="loss"), per_token.sum() / 8)
