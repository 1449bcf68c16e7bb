"""The TransformerLens Skill document: every block in JAX spelling, on the bundled model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tljax
from tljax import HookedTransformer, patching
from tljax.checkpoints.files.names import ALIASES, hub_id
from tljax.errors import CheckpointError, InputError

pytestmark = pytest.mark.xdist_group("documents")


def test_hooked_transformer() -> None:
    # Load a model
    model = HookedTransformer.from_pretrained("tljax-tiny")

    # For gated models (LLaMA, Mistral)
    assert hub_id("meta-llama/Llama-2-7b-hf") == "meta-llama/Llama-2-7b-hf"
    assert repr(model) == (
        "HookedTransformer(tljax-tiny: 4 layers, d_model 64, 4 heads, d_vocab 969, n_ctx 128, float32)"
    )


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("openai-community", "gpt2 gpt2-medium gpt2-large gpt2-xl"),
        ("meta-llama", "llama-2-7b llama-2-13b"),
        ("EleutherAI", "pythia-70m pythia-160m pythia-410m pythia-1b pythia-1.4b pythia-2.8b pythia-6.9b pythia-12b"),
        ("EleutherAI", "gpt-neo-125m gpt-neo-1.3b gpt-neo-2.7b gpt-j-6b"),
        ("mistralai", "mistral-7b mixtral-8x7b"),
        ("microsoft", "phi-1 phi-2 phi-3 phi-4"),
        ("Qwen", "qwen1.5-0.5b qwen2-0.5b qwen2.5-0.5b qwen3-0.6b"),
        ("facebook", "opt opt-125m"),
        ("google", "gemma-2b gemma-7b gemma-2-2b"),
    ],
)
def test_supported_models(family: str, names: str) -> None:
    assert {hub_id(name).split("/")[0] for name in names.split()} == {family}
    assert len(set(ALIASES.values())) > 50


@pytest.mark.parametrize("name", ["llama-7b", "llama-13b"])
def test_supported_models_that_nobody_publishes(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"no public repository: .* pass its directory"):
        hub_id(name)


def test_activation_caching(model: HookedTransformer) -> None:
    # Get all activations
    tokens = model.to_tokens("The Eiffel Tower is in")
    logits, cache = model.run_with_cache(tokens)

    # Access specific activations
    residual = cache["resid_post", 2]  # Layer 2 residual stream
    attn_pattern = cache["pattern", 1]  # Layer 1 attention pattern
    mlp_out = cache["mlp_out", 3]  # Layer 3 MLP output
    everything = cache

    # Filter which activations to cache (saves memory)
    logits, cache = model.run_with_cache(tokens, names_filter=lambda name: "resid_post" in name)  # noqa: RUF059

    np.testing.assert_allclose(residual, model(tokens, stop_at_layer=3), atol=1e-5)
    np.testing.assert_allclose(attn_pattern.sum(-1), 1, atol=1e-5)
    np.testing.assert_allclose(everything["resid_mid", 3] + mlp_out, everything["resid_post", 3], atol=1e-4)
    assert len(cache) == model.cfg.n_layers < len(everything)
    np.testing.assert_allclose(cache["resid_post", 2], residual, atol=1e-5)


def test_activation_cache_keys(model: HookedTransformer, tokens: jax.Array) -> None:
    """What they hold is tested where the API reference lists them, in test_api_reference_analysis.py."""
    _, cache = model.run_with_cache(tokens)
    (batch, pos), d_model, head, d_head = tokens.shape, model.cfg.d_model, model.cfg.n_heads, model.cfg.d_head
    for layer in range(model.cfg.n_layers):
        assert cache["resid_pre", layer].shape == (batch, pos, d_model)
        assert cache["resid_mid", layer].shape == (batch, pos, d_model)
        assert cache["resid_post", layer].shape == (batch, pos, d_model)
        assert cache["attn_out", layer].shape == (batch, pos, d_model)
        assert cache["mlp_out", layer].shape == (batch, pos, d_model)
        assert cache["pattern", layer].shape == (batch, head, pos, pos)
        assert cache["q", layer].shape == (batch, pos, head, d_head)
        assert cache["k", layer].shape == (batch, pos, head, d_head)
        assert cache["v", layer].shape == (batch, pos, head, d_head)


def test_workflow_1_activation_patching() -> None:
    model = HookedTransformer.from_pretrained("tljax-tiny")

    # 1. Define clean and corrupted prompts
    clean_prompt = "The Louvre is in the city of"
    corrupted_prompt = "The Colosseum is in the city of"
    clean_tokens = model.to_tokens(clean_prompt)
    corrupted_tokens = model.to_tokens(corrupted_prompt)

    # 2. Get clean activations
    _, clean_cache = model.run_with_cache(clean_tokens)

    # 3. Define metric (e.g., logit difference)
    paris_token = model.to_single_token(" Paris")
    rome_token = model.to_single_token(" Rome")

    def metric(logits):
        return logits[0, -1, paris_token] - logits[0, -1, rome_token]

    # 4. Patch each position and layer
    results = jnp.zeros((model.cfg.n_layers, clean_tokens.shape[1]))
    for layer in range(model.cfg.n_layers):
        for pos in range(clean_tokens.shape[1]):

            def patch_hook(activation, hook):
                activation = activation.at[0, pos].set(clean_cache[hook.name][0, pos])  # noqa: B023
                return activation

            patched_logits = model.run_with_hooks(
                corrupted_tokens, fwd_hooks=[(f"blocks.{layer}.hook_resid_post", patch_hook)]
            )
            results = results.at[layer, pos].set(metric(patched_logits))

    # 5. Visualize results (layer x position heatmap)
    swept = patching.sweep(model, corrupted_tokens, clean_cache, metric, "resid_post", axes=("pos",))
    assert swept.axis_names == ("layer", "pos")
    assert swept.report is not None
    np.testing.assert_allclose(swept.values, results, rtol=1e-5, atol=1e-5)
    assert swept.report.metric == "replayed"
    assert "one position unembedded" in swept.report.reductions
    assert float(np.ptp(np.asarray(results))) > 10  # the sweep found something

    last = clean_tokens.shape[1] - 1
    assert float(results[-1, last]) == pytest.approx(float(metric(model(clean_tokens))), abs=1e-3)
    assert float(metric(model(clean_tokens))) > 1
    assert float(metric(model(corrupted_tokens))) < -1


def test_workflow_1_with_prompts_of_different_lengths(model: HookedTransformer) -> None:
    """The document's own pair, 9 and 8 tokens here: in a loop, an assignment beyond the end would do nothing."""
    clean, corrupted = "The Eiffel Tower is in the city of", "The Colosseum is in the city of"
    _, clean_cache = model.run_with_cache(clean)
    with pytest.raises(InputError, match="equally many tokens"):
        patching.sweep(model, corrupted, clean_cache, lambda logits: logits[0, -1, 0], "resid_post")

    paris, rome = model.to_single_token(" Paris"), model.to_single_token(" Rome")
    tokens = model.to_tokens(corrupted)
    last_layer = model.cfg.n_layers - 1

    def patch_hook(activation, hook):
        return activation.at[:, tokens.shape[1] - 1].set(clean_cache["resid_post", last_layer][:, -1])

    logits = model.run_with_hooks(tokens, fwd_hooks=[(f"blocks.{last_layer}.hook_resid_post", patch_hook)])
    difference, clean_difference = (
        float(one[0, -1, paris] - one[0, -1, rome]) for one in (logits, model(model.to_tokens(clean)))
    )
    assert difference == pytest.approx(clean_difference, abs=1e-3)
    assert clean_difference > 1


