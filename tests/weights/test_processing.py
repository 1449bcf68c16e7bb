"""Weight processing: exact where it applies, skipped where it does not, pure, idempotent, in the stored dtype."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from double_precision import double_precision

from tljax import HookedTransformer, HookedTransformerConfig
from tljax.checkpoints.layout import flatten, parameter_shapes, unflatten
from tljax.errors import ConfigError
from tljax.weights import process_weights
from tljax.weights.factors import product_svd

BASE = {"d_model": 12, "n_layers": 2, "n_heads": 4, "d_head": 4, "n_ctx": 8, "d_vocab": 11, "act_fn": "gelu"}
CASES: dict[str, dict[str, Any]] = {
    "ln": {},
    "ln_rotary_parallel": {"positional_embedding_type": "rotary", "parallel_attn_mlp": True},
    "ln_gated": {"gated_mlp": True},
    "ln_gated_bias": {"gated_mlp": True, "gated_mlp_bias": True},
    "ln_final_rms": {"final_rms": True},
    "ln_solu": {"act_fn": "solu_ln"},
    "ln_attn_only_bidirectional": {"attn_only": True, "attention_dir": "bidirectional"},
    "ln_pre": {"normalization_type": "LNPre"},
    "ln_mqa": {"n_key_value_heads": 1},
    "ln_soft_caps": {"output_logits_soft_cap": 2.0, "attn_scores_soft_cap": 3.0},
    "rms_gqa_gated": {"normalization_type": "RMS", "gated_mlp": True, "n_key_value_heads": 2, "act_fn": "silu"},
    "rms_solu": {"normalization_type": "RMS", "act_fn": "solu_ln"},
    "no_norm": {"normalization_type": None},
    "rms_offset_sandwich": {
        "normalization_type": "RMS", "gated_mlp": True, "act_fn": "silu", "rmsnorm_uses_offset": True,
        "use_normalization_before_and_after": True, "embedding_multiplier": 2.0, "residual_multiplier": 0.5,
        "logits_multiplier": 0.3, "positional_embedding_type": "rotary", "use_qk_norm": True,
    },
    "ln_sandwich": {"use_normalization_before_and_after": True},
    "ln_after_only": {"use_normalization_after_only": True},
    "ln_after_only_solu": {"use_normalization_after_only": True, "act_fn": "solu_ln"},
    "rms_after_only_joint_qk": {
        "normalization_type": "RMS", "gated_mlp": True, "act_fn": "silu", "use_normalization_after_only": True,
        "positional_embedding_type": "rotary", "use_qk_norm": True, "qk_norm_span": "joint",
    },
    "ln_offset_qk_ln": {
        "rmsnorm_uses_offset": True, "positional_embedding_type": "rotary", "use_qk_norm": True, "qk_norm_type": "LN",
        "qk_norm_span": "per_head",
    },
    "ln_sinks": {"use_attention_sinks": True},
    "ln_clipped": {"clip_qkv": 0.5},
    "ln_alibi_embedding_norm": {"positional_embedding_type": "alibi", "post_embedding_ln": True},
}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 11, (2, 8))
FLAGS = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")


def make(case: str, dtype: str = "float32") -> tuple[HookedTransformerConfig, dict[str, Any]]:
    """A config and parameters that are all random, gains and biases included."""
    cfg = HookedTransformerConfig(**(BASE | CASES[case]), dtype=dtype)
    rng, size = np.random.default_rng(1), 0.1 if cfg.normalization_type is None else 0.4
    flat = {
        path: jnp.asarray(size * (rng.standard_normal(shape) + 0.7), dtype)
        for path, shape in parameter_shapes(cfg).items()
    }
    return cfg, unflatten(flat)


def log_probs(cfg: HookedTransformerConfig, params: dict[str, Any]) -> jax.Array:
    return jax.nn.log_softmax(HookedTransformer(cfg, params=params)(jnp.asarray(TOKENS, jnp.int32)))


def assert_bit_equal(left: Any, right: Any) -> None:
    left, right = flatten(left), flatten(right)
    assert left.keys() == right.keys()
    for path in left:
        np.testing.assert_array_equal(np.asarray(left[path]), np.asarray(right[path]), err_msg=path)


@pytest.mark.parametrize("case", CASES)
def test_log_probabilities_are_unchanged(case: str) -> None:
    cfg, params = make(case)
    before = jax.tree.map(np.array, params)
    new_params, new_cfg = process_weights(params, cfg)
    assert_bit_equal(params, before)
    np.testing.assert_allclose(log_probs(new_cfg, new_params), log_probs(cfg, params), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", ["ln", "ln_final_rms", "ln_solu", "rms_gqa_gated"])
def test_a_second_time_changes_no_bit_and_keeps_the_dtype(case: str, dtype: str) -> None:
    cfg, params = make(case, dtype)
    once, cfg_once = process_weights(params, cfg)
    twice, cfg_twice = process_weights(once, cfg_once)
    assert cfg_twice == cfg_once
    assert {leaf.dtype.name for leaf in jax.tree.leaves(once)} == {dtype}
    assert_bit_equal(once, twice)


@pytest.mark.parametrize("flag", FLAGS)
def test_each_step_alone_leaves_the_function(flag: str) -> None:
    cfg, params = make("ln")
    new_params, new_cfg = process_weights(params, cfg, **(dict.fromkeys(FLAGS, False) | {flag: True}))
    assert (new_cfg.normalization_type == "LNPre") is (flag == "fold_ln")
    np.testing.assert_allclose(log_probs(new_cfg, new_params), log_probs(cfg, params), atol=1e-5, rtol=0)
    changed = {
        path for path, leaf in flatten(params).items() if not np.array_equal(leaf, flatten(new_params).get(path))
    }
    assert changed


def test_no_step_changes_nothing() -> None:
    cfg, params = make("ln")
    new_params, new_cfg = process_weights(params, cfg, **dict.fromkeys(FLAGS, False))
    assert new_cfg == cfg
    assert_bit_equal(new_params, params)


def test_both_branches_of_a_gated_mlp_with_biases_take_the_norm_s() -> None:
    cfg, params = make("ln_gated_bias")
    new, new_cfg = process_weights(params, cfg)
    assert new_cfg.normalization_type == "LNPre"
    norm, mlp = params["blocks"][1]["ln2"], params["blocks"][1]["mlp"]
    for name in ("gate", "in"):
        bias = mlp[f"b_{name}"] + norm["b"] @ mlp[f"W_{name}"]
        np.testing.assert_allclose(new["blocks"][1]["mlp"][f"b_{name}"], bias, atol=1e-6)


def means(params: dict[str, Any], path: str, axis: int) -> float:
    return float(np.abs(np.mean(flatten(params)[path], axis)).max())


def test_what_each_step_achieves() -> None:
    cfg, params = make("ln_solu")
    new, new_cfg = process_weights(params, cfg)
    assert new_cfg == dataclasses.replace(cfg, normalization_type="LNPre", weight_processing=FLAGS)
    assert not [path for path in flatten(new) if ".ln" in path or path.startswith("ln_")]
    for name in ("attn.W_Q", "attn.W_K", "attn.W_V", "mlp.W_in"):  # read the norm's output
        assert means(new, f"blocks.1.{name}", 0) < 1e-6
    for name in ("attn.W_O", "attn.b_O", "mlp.W_out", "mlp.b_out"):  # write to the residual stream
        assert means(new, f"blocks.1.{name}", -1) < 1e-6
    assert means(new, "embed.W_E", -1) < 1e-6
    assert means(new, "pos_embed.W_pos", -1) < 1e-6
    assert means(new, "unembed.W_U", 1) < 1e-6
    assert means(new, "unembed.W_U", 0) < 1e-6
    assert means(new, "unembed.b_U", 0) < 1e-6
    assert not np.any(flatten(new)["blocks.0.attn.b_V"])


@pytest.mark.parametrize(
    ("case", "untouched"),
    [
        ("rms_gqa_gated", ["embed.W_E", "pos_embed.W_pos", "blocks.0.attn.W_O", "blocks.0.mlp.W_out"]),
        ("ln_final_rms", ["embed.W_E", "blocks.0.attn.W_O", "blocks.0.mlp.b_out"]),
        ("ln_gated", ["blocks.0.ln1.w", "blocks.0.mlp.W_in", "blocks.0.mlp.W_gate", "blocks.0.attn.W_Q", "ln_final.b"]),
        ("ln_after_only", ["embed.W_E", "blocks.0.ln1_post.w", "blocks.0.attn.W_Q", "blocks.0.mlp.W_in"]),
        ("ln_sinks", ["blocks.0.attn.b_V"]),
        ("ln_clipped", ["blocks.0.attn.b_V"]),
        ("ln_alibi_embedding_norm", ["embed.ln.w", "embed.ln.b"]),
        ("no_norm", ["embed.W_E", "blocks.0.attn.W_Q", "blocks.0.mlp.W_in", "blocks.0.attn.W_O"]),
    ],
)
def test_steps_that_are_not_exact_are_skipped(case: str, untouched: list[str]) -> None:
    cfg, params = make(case)
    new, _ = process_weights(params, cfg, fold_ln=case not in ("ln_sinks", "ln_clipped"))
    for path in untouched:
        np.testing.assert_array_equal(flatten(new)[path], flatten(params)[path], err_msg=path)


def test_unembedding_is_not_centred_under_a_soft_cap() -> None:
    cfg, params = make("ln_soft_caps")
    new, _ = process_weights(params, cfg)
    assert means(new, "unembed.W_U", 1) > 1e-2
    assert means(new, "unembed.W_U", 0) < 1e-6


def test_final_rms_head_is_scaled_but_not_centred() -> None:
    cfg, params = make("ln_final_rms")
    new, _ = process_weights(params, cfg, center_unembed=False)
    expected = params["ln_final"]["w"][:, None] * params["unembed"]["W_U"]
    np.testing.assert_allclose(new["unembed"]["W_U"], expected, rtol=1e-6)


def test_value_biases_are_repeated_over_their_group() -> None:
    cfg, params = make("rms_gqa_gated")
    new, _ = process_weights(params, cfg)
    attn = params["blocks"][0]["attn"]
    values = np.repeat(np.asarray(attn["b_V"]), 2, axis=0)
    expected = np.asarray(attn["b_O"]) + np.einsum("nh,nhm->m", values, np.asarray(attn["W_O"]))
    np.testing.assert_allclose(new["blocks"][0]["attn"]["b_O"], expected, rtol=1e-5, atol=1e-6)


def test_processing_can_be_compiled_and_differentiated() -> None:
    cfg, params = make("ln")

    def norm_of_queries(tree: dict[str, Any]) -> jax.Array:
        return jnp.sum(process_weights(tree, cfg)[0]["blocks"][0]["attn"]["W_Q"] ** 2)

    gradient = jax.jit(jax.grad(norm_of_queries))(params)
    assert bool(jnp.any(gradient["blocks"][0]["ln1"]["w"] != 0))


def test_a_model_says_what_was_processed_and_why_the_rest_was_not() -> None:
    cfg, params = make("rms_offset_sandwich")
    model = HookedTransformer(cfg, params=params)
    assert model.processing["fold_ln"] == model.processing["center_unembed"] == "not applied"
    processed = model.process_weights(center_unembed=False)
    assert processed.processing["fold_ln"] == processed.processing["fold_value_biases"] == "applied"
    assert processed.processing["center_unembed"] == "not applied"
    assert "not layer norms" in processed.processing["center_writing_weights"]
    assert "rotated" in processed.processing["refactor_factored_attn_matrices"]
    assert processed.process_weights().processing["center_unembed"] == "applied"


@pytest.mark.parametrize(
    ("case", "step", "reason"),
    [
        ("ln_gated", "fold_ln", "gate has no bias"),
        ("ln_pre", "fold_ln", "no parameters"),
        ("no_norm", "fold_ln", "no norms"),
        ("ln_final_rms", "center_writing_weights", "final norm is an RMS norm"),
        ("ln_after_only", "center_writing_weights", "between the weights and the residual stream"),
        ("ln_soft_caps", "center_unembed", "soft cap"),
        ("ln_sinks", "fold_value_biases", "sinks"),
        ("ln_clipped", "fold_value_biases", "clipped"),
        ("ln_mqa", "refactor_factored_attn_matrices", "share one"),
        ("ln_sinks", "refactor_factored_attn_matrices", "sinks"),
    ],
)
def test_why_a_step_is_not_exact(case: str, step: str, reason: str) -> None:
    cfg, params = make(case)
    assert reason in HookedTransformer(cfg, params=params).process_weights().processing[step]


@pytest.mark.parametrize("case", ["ln", "ln_alibi_embedding_norm", "no_norm"])
def test_refactored_heads_compute_the_same_with_orthogonal_factors(case: str) -> None:
    cfg, params = make(case)
    new, new_cfg = process_weights(params, cfg, refactor_factored_attn_matrices=True)
    np.testing.assert_allclose(log_probs(new_cfg, new), log_probs(cfg, params), atol=1e-5, rtol=0)
    attn = new["blocks"][0]["attn"]
    for weight, bias in (("W_Q", "b_Q"), ("W_K", "b_K")):
        factor = np.concatenate([np.asarray(attn[weight])[:, 1], np.asarray(attn[bias])[1][None]])
        gram = factor.T @ factor
        np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-5)
        assert (np.diff(np.diag(gram)) <= 1e-5).all()
    np.testing.assert_allclose(np.asarray(attn["W_O"])[2] @ np.asarray(attn["W_O"])[2].T, np.eye(4), atol=1e-5)
    assert not np.any(np.asarray(attn["b_V"]))


def test_refactoring_a_head_wider_than_the_model() -> None:
    a, b = (jnp.asarray(np.random.default_rng(n).standard_normal((3, 5)), jnp.float32) for n in range(2))
    left, singular, right = product_svd(a, b)
    assert left.shape == right.shape == (3, 5)
    np.testing.assert_allclose((left * singular[None]) @ right.T, a @ b.T, atol=1e-5)


def test_refactoring_is_refused_where_it_is_not_exact() -> None:
    cfg, params = make("ln_rotary_parallel")
    with pytest.raises(ConfigError, match="rotated between W_Q and W_K"):
        process_weights(params, cfg, refactor_factored_attn_matrices=True)


def test_float64_parameters_stay_float64() -> None:
    with double_precision():
        cfg, params = make("ln", "float64")
        new, new_cfg = process_weights(params, cfg, refactor_factored_attn_matrices=True)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(new)} == {"float64"}
        np.testing.assert_allclose(log_probs(new_cfg, new), log_probs(cfg, params), atol=1e-12, rtol=0)
