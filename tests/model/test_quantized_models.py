"""Models whose matrices are held in eight or four bits: the same numbers as the floats that the codes stand for."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from variants import build

from tljax import Add, HookedTransformer
from tljax.analysis import logit_lens
from tljax.circuits import edge_scores
from tljax.errors import QuantizationError
from tljax.fingerprint import fingerprint_of
from tljax.patching import LogitDiff, path_patch, sweep
from tljax.quantized_weight import QuantizedWeight

TOKENS = np.random.default_rng(1).integers(0, 13, (2, 6)).astype(np.int32)
OTHER = np.random.default_rng(2).integers(0, 13, (2, 6)).astype(np.int32)
METRIC = LogitDiff([1, 2], [3, 4])


def close(one: Any, other: Any) -> None:
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=2e-6, rtol=1e-5), one, other
    )


def brute(weight: np.ndarray, levels: int, group: int) -> np.ndarray:
    """A matrix ``[in, out]`` rounded weight by weight, in float64."""
    rounded = np.zeros(weight.shape)
    for start in range(0, weight.shape[0], group):
        for column in range(weight.shape[1]):
            run = weight[start : start + group, column].astype(np.float64)
            scale = np.abs(run).max() / (levels - 0.5)
            for row, number in enumerate(run):
                rounded[start + row, column] = min(max(round(number / scale), -levels), levels - 1) * scale
    return rounded


@pytest.mark.parametrize(("bits", "group", "levels"), [("int8", None, 128), ("int8", 8, 128), ("int4", 8, 8)])
def test_weights_are_rounded_to_the_nearest_code(bits: str, group: int | None, levels: int) -> None:
    model = build("gpt2")
    block, rounded = (m.params["blocks"][1] for m in (model, model.quantize(bits, group_size=group)))
    for part, name, whole in (("mlp", "W_in", 16), ("attn", "W_Q", 16), ("attn", "W_O", 32)):
        matrix = np.asarray(block[part][name])
        flat = matrix.reshape(-1, matrix.shape[-1]) if name == "W_O" else matrix.reshape(len(matrix), -1)
        expected = brute(flat, levels, group or whole).reshape(matrix.shape)
        got = np.asarray(rounded[part][name].dequantized())
        # the largest of a group lies halfway between two codes: either is right
        step = np.abs(matrix).max() / (levels - 0.5)
        apart = np.abs(got - expected)
        assert (apart > 1e-6).mean() < 0.2
        assert apart.max() <= step * 1.01
        assert np.abs(np.abs(got - matrix) - np.abs(expected - matrix)).max() < 1e-6


@pytest.mark.parametrize(("variant", "bits"), [("gpt2", "int8"), ("latent", "int4"), ("moe", "int4"), ("moe", "int8")])
def test_every_activation_is_that_of_the_floats(variant: str, bits: str) -> None:
    model = build(variant).quantize(bits)
    floats = model.dequantize()
    assert model.is_quantized
    assert not floats.is_quantized
    for block in model.params["blocks"]:
        held = {name for part in (block["attn"], block["mlp"]) for name, leaf in part.items()
                if isinstance(leaf, QuantizedWeight)}  # fmt: skip
        assert "W_O" in held
        assert "W_router" not in held
    (logits, cache), (expected, all_expected) = model.run_with_cache(TOKENS), floats.run_with_cache(TOKENS)
    close(logits, expected)
    close(dict(cache.items()), dict(all_expected.items()))
    assert model.n_params_total == floats.n_params_total
    assert model.nbytes < floats.nbytes


@pytest.fixture(scope="module")
def pair() -> tuple[HookedTransformer, HookedTransformer]:
    model = build("llama").quantize("int4", group_size=8)
    return model, model.dequantize()


def test_experiments_give_what_the_floats_give(pair: tuple[HookedTransformer, HookedTransformer]) -> None:
    def run(model: HookedTransformer) -> Any:
        _, cache = model.run_with_cache(TOKENS, incl_bwd=True, return_type="loss")
        steered = model.add_hook("resid_pre1", Add(jnp.ones(16)))
        return {
            "backward": dict(cache.items()),
            "steered": steered(TOKENS),
            "sweep": sweep(model, TOKENS, OTHER, METRIC, "resid_pre", progress=False).values,
            "paths": path_patch(model, TOKENS, OTHER, METRIC, "logits", progress=False).values,
            "edges": edge_scores(model, TOKENS, OTHER, METRIC, progress=False).values,
            "lens": logit_lens(model, TOKENS).entropy,
            "parts": cache.decompose_resid(return_labels=False),
            "by head": cache.stack_head_results(),
            "neurons": cache.stack_neuron_results(-1),
            "weights": (model.W_Q, model.W_K, model.W_O, model.W_out, model.OV.AB, model.blocks[0].mlp.W_gate),
            "view": model.blocks[0].mlp(jnp.ones((1, 2, 16))),
        }

    model, floats = pair
    close(run(model), run(floats))


def test_generation_gives_the_floats_tokens(pair: tuple[HookedTransformer, HookedTransformer]) -> None:
    options: Any = {"max_new_tokens": 4, "do_sample": False, "verbose": False, "stop_at_eos": False}
    np.testing.assert_array_equal(*(model.generate(TOKENS[:1], **options) for model in pair))


def test_a_loop_over_the_whole_model_holds_the_floats_of_one_block() -> None:
    model = build("gpt2", n_layers=6, d_model=64, d_mlp=256).quantize("int8")

    def greedy(model: HookedTransformer, tokens: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 3, lambda _, written: model(written).argmax(-1).astype(jnp.int32), tokens)

    compiled = jax.jit(greedy).lower(model, jnp.asarray(TOKENS)).compile()
    floats = sum(leaf.nbytes for leaf in jax.tree.leaves(model.dequantize().params["blocks"]))
    assert compiled.memory_analysis().temp_size_in_bytes < floats / 2
    np.testing.assert_array_equal(compiled(model, jnp.asarray(TOKENS)), greedy(model.dequantize(), jnp.asarray(TOKENS)))


def test_derivatives_are_with_respect_to_activations_alone(pair: tuple[HookedTransformer, HookedTransformer]) -> None:
    def loss(vector: jax.Array, model: HookedTransformer) -> jax.Array:
        return model.add_hook("resid_pre1", Add(vector))(TOKENS, return_type="loss")

    model, floats = pair
    close(jax.grad(loss)(jnp.ones(16), model), jax.grad(loss)(jnp.ones(16), floats))
    with pytest.raises(QuantizationError, match=r"derivative with respect to a quantised weight .* model.dequantize"):
        jax.grad(loss, argnums=1, allow_int=True)(jnp.ones(16), model)


def test_the_dtype_changes_the_floats_alone(pair: tuple[HookedTransformer, HookedTransformer]) -> None:
    model, floats = pair
    half = model.to("bfloat16")
    close(half(TOKENS).astype("float32"), floats.to("bfloat16")(TOKENS).astype("float32"))
    held = half.params["blocks"][0]["mlp"]["W_in"]
    assert held.dtype == "bfloat16"
    assert held.scale.dtype == "float32"


def test_a_fingerprint_is_that_of_the_rounded_weights(pair: tuple[HookedTransformer, HookedTransformer]) -> None:
    model, floats = pair
    assert fingerprint_of(model).differences(fingerprint_of(floats)) == ()
    assert fingerprint_of(model).differences(fingerprint_of(build("llama"))) == ("the weights are other numbers",)


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_short_groups_are_saved_and_loaded_too(bits: str, tmp_path: Path) -> None:
    model = build("moe").quantize(bits)
    model.save_pretrained(tmp_path)
    again = HookedTransformer.from_pretrained_no_processing(tmp_path)
    assert jax.tree.structure(again.params) == jax.tree.structure(model.params)
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)


def test_floats_may_be_made_under_a_trace(pair: tuple[HookedTransformer, HookedTransformer]) -> None:
    model, floats = pair
    close(jax.jit(lambda one: one.dequantize().W_O)(model), floats.W_O)


def test_models_stack_for_vmap(pair: tuple[HookedTransformer, HookedTransformer]) -> None:
    model, _ = pair
    both = jax.tree.map(lambda one, other: jnp.stack([one, other]), model, model)
    close(jax.vmap(lambda one: one(TOKENS))(both)[1], model(TOKENS))


def test_one_experts_floats_exist_at_a_time() -> None:
    """A block with experts needs less memory while it runs than the floats of all its experts."""
    model = build("moe", d_model=64, d_expert=256, num_experts=16).quantize("int8")
    experts = model.params["blocks"][1]["mlp"]["experts"]
    floats = sum(4 * leaf.size for leaf in jax.tree.leaves(experts, is_leaf=lambda x: isinstance(x, QuantizedWeight)))
    run = jax.jit(lambda model: model(TOKENS[:1, :2])).lower(model).compile()
    analysis = run.memory_analysis()
    assert analysis is not None
    assert analysis.temp_size_in_bytes < floats / 3