def test_workflow_2_circuit_analysis(capsys: pytest.CaptureFixture[str]) -> None:
    model = HookedTransformer.from_pretrained("tljax-tiny")

    # IOI task: "When John and Mary went to the store, Mary gave a bottle to"
    # Model should predict "John" (indirect object)
    prompt = "When John and Mary went to the store, Mary gave a bottle to"
    tokens = model.to_tokens(prompt)

    # 1. Get baseline logits
    logits, cache = model.run_with_cache(tokens)
    john_token = model.to_single_token(" John")
    mary_token = model.to_single_token(" Mary")

    # 2. Compute logit difference (IO - S)
    logit_diff = logits[0, -1, john_token] - logits[0, -1, mary_token]
    print(f"Logit difference: {logit_diff.item():.3f}")

    # 3. Direct logit attribution by head
    def get_head_contribution(layer, head):
        # Project head output to logits
        head_out = cache["z", layer][0, :, head, :]  # [pos, d_head]
        W_O = model.W_O[layer, head]  # [d_head, d_model]
        W_U = model.W_U  # [d_model, vocab]

        # Head contribution to logits at final position
        contribution = head_out[-1] @ W_O @ W_U
        return contribution[john_token] - contribution[mary_token]

    # 4. Map all heads
    head_contributions = jnp.zeros((model.cfg.n_layers, model.cfg.n_heads))
    for layer in range(model.cfg.n_layers):
        for head in range(model.cfg.n_heads):
            head_contributions = head_contributions.at[layer, head].set(get_head_contribution(layer, head))

    # 5. Identify top contributing heads (name movers, backup name movers)
    assert float(logit_diff) > 5
    assert logits[0, -1].argmax() == john_token
    assert capsys.readouterr().out == f"Logit difference: {float(logit_diff):.3f}\n"
    direction = np.asarray(model.W_U[:, john_token] - model.W_U[:, mary_token])
    names = [f"blocks.{layer}.attn.hook_result" for layer in range(4)]
    _, results = model.run_with_cache(tokens, names_filter=names)
    direct = np.stack([np.asarray(results[name])[0, -1] @ direction for name in names])
    np.testing.assert_allclose(head_contributions, direct, atol=1e-3)
    # Validate with ablation experiments
    layer, head = np.unravel_index(direct.argmax(), direct.shape)
    ablated = model.run_with_hooks(tokens, fwd_hooks=[(("z", int(layer)), tljax.Zero(head=int(head)))])
    assert float(ablated[0, -1, john_token] - ablated[0, -1, mary_token]) < float(logit_diff) - 1


