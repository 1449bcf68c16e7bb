"""The document "TransformerLens Tutorials": every block in JAX spelling, on the bundled model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tljax
from tljax import HookedTransformer
from tljax.patching import sweep

pytestmark = pytest.mark.xdist_group("documents")

CLEAN_PROMPT = "The Louvre is in the city of"
CORRUPTED_PROMPT = "The Colosseum is in the city of"

Captured = pytest.CaptureFixture[str]


def test_tutorial_1_basic_activation_analysis(capsys: Captured) -> None:
    # 1. Load model
    model = HookedTransformer.from_pretrained("tljax-tiny")
    print(f"Model has {model.cfg.n_layers} layers, {model.cfg.n_heads} heads")

    # 2. Tokenize input
    prompt = "The capital of France is"
    tokens = model.to_tokens(prompt)
    print(f"Tokens shape: {tokens.shape}")
    print(f"String tokens: {model.to_str_tokens(prompt)}")

    # 3. Run with cache
    logits, cache = model.run_with_cache(tokens)
    print(f"Logits shape: {logits.shape}")
    print(f"Cache keys: {len(cache.keys())}")

    # 4. Inspect activations
    for layer in range(model.cfg.n_layers):
        resid = cache["resid_post", layer]
        print(f"Layer {layer} residual norm: {jnp.linalg.norm(resid).item():.2f}")

    # 5. Look at attention patterns
    attn = cache["pattern", 0]  # Layer 0
    print(f"Attention shape: {attn.shape}")  # [batch, heads, q_pos, k_pos]

    # 6. Get top predictions
    probs = jax.nn.softmax(logits[0, -1], axis=-1)
    values, indices = jax.lax.top_k(probs, 5)
    for token_id, prob in zip(indices, values, strict=True):
        print(f"{model.to_string(token_id[None])}: {prob.item():.3f}")

    printed = capsys.readouterr().out.split("\n")
    norms = [np.sqrt((np.asarray(cache["resid_post", layer], np.float64) ** 2).sum()) for layer in range(4)]
    assert printed[:5] == [
        "Model has 4 layers, 4 heads",
        "Tokens shape: (1, 6)",
        "String tokens: ['<|endoftext|>', 'The', ' capital', ' of', ' France', ' is']",
        "Logits shape: (1, 6, 969)",
        f"Cache keys: {len([point for point in model.hook_points() if not point.optional])}",
    ]
    assert printed[5:10] == [
        *(f"Layer {layer} residual norm: {norm:.2f}" for layer, norm in enumerate(norms)),
        "Attention shape: (1, 4, 6, 6)",
    ]
    best = np.argsort(-np.asarray(logits[0, -1]))[:5]
    assert [line.split(":")[0] for line in printed[10:15]] == [model.to_string([int(token)]) for token in best]
    assert printed[10].startswith(" Paris: 0.")
    assert float(values[0]) > 0.5


def test_tutorial_2_activation_patching(capsys: Captured) -> None:
    model = HookedTransformer.from_pretrained("tljax-tiny")

    # Define clean and corrupted prompts
    clean_prompt = CLEAN_PROMPT
    corrupted_prompt = CORRUPTED_PROMPT

    clean_tokens = model.to_tokens(clean_prompt)
    corrupted_tokens = model.to_tokens(corrupted_prompt)

    # Get clean activations
    _, clean_cache = model.run_with_cache(clean_tokens)

    # Define metric
    paris_token = model.to_single_token(" Paris")
    rome_token = model.to_single_token(" Rome")

    def logit_diff(logits):
        """Positive = model prefers Paris over Rome"""
        return (logits[0, -1, paris_token] - logits[0, -1, rome_token]).item()

    # Baseline measurements
    clean_logits = model(clean_tokens)
    corrupted_logits = model(corrupted_tokens)
    print(f"Clean logit diff: {logit_diff(clean_logits):.3f}")
    print(f"Corrupted logit diff: {logit_diff(corrupted_logits):.3f}")

    # Patch each layer
    results = []
    for layer in range(model.cfg.n_layers):

        def patch_hook(activation, hook, layer=layer):
            activation = activation.at[:].set(clean_cache["resid_post", layer])
            return activation

        patched_logits = model.run_with_hooks(
            corrupted_tokens, fwd_hooks=[(f"blocks.{layer}.hook_resid_post", patch_hook)]
        )
        results.append(logit_diff(patched_logits))
        print(f"Layer {layer}: {results[-1]:.3f}")

    # Find most important layer
    best_layer = max(range(len(results)), key=lambda i: results[i])
    print(f"\nMost important layer: {best_layer}")

    clean, corrupted = logit_diff(clean_logits), logit_diff(corrupted_logits)
    assert clean > 1
    assert corrupted < -1
    np.testing.assert_allclose(results, [clean] * model.cfg.n_layers, rtol=1e-5, atol=1e-5)
    printed = capsys.readouterr().out.split("\n")
    assert printed[:2] == [f"Clean logit diff: {clean:.3f}", f"Corrupted logit diff: {corrupted:.3f}"]
    assert printed[-2] == f"Most important layer: {int(np.argmax(results))}"

    # The same as one call
    layers = sweep(model, corrupted_tokens, clean_cache, logit_diff, "resid_post", axes=())
    assert layers.axis_names == ("layer",)
    np.testing.assert_allclose(layers.values, results, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(layers.values, [clean] * model.cfg.n_layers, rtol=1e-5, atol=1e-5)
    assert layers.report is not None
    assert layers.report.metric == "replayed"
    assert "one position unembedded" in layers.report.reductions


def test_tutorial_2_position_specific_patching(model: HookedTransformer) -> None:
    clean_tokens = model.to_tokens(CLEAN_PROMPT)
    corrupted_tokens = model.to_tokens(CORRUPTED_PROMPT)
    clean_logits, clean_cache = model.run_with_cache(clean_tokens)
    paris_token = model.to_single_token(" Paris")
    rome_token = model.to_single_token(" Rome")

    def logit_diff(logits):
        return (logits[0, -1, paris_token] - logits[0, -1, rome_token]).item()

    seq_len = clean_tokens.shape[1]
    results = jnp.zeros((model.cfg.n_layers, seq_len))

    for layer in range(model.cfg.n_layers):
        for pos in range(seq_len):

            def patch_hook(activation, hook, layer=layer, pos=pos):
                activation = activation.at[:, pos, :].set(clean_cache["resid_post", layer][:, pos, :])
                return activation

            patched_logits = model.run_with_hooks(
                corrupted_tokens, fwd_hooks=[(f"blocks.{layer}.hook_resid_post", patch_hook)]
            )
            results = results.at[layer, pos].set(logit_diff(patched_logits))

    # Visualize as heatmap
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(12, 8))
    image = plt.imshow(np.asarray(results), aspect="auto", cmap="RdBu")
    plt.xlabel("Position")
    plt.ylabel("Layer")
    plt.colorbar(label="Logit Difference")
    plt.title("Activation Patching Results")

    np.testing.assert_array_equal(image.get_array(), results)
    plt.close(figure)

    # The finding: early layers hold the answer at the landmark, the last layer at the end
    landmark, last = 2, seq_len - 1
    assert [int(layer.argmax()) for layer in results] == [landmark, *[last] * (model.cfg.n_layers - 1)]
    np.testing.assert_allclose(results[-1, last], logit_diff(clean_logits), rtol=1e-5)
    np.testing.assert_allclose(results[:, :landmark], logit_diff(model(corrupted_tokens)), atol=1e-4)

    # The same as one call, within 1e-5 of the size of the metric, and measured the fast way
    positions = sweep(model, corrupted_tokens, clean_cache, logit_diff, "resid_post", axes=("pos",))
    np.testing.assert_allclose(positions.values, results, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(positions.baseline, logit_diff(model(corrupted_tokens)), rtol=1e-5)
    assert positions.report is not None
    assert positions.report.metric == "replayed"
    assert "one position unembedded" in positions.report.reductions
    assert float(np.ptp(np.asarray(results))) > 10


def test_tutorial_3_direct_logit_attribution(capsys: Captured) -> None:
    model = HookedTransformer.from_pretrained("tljax-tiny")

    prompt = "The capital of France is"
    tokens = model.to_tokens(prompt)
    logits, cache = model.run_with_cache(tokens)  # noqa: RUF059

    # Target token
    target_token = model.to_single_token(" Paris")

    # Get unembedding direction for target
    target_direction = model.W_U[:, target_token]  # [d_model]

    # Attribution per attention head
    head_contributions = jnp.zeros((model.cfg.n_layers, model.cfg.n_heads))

    for layer in range(model.cfg.n_layers):
        # Get per-head output at final position
        z = cache["z", layer][0, -1]  # [n_heads, d_head]

        for head in range(model.cfg.n_heads):
            # Project through W_O to get contribution to residual
            head_out = z[head] @ model.W_O[layer, head]  # [d_model]

            # Dot with target direction
            contribution = (head_out @ target_direction).item()
            head_contributions = head_contributions.at[layer, head].set(contribution)

    # Find top contributing heads
    values, indices = jax.lax.top_k(head_contributions.flatten(), 10)
    print("Top 10 heads for predicting 'Paris':")
    for idx, val in zip(indices, values, strict=True):
        layer = idx.item() // model.cfg.n_heads
        head = idx.item() % model.cfg.n_heads
        print(f"  L{layer}H{head}: {val.item():.3f}")

    z = np.stack([cache["z", layer][0, -1] for layer in range(4)])
    direct = np.einsum("lhd,lhdm,m->lh", z, model.W_O, target_direction)
    np.testing.assert_allclose(head_contributions, direct, atol=1e-4)
    heads = np.asarray(cache.stack_head_results(pos_slice=-1))[:, 0]
    np.testing.assert_allclose(head_contributions.flatten(), heads @ target_direction, atol=1e-4)
    printed = capsys.readouterr().out.split("\n")
    best_layer, best_head = np.unravel_index(direct.argmax(), direct.shape)
    assert printed[0] == "Top 10 heads for predicting 'Paris':"
    assert printed[1] == f"  L{best_layer}H{best_head}: {direct.max():.3f}"
    assert len(printed) == 12
    assert direct.max() > 2 * abs(direct.mean())


def test_tutorial_4_induction_head_detection(capsys: Captured) -> None:
    model = HookedTransformer.from_pretrained("tljax-tiny")

    # Create repeated sequence pattern
    # Pattern: [A][B][C][A] - model should attend from last A to B
    seq = jax.random.randint(jax.random.key(0), (1, 20), 700, 969)
    # Repeat first half
    seq = seq.at[0, 10:].set(seq[0, :10])

    _, cache = model.run_with_cache(seq)

    # For induction heads: position i should attend to position (i - seq_len/2 + 1)
    # At position 10 (second A), should attend to position 1 (first B)

    induction_scores = jnp.zeros((model.cfg.n_layers, model.cfg.n_heads))

    for layer in range(model.cfg.n_layers):
        pattern = cache["pattern", layer][0]  # [heads, q_pos, k_pos]

        # Check attention from repeated positions to position after first occurrence
        for offset in range(1, 10):
            q_pos = 10 + offset  # Position in second half
            k_pos = offset  # Should attend to corresponding position in first half

            # Average attention to the "correct" position
            induction_scores = induction_scores.at[layer].add(pattern[:, q_pos, k_pos])

        induction_scores = induction_scores.at[layer].divide(9)  # Average over offsets

    # Find top induction heads
    print("Top induction heads:")
    for layer in range(model.cfg.n_layers):
        for head in range(model.cfg.n_heads):
            score = induction_scores[layer, head].item()
            if score > 0.3:
                print(f"  L{layer}H{head}: {score:.3f}")

    patterns = np.stack([cache["pattern", layer][0] for layer in range(4)])
    direct = np.diagonal(patterns[:, :, 11:, 1:10], axis1=-2, axis2=-1).mean(-1)
    np.testing.assert_allclose(induction_scores, direct, atol=1e-6)
    found = [f"  L{layer}H{head}: {direct[layer, head]:.3f}" for layer, head in np.argwhere(direct > 0.3)]
    assert capsys.readouterr().out.split("\n") == ["Top induction heads:", *found, ""]
    # As the text says, not as the block has it: an induction head attends to one position after the first occurrence.
    after = np.diagonal(patterns[:, :, 10:19, 1:10], axis1=-2, axis2=-1).mean(-1)
    assert (after[1] > 0.6).all()
    assert (after[[0, 2, 3]] < 0.3).all()


def test_tutorial_5_logit_lens(capsys: Captured) -> None:
    model = HookedTransformer.from_pretrained("tljax-tiny")

    prompt = "The quick brown fox jumps over the lazy"
    tokens = model.to_tokens(prompt)
    logits, cache = model.run_with_cache(tokens)

    # Get accumulated residual at each layer
    # Apply LayerNorm to match what unembedding sees
    accumulated = cache.accumulated_resid(layer=None, incl_mid=False, apply_ln=True)
    # Shape: [n_layers + 1, batch, pos, d_model]

    # Project to vocabulary
    layer_logits = accumulated @ model.W_U  # [n_layers + 1, batch, pos, d_vocab]

    # Look at predictions for final position
    print("Layer-by-layer predictions for final token:")
    for layer in range(model.cfg.n_layers + 1):
        probs = jax.nn.softmax(layer_logits[layer, 0, -1], axis=-1)
        top_token = probs.argmax()
        top_prob = probs[top_token].item()
        print(f"Layer {layer}: {model.to_string(top_token[None])!r} ({top_prob:.3f})")

    assert accumulated.shape == (model.cfg.n_layers + 1, 1, len(model.to_str_tokens(prompt)), model.cfg.d_model)
    assert layer_logits.shape == (model.cfg.n_layers + 1, *logits.shape)
    np.testing.assert_allclose(layer_logits[-1] + model.b_U, logits, atol=1e-4)
    printed = capsys.readouterr().out.split("\n")
    assert [line.split(":")[0] for line in printed[1:-1]] == [f"Layer {layer}" for layer in range(5)]
    assert printed[-2].startswith("Layer 4: ' dog' (0.")
    assert printed[-2].split("'")[1] == model.to_string(logits[0, -1].argmax()[None])
    assert printed[1].split("'")[1] != " dog"


def test_tutorial_6_steering_with_activation_addition(capsys: Captured) -> None:
    model = HookedTransformer.from_pretrained("tljax-tiny")

    # Get activations for contrasting prompts
    positive_prompt = "I love this! It's absolutely wonderful and"
    negative_prompt = "I hate this! It's absolutely terrible and"

    _, pos_cache = model.run_with_cache(model.to_tokens(positive_prompt))
    _, neg_cache = model.run_with_cache(model.to_tokens(negative_prompt))

    # Compute steering vector (positive - negative direction)
    layer = 2
    steering_vector = pos_cache["resid_post", layer].mean(axis=1) - neg_cache["resid_post", layer].mean(axis=1)

    # Generate with steering
    test_prompt = "The movie was"
    test_tokens = model.to_tokens(test_prompt)
    steps = []

    def steer_hook(activation, hook):
        steps.append(activation.shape[1])
        activation += 2.0 * steering_vector
        return activation

    # Without steering
    normal_output = model.generate(test_tokens, max_new_tokens=20)
    print(f"Normal: {model.to_string(normal_output[0])}")

    # With positive steering
    steered_output = model.generate(
        test_tokens, max_new_tokens=20, fwd_hooks=[(f"blocks.{layer}.hook_resid_post", steer_hook)]
    )
    print(f"Steered: {model.to_string(steered_output[0])}")

    start = model.to_string(test_tokens[0])
    printed = capsys.readouterr().out
    assert printed.startswith(f"Normal: {start}")
    assert f"\nSteered: {start}" in printed
    for output in (normal_output, steered_output):
        np.testing.assert_array_equal(output[:, : test_tokens.shape[1]], test_tokens)
    assert steps[0] == test_tokens.shape[1]
    assert set(steps[1:]) <= {1}

    def drawn(*hooks):
        options = {"max_new_tokens": 20, "temperature": 1e-4, "stop_at_eos": False, "verbose": False}
        named = [(f"blocks.{layer}.hook_resid_post", hook) for hook in hooks]
        return np.asarray(model.generate(test_tokens, **options, fwd_hooks=named))

    steps.clear()
    normal, steered, compiled = drawn(), drawn(steer_hook), drawn(tljax.Add(2.0 * steering_vector[0]))
    assert steps == [test_tokens.shape[1]] + [1] * 19
    np.testing.assert_array_equal(steered, compiled)
    assert (normal != steered).any()
