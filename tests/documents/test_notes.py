"""A researcher's notes on TransformerLens: every block in JAX spelling, on the bundled model."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tljax import ActivationCache, HookedTransformer

pytestmark = pytest.mark.xdist_group("documents")

PROMPT = "The fox ran to the red engine"
"""For the prompts about a robot, whose words are not single tokens here."""


@pytest.fixture(scope="module")
def cache(model: HookedTransformer) -> ActivationCache:
    return model.run_with_cache(PROMPT)[1]


def test_minimal_usage() -> None:
    model = HookedTransformer.from_pretrained("tljax-tiny")

    prompt = "Hello World"
    logits, cache = model.run_with_cache(prompt)

    # logits: [batch, seq, vocab]
    # cache: dict-like mapping hook_name -> activation tensor
    assert logits.shape == (1, len(model.to_str_tokens(prompt)), model.cfg.d_vocab)
    assert dict(cache).keys() == set(cache)
    assert all(isinstance(activation, jax.Array) for activation in cache.values())
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("L", [0, 3])
def test_residual_stream(cache: ActivationCache, L: int) -> None:
    pre, mid, post = (np.asarray(cache[f"blocks.{L}.hook_resid_{place}"]) for place in ("pre", "mid", "post"))
    np.testing.assert_allclose(mid - pre, cache["attn_out", L], atol=1e-4)  # after attention add, before MLP
    np.testing.assert_allclose(post - mid, cache["mlp_out", L], atol=1e-4)  # leaving the block (after MLP add)


def test_attention_and_mlp_hook_points(model: HookedTransformer, cache: ActivationCache) -> None:
    L = 1
    q, k, v = (np.asarray(cache[f"blocks.{L}.attn.hook_{letter}"]) for letter in "qkv")  # per-head Q/K/V
    scores = np.asarray(cache[f"blocks.{L}.attn.hook_attn_scores"])  # pre-SoftMax scores
    pattern = np.asarray(cache[f"blocks.{L}.attn.hook_pattern"])  # post-SoftMax attention probabilities
    z = np.asarray(cache[f"blocks.{L}.attn.hook_z"])  # per-head output before final projection
    pre = np.asarray(cache[f"blocks.{L}.mlp.hook_pre"])  # MLP hidden / pre-activation
    post = np.asarray(cache[f"blocks.{L}.mlp.hook_post"])  # after the activation function

    seq = q.shape[1]
    assert q.shape == k.shape == v.shape == z.shape == (1, seq, model.cfg.n_heads, model.cfg.d_head)
    assert scores.shape == pattern.shape == (1, model.cfg.n_heads, seq, seq)
    seen = np.tril(np.ones((seq, seq), bool))
    np.testing.assert_allclose(scores[:, :, seen], (np.einsum("bqhd,bkhd->bhqk", q, k) / 4)[:, :, seen], atol=1e-4)
    exponentials = np.exp(scores - scores.max(-1, keepdims=True))
    np.testing.assert_allclose(pattern, exponentials / exponentials.sum(-1, keepdims=True), atol=1e-5)
    np.testing.assert_allclose(z, np.einsum("bhqk,bkhd->bqhd", pattern, v), atol=1e-4)
    assert pre.shape == post.shape == (1, seq, model.cfg.d_mlp)
    np.testing.assert_allclose(post, jax.nn.gelu(pre, approximate=True), atol=1e-5)
    np.testing.assert_allclose(post @ model.W_out[L] + model.b_out[L], cache["mlp_out", L], atol=1e-4)


def test_cache_only_what_you_need(cache: ActivationCache) -> None:
    model = HookedTransformer.from_pretrained("tljax-tiny")
    prompt = PROMPT
    everything = cache

    logits, cache = model.run_with_cache(
        prompt, names_filter=lambda name: "hook_resid_post" in name or "attn.hook_pattern" in name
    )

    # Example: layer 3 residual stream output
    resid3 = cache["blocks.3.hook_resid_post"]  # [batch, seq, d_model]

    assert resid3.shape == (*logits.shape[:2], model.cfg.d_model)
    np.testing.assert_allclose(resid3, everything["blocks.3.hook_resid_post"], atol=1e-4)
    points = {name.split(".", 2)[2] for name in cache}
    assert points == {"hook_resid_post", "attn.hook_pattern"}
    assert len(cache) == 2 * model.cfg.n_layers


def test_look_at_an_attention_head(capsys: pytest.CaptureFixture[str]) -> None:
    model = HookedTransformer.from_pretrained("tljax-tiny")
    prompt = PROMPT

    tokens = model.to_tokens(prompt)
    str_tokens = model.to_str_tokens(tokens[0])

    logits, cache = model.run_with_cache(tokens, names_filter=lambda name: "attn.hook_pattern" in name)  # noqa: RUF059

    # pattern: [batch, n_heads, query_pos, key_pos]
    pattern = cache["blocks.0.attn.hook_pattern"][0]
    head = 0
    query_pos = -1  # last token position (predicting next token)

    attn = pattern[head, query_pos]  # [key_pos]
    best_k = int(jnp.argmax(attn).item())  # which earlier token is most attended to?

    print("Most attended token:", best_k, str_tokens[best_k])

    assert capsys.readouterr().out == f"Most attended token: {best_k} {str_tokens[best_k]}\n"
    assert str_tokens == model.to_str_tokens(prompt)
    assert attn.shape == (len(str_tokens),)
    assert float(attn[best_k]) == float(attn.max()) > 1 / len(str_tokens)


def test_ablate_one_attention_head_output(cache: ActivationCache, capsys: pytest.CaptureFixture[str]) -> None:
    model = HookedTransformer.from_pretrained("tljax-tiny")
    prompt = PROMPT
    tokens = model.to_tokens(prompt)

    def ablate_head_z(z, hook, head_idx: int):
        # z: [batch, seq, n_heads, d_head]
        z = z.copy()
        z = z.at[:, :, head_idx, :].set(0.0)
        return z

    layer = 2
    head = 3
    hook_name = f"blocks.{layer}.attn.hook_z"

    logits_normal = model(tokens)
    logits_ablated = model.run_with_hooks(tokens, fwd_hooks=[(hook_name, partial(ablate_head_z, head_idx=head))])

    # Compare top next token
    pos = -1
    p1 = jax.nn.softmax(logits_normal[0, pos], axis=-1)
    p2 = jax.nn.softmax(logits_ablated[0, pos], axis=-1)
    print("KL(normal||ablated):", jnp.sum(p1 * (jnp.log(p1) - jnp.log(p2))).item())

    kl = float(capsys.readouterr().out.removeprefix("KL(normal||ablated): "))
    assert kl > 1e-4
    without = cache["attn_out", layer] - cache["z", layer][:, :, head] @ model.W_O[layer, head]
    name = f"blocks.{layer}.hook_attn_out"
    expected = model.run_with_hooks(tokens, fwd_hooks=[(name, lambda attn_out, hook: without)])
    np.testing.assert_allclose(logits_ablated, expected, atol=1e-3)


def test_activation_patching() -> None:
    model = HookedTransformer.from_pretrained("tljax-tiny")

    prompt_A = "Alice gave Bob a book. Bob thanked Alice."
    prompt_B = "Alice gave Bob a book. Bob insulted Alice."

    tokens_A = model.to_tokens(prompt_A)
    tokens_B = model.to_tokens(prompt_B)

    logits_A, cache_A = model.run_with_cache(tokens_A, names_filter=lambda n: "hook_resid_post" in n)

    layer = 2
    hookpoint = f"blocks.{layer}.hook_resid_post"

    def patch_resid_post(resid, hook):
        # Replace the whole tensor (simple version). You can also patch only specific positions.
        return cache_A[hookpoint]

    logits_patched = model.run_with_hooks(tokens_B, fwd_hooks=[(hookpoint, patch_resid_post)])

    np.testing.assert_allclose(logits_patched, logits_A, atol=1e-4)
    assert float(jnp.abs(logits_patched - model(tokens_B)).max()) > 1


def test_logit_lens(model: HookedTransformer, cache: ActivationCache) -> None:
    lens = [model.unembed(model.ln_final(cache["resid_post", layer])) for layer in range(model.cfg.n_layers)]
    logits = model(PROMPT)
    np.testing.assert_allclose(lens[-1], logits, atol=1e-4)
    distances = [float(jnp.abs(one - logits).mean()) for one in lens]
    assert sorted(distances, reverse=True) == distances


def test_shape(model: HookedTransformer, cache: ActivationCache) -> None:
    seq = model.to_tokens(PROMPT).shape[1]
    for point in model.hook_points():
        if not point.optional:
            assert cache[point.name].shape == point.shape(batch=1, pos=seq)
            patterns = point.name.endswith(("hook_pattern", "hook_attn_scores"))
            assert point.axes[:2] == (("batch", "head") if patterns else ("batch", "pos"))