def test_workflow_3_induction_head_detection() -> None:
    model = HookedTransformer.from_pretrained("tljax-tiny")

    # Create repeated sequence: [A][B][A] should predict [B]
    repeated_tokens = jnp.array([[800, 900, 800]])  # Arbitrary tokens
    _, cache = model.run_with_cache(repeated_tokens)

    # Induction heads attend from final [A] back to first [B]
    # Check attention from position 2 to position 1
    induction_scores = jnp.zeros((model.cfg.n_layers, model.cfg.n_heads))
    for layer in range(model.cfg.n_layers):
        pattern = cache["pattern", layer][0]  # [head, q_pos, k_pos]
        # Attention from pos 2 to pos 1
        induction_scores = induction_scores.at[layer].set(pattern[:, 2, 1])

    # Heads with high scores are induction heads
    top_heads = jax.lax.top_k(induction_scores.flatten(), k=5)

    values, indices = top_heads
    direct = np.stack([cache["pattern", layer][0, :, 2, 1] for layer in range(4)])
    np.testing.assert_array_equal(induction_scores, direct)
    np.testing.assert_array_equal(values, np.sort(direct.flatten())[::-1][:5])
    assert direct.flatten()[indices[0]] == values[0] > 0.5
    assert int(indices[0]) < model.cfg.n_heads  # position 1 is also the one before: previous-token heads of layer 0


def test_workflow_3_with_the_documents_own_tokens(model: HookedTransformer) -> None:
    with pytest.raises(InputError, match=r"Token id 1000 .* outside the vocabulary \(0 to 968\)"):
        model.run_with_cache(jnp.array([[1000, 2000, 1000]]))


def test_issue_hooks_persist_after_debugging(model: HookedTransformer, tokens: jax.Array) -> None:
    before = model(tokens)
    hooks = [("blocks.0.hook_resid_post", lambda act, hook: 0 * act)]

    # WRONG in TransformerLens: Old hooks remain active
    first = model.run_with_hooks(tokens, fwd_hooks=hooks)
    # Debug, add new hooks
    second = model.run_with_hooks(tokens, fwd_hooks=[("blocks.0.hook_resid_post", lambda act, hook: None)])

    # RIGHT: Always reset hooks
    model.reset_hooks()
    third = model.run_with_hooks(tokens, fwd_hooks=hooks)

    assert float(jnp.abs(first - before).max()) > 1e-2
    np.testing.assert_allclose(second, before, atol=1e-5)
    np.testing.assert_array_equal(third, first)
    np.testing.assert_array_equal(model(tokens), before)
    assert model.list_hooks() == {}


