"""What TransformerLens users are used to writing, in JAX spelling, on the bundled model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tljax
from tljax import HookedTransformer
from tljax.errors import HookError

PROMPT = "The Eiffel Tower is in the city of"
CORRUPTED = "The Colosseum is in the city of"


@pytest.fixture(scope="module")
def tokens_of(tiny: HookedTransformer) -> jax.Array:
    return tiny.to_tokens("When John and Mary went to the store, John gave a drink to")


def test_extraction_with_a_storing_hook(tiny: HookedTransformer) -> None:
    ids = tiny.tokenizer("The quick brown fox jumps over the lazy dog.", add_special_tokens=False).input_ids
    windows = [ids[i : i + 4] for i in range(0, len(ids), 4)]
    windows[-1] += [tiny.tokenizer.eos_token_id] * (4 - len(windows[-1]))
    stored = []

    def save(act: jax.Array, hook: object) -> None:
        flat = act.reshape(-1, tiny.cfg.d_model)
        flat = flat - flat.mean(-1, keepdims=True)
        stored.append(flat / jnp.linalg.norm(flat, axis=-1, keepdims=True))

    assert (
        tiny.run_with_hooks(jnp.array(windows), fwd_hooks=[("blocks.2.hook_resid_pre", save)], return_type=None) is None
    )
    activations = jnp.concatenate(stored, axis=0)
    assert activations.shape == (4 * len(windows), tiny.cfg.d_model)
    np.testing.assert_allclose(jnp.linalg.norm(activations, axis=-1), 1, atol=1e-5)


def test_every_layer_with_closures(tiny: HookedTransformer, tokens_of: jax.Array) -> None:
    by_layer = {}
    for layer in range(tiny.cfg.n_layers):
        found = []

        def save(act: jax.Array, hook: object, found: list = found, layer: int = layer) -> None:
            found.append(act)

        tiny.run_with_hooks(tokens_of, fwd_hooks=[(f"blocks.{layer}.hook_resid_pre", save)], return_type=None)
        by_layer[layer] = jnp.concatenate(found, axis=0)
    _, cache = tiny.run_with_cache(tokens_of)
    for layer, value in by_layer.items():
        np.testing.assert_allclose(value, cache["resid_pre", layer], atol=1e-5)


@pytest.mark.parametrize(
    ("seed_name", "name"),
    [
        ("blocks.1.attn.hook_attn", "blocks.1.attn.hook_pattern"),
        ("blocks.1.attn.hook_out", "blocks.1.hook_attn_out"),
        ("blocks.1.mlp.hook_out", "blocks.1.hook_mlp_out"),
        ("blocks.1.mlp.hook_pre", "blocks.1.mlp.hook_pre"),
    ],
)
def test_names_in_the_seeds(tiny: HookedTransformer, tokens_of: jax.Array, seed_name: str, name: str) -> None:
    seen = {}
    tiny.run_with_hooks(tokens_of, fwd_hooks=[(seed_name, lambda act, hook: seen.update({hook.name: act}))])
    assert list(seen) == [name]


def test_mlp_input_is_what_the_mlp_reads(tiny: HookedTransformer, tokens_of: jax.Array) -> None:
    _, cache = tiny.run_with_cache(tokens_of, names_filter=["blocks.1.mlp.hook_in", "blocks.1.mlp.hook_pre"])
    pre = cache["blocks.1.mlp.hook_in"] @ tiny.W_in[1] + tiny.b_in[1][None, None]
    np.testing.assert_allclose(pre, cache["blocks.1.mlp.hook_pre"], atol=1e-4)


def test_intervening_on_one_dimension(tiny: HookedTransformer, tokens_of: jax.Array) -> None:
    def zero_feature(act: jax.Array, hook: object) -> jax.Array:
        return act.at[..., 42].set(0)

    logits = tiny.run_with_hooks(tokens_of, fwd_hooks=[("blocks.2.hook_resid_pre", zero_feature)], return_type="logits")
    assert float(jnp.abs(logits - tiny(tokens_of)).max()) > 1e-3


def test_ablating_a_head_with_partial_and_measuring_kl(tiny: HookedTransformer, tokens_of: jax.Array) -> None:
    def ablate_head_z(z: jax.Array, hook: object, head_idx: int) -> jax.Array:
        return z.at[:, :, head_idx, :].set(0.0)

    hook = functools.partial(ablate_head_z, head_idx=3)
    ablated = tiny.run_with_hooks(tokens_of, fwd_hooks=[("blocks.2.attn.hook_z", hook)])
    p1, p2 = jax.nn.softmax(tiny(tokens_of)[0, -1]), jax.nn.softmax(ablated[0, -1])
    assert float(jnp.sum(p1 * (jnp.log(p1) - jnp.log(p2)))) > 0


def test_torch_style_assignment_says_what_to_write(tiny: HookedTransformer, tokens_of: jax.Array) -> None:
    def steer(act: jax.Array, hook: object) -> jax.Array:
        act[:, 3] = 0  # type: ignore[index]
        return act

    with pytest.raises(HookError, match=r"return act.at\[:, 3\].set\(0\)"):
        tiny.run_with_hooks(tokens_of, fwd_hooks=[("blocks.0.hook_resid_post", steer)])


def test_patching_tutorial(tiny: HookedTransformer) -> None:
    clean, corrupted = tiny.to_tokens(PROMPT), tiny.to_tokens(CORRUPTED)
    paris, rome = tiny.to_single_token(" Paris"), tiny.to_single_token(" Rome")

    def logit_diff(logits: jax.Array) -> float:
        return (logits[0, -1, paris] - logits[0, -1, rome]).item()

    clean_logits, clean_cache = tiny.run_with_cache(clean)
    assert logit_diff(clean_logits) > 1
    assert logit_diff(tiny(corrupted)) < -1
    length = min(clean.shape[1], corrupted.shape[1])
    last_layer = tiny.cfg.n_layers - 1

    def patch(activation: jax.Array, hook: object) -> jax.Array:
        return activation.at[:, length - 1].set(clean_cache["resid_post", last_layer][:, -1])

    logits = tiny.run_with_hooks(corrupted, fwd_hooks=[(f"blocks.{last_layer}.hook_resid_post", patch)])
    assert logit_diff(logits) == pytest.approx(logit_diff(clean_logits), abs=1e-3)


def test_steering_tutorial(tiny: HookedTransformer) -> None:
    positive, negative = "I love this! It's absolutely wonderful and", "I hate this! It's absolutely terrible and"
    _, pos_cache = tiny.run_with_cache(tiny.to_tokens(positive))
    _, neg_cache = tiny.run_with_cache(tiny.to_tokens(negative))
    layer = 2
    steering_vector = pos_cache["resid_post", layer].mean(axis=1) - neg_cache["resid_post", layer].mean(axis=1)
    test_tokens = tiny.to_tokens("The movie was")
    steps = []

    def steer_hook(activation: jax.Array, hook: object) -> jax.Array:
        steps.append(activation.shape[1])
        activation += 2.0 * steering_vector[:, None]
        return activation

    normal = tiny.generate(test_tokens, max_new_tokens=20, do_sample=False, stop_at_eos=False, verbose=False)
    steered = tiny.generate(
        test_tokens, max_new_tokens=20, do_sample=False, stop_at_eos=False, verbose=False,
        fwd_hooks=[(f"blocks.{layer}.hook_resid_post", steer_hook)],
    )  # fmt: skip
    assert steps == [test_tokens.shape[1]] + [1] * 19
    assert tiny.to_string(normal[0]).startswith(tiny.to_string(test_tokens[0]))
    hook = tljax.Add(2.0 * steering_vector[0])
    compiled = tiny.generate(
        test_tokens, max_new_tokens=20, do_sample=False, stop_at_eos=False, verbose=False,
        fwd_hooks=[(f"blocks.{layer}.hook_resid_post", hook)],
    )  # fmt: skip
    np.testing.assert_array_equal(steered, compiled)
    assert (np.asarray(normal) != np.asarray(steered)).any()


def test_generate_with_every_option_of_the_reference_sheet(tiny: HookedTransformer) -> None:
    tokens = tiny.to_tokens("The movie was")
    output = tiny.generate(
        tokens, max_new_tokens=50, temperature=0.7, top_k=40, top_p=0.9, freq_penalty=1.0, use_past_kv_cache=True
    )
    np.testing.assert_array_equal(output[:, : tokens.shape[1]], tokens)
    assert tokens.shape[1] < output.shape[1] <= tokens.shape[1] + 50


def test_whole_prompt_patch_from_another_run(tiny: HookedTransformer) -> None:
    a, b = tiny.to_tokens("I love this! It's wonderful and"), tiny.to_tokens("I hate this! It's terrible and")
    logits_a, cache_a = tiny.run_with_cache(a, names_filter=lambda n: "hook_resid_post" in n)
    name = "blocks.2.hook_resid_post"
    patched = tiny.run_with_hooks(b, fwd_hooks=[(name, lambda resid, hook: cache_a[name])])
    np.testing.assert_allclose(patched, logits_a, atol=1e-4)


def test_direct_logit_attribution_by_head(tiny: HookedTransformer, tokens_of: jax.Array) -> None:
    _, cache = tiny.run_with_cache(tokens_of)
    mary = tiny.to_single_token(" Mary")
    head_out = cache["z", 3][0, :, 2, :]
    contribution = head_out[-1] @ tiny.W_O[3, 2] @ tiny.W_U
    result = tiny.run_with_cache(tokens_of, names_filter="blocks.3.attn.hook_result")[1]["result", 3][0, -1, 2]
    np.testing.assert_allclose(contribution[mary], result @ tiny.W_U[:, mary], atol=1e-4)


def test_logit_lens(tiny: HookedTransformer, tokens_of: jax.Array) -> None:
    logits, cache = tiny.run_with_cache(tokens_of)
    accumulated = cache.accumulated_resid(layer=None, incl_mid=False, apply_ln=True)
    lens = accumulated @ tiny.W_U + tiny.b_U[None, None, None]
    assert lens.shape == (tiny.cfg.n_layers + 1, *logits.shape)
    np.testing.assert_allclose(lens[-1], logits, atol=1e-4)


def test_layer_norm_before_reading_weights(tiny: HookedTransformer, tokens_of: jax.Array) -> None:
    model = HookedTransformer.from_pretrained_no_processing("tljax-tiny")
    _, cache = model.run_with_cache(tokens_of)
    pre = model.blocks[1].ln2(cache["resid_mid", 1]) @ model.W_in[1] + model.b_in[1][None, None]
    np.testing.assert_allclose(pre, cache["pre", 1, "mlp"], atol=1e-4)
    assert model.blocks[1].ln2.w.shape == (model.cfg.d_model,)


def test_cache_on_cpu_with_a_filter(tiny: HookedTransformer, tokens_of: jax.Array) -> None:
    _, cache = tiny.run_with_cache(tokens_of, names_filter=lambda n: "resid_post" in n or "pattern" in n, device="cpu")
    assert len(cache) == 2 * tiny.cfg.n_layers
    assert all(value.devices() == {jax.devices("cpu")[0]} for value in cache.values())


def test_hooks_do_not_persist(tiny: HookedTransformer, tokens_of: jax.Array) -> None:
    before = tiny(tokens_of)
    tiny.run_with_hooks(tokens_of, fwd_hooks=[("blocks.0.hook_resid_post", lambda act, hook: 0 * act)])
    np.testing.assert_array_equal(tiny(tokens_of), before)
    assert tiny.list_hooks() == {}