def test_issue_tokenization_gotchas(model: HookedTransformer, capsys: pytest.CaptureFixture[str]) -> None:
    # WRONG: Assuming consistent tokenization
    assert model.to_tokens(" Tom", prepend_bos=False).shape == (1, 1)  # Single token
    assert model.to_tokens("Neel", prepend_bos=False).shape == (1, 4)  # Becomes "N" + "e" + "e" + "l"

    # RIGHT: Check tokenization explicitly
    tokens = model.to_tokens("Neel", prepend_bos=False)
    print(model.to_str_tokens(tokens))

    assert capsys.readouterr().out == "['N', 'e', 'e', 'l']\n"


def test_issue_layer_norm_ignored_in_analysis(tokens: jax.Array) -> None:
    model = HookedTransformer.from_pretrained_no_processing("tljax-tiny")
    _, cache = model.run_with_cache(tokens)
    layer = 1
    residual = cache["resid_mid", layer]

    # WRONG: Ignoring LayerNorm
    wrong = residual @ model.W_in[layer]

    # RIGHT: Include LayerNorm
    ln_scale = model.blocks[layer].ln2.w
    ln_out = model.blocks[layer].ln2(residual)
    pre_activation = ln_out @ model.W_in[layer]

    assert ln_scale.shape == (model.cfg.d_model,)
    normalized = np.asarray(cache["normalized", layer, "ln2"])
    np.testing.assert_allclose(ln_out, normalized * ln_scale + model.blocks[layer].ln2.b, atol=1e-4)
    np.testing.assert_allclose(pre_activation + model.b_in[layer], cache["pre", layer, "mlp"], atol=1e-4)
    assert float(jnp.abs(wrong + model.b_in[layer] - cache["pre", layer]).max()) > 0.5


def test_issue_memory_explosion_with_large_models(model: HookedTransformer, tokens: jax.Array) -> None:
    # Use selective caching
    logits, cache = model.run_with_cache(
        tokens,
        names_filter=lambda n: "resid_post" in n or "pattern" in n,
        device="cpu",  # Cache on CPU
    )

    assert len(cache) == 2 * model.cfg.n_layers
    assert all(value.devices() == {jax.devices("cpu")[0]} for value in cache.values())
    np.testing.assert_allclose(logits, model(tokens), atol=1e-5)


def test_key_classes_reference(model: HookedTransformer, tokens: jax.Array) -> None:
    assert isinstance(model, tljax.HookedTransformer)
    assert isinstance(model.run_with_cache(tokens)[1], tljax.ActivationCache)
    assert isinstance(model.cfg, tljax.HookedTransformerConfig)
    assert isinstance(model.OV, tljax.FactoredMatrix)


class SAE:
    """A stand-in for ``sae_lens.SAE``: tied weights on an orthonormal basis, so that it reconstructs."""

    @classmethod
    def from_pretrained(cls, release: str, sae_id: str) -> "SAE":
        sae = cls()
        basis = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (64, 64)))[0]
        sae.W_enc, sae.hook_name = jnp.concatenate([basis, -basis], axis=1), sae_id
        return sae

    def encode(self, x: jax.Array) -> jax.Array:
        return jax.nn.relu(x @ self.W_enc)

    def decode(self, acts: jax.Array) -> jax.Array:
        return acts @ self.W_enc.T


def test_integration_with_saelens() -> None:
    model = HookedTransformer.from_pretrained("tljax-tiny")
    sae = SAE.from_pretrained("gpt2-small-res-jb", "blocks.2.hook_resid_pre")

    # Run with SAE
    tokens = model.to_tokens("The world")
    _, cache = model.run_with_cache(tokens)
    sae_acts = sae.encode(cache["resid_pre", 2])

    assert sae_acts.shape == (*tokens.shape, 128)
    np.testing.assert_allclose(sae.decode(sae_acts), cache[sae.hook_name], atol=1e-4)
    spliced = model.run_with_hooks(
        tokens, fwd_hooks=[(sae.hook_name, lambda resid, hook: sae.decode(sae.encode(resid)))]
    )
    np.testing.assert_allclose(spliced, model(tokens), atol=1e-3)
