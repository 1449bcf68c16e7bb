"""Gradients, directional derivatives and Hessian products at hook points: what they are, and where they work."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import close
from variants import TOKENS, build

from tljax import ActivationCache, Add, DerivativeCache, HookedTransformer, Scale, ZeroGradientWarning
from tljax.errors import InputError, UnknownHookError
from tljax.patching import KL, LogitDiff, LogProb, Loss, Normalized

Z1, STREAM = "blocks.1.attn.hook_z", "blocks.1.hook_resid_pre"
NAMES = ["hook_embed", "blocks.0.attn.hook_pattern", Z1, STREAM]
DIFFERENCE = LogitDiff([1, 4], 2)


def difference(logits: Any) -> Any:
    return logits[:, -1, jnp.asarray([1, 4])][jnp.arange(2), jnp.arange(2)] - logits[:, -1, 2]


def same(got: Any, expected: Any, atol: float = 1e-5) -> None:
    assert list(got) == list(expected)
    for name in expected:
        close(got[name], expected[name], atol=atol, message=name)


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    return build("gpt2")


@pytest.fixture(scope="module")
def llama() -> HookedTransformer:
    return build("llama")


def test_gradients_are_those_of_an_add(model: HookedTransformer) -> None:
    """Of each metric by name, in one forward pass; the activations are those of a plain run."""
    metrics = {"difference": DIFFERENCE, "loss": Loss(TOKENS), "mean": lambda logits: logits.mean()}
    value, cache, grads = model.run_with_grads(TOKENS, metrics, NAMES)
    logits, plain = model.run_with_cache(TOKENS, names_filter=NAMES)
    same(cache, plain)
    assert isinstance(cache, ActivationCache)
    for name, metric in metrics.items():
        close(value[name], metric(logits))
        assert isinstance(grads[name], DerivativeCache)
        assert list(grads[name]) == list(cache)[::-1]
        for point in NAMES:

            def total(add: Add, point: str = point, metric: Any = metric) -> Any:
                return metric(model.run_with_hooks(TOKENS, fwd_hooks=[(point, add)])).sum()

            expected = jax.grad(total)(Add(jnp.zeros(cache[point].shape))).value
            close(grads[name][point], expected, atol=1e-6, message=f"{name} at {point}")
    close(cache["z", 1] * grads["loss"]["z", 1], plain[Z1] * grads["loss"][Z1])


def test_one_position_or_all_logits(model: HookedTransformer) -> None:
    """A metric that says where it reads needs no other logits; its numbers are the same."""
    places = LogitDiff([1, 4], 2, pos=[-1, 3])
    scaled = Normalized(DIFFERENCE, 3.0, 1.0)
    cut = model.run_with_grads(TOKENS, {"last": DIFFERENCE, "places": places, "scaled": scaled}, NAMES)
    for name, metric in {"last": DIFFERENCE, "places": places, "scaled": scaled}.items():
        value, _, grads = model.run_with_grads(TOKENS, lambda logits, metric=metric: metric(logits), NAMES)
        close(cut.value[name], value)
        same(cut.grads[name], grads)
    close(cut.value["last"], difference(model(TOKENS)))


def test_each_prompt_has_its_own_gradient(llama: HookedTransformer) -> None:
    both = llama.run_with_grads(TOKENS, LogProb(3), NAMES)
    for row in range(2):
        alone = llama.run_with_grads(TOKENS[row], LogProb(3), NAMES, remove_batch_dim=True)
        same(alone.grads, both.grads.apply_slice_to_batch_dim(row))
        assert not alone.grads.has_batch_dim
    total = llama.run_with_grads(TOKENS, lambda logits: LogProb(3)(logits).sum(), NAMES)
    same(total.grads, both.grads)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_prompts(kind: str, side: str) -> None:
    """Positions count in the text, and padding, which no metric reads, has no gradient."""
    model, short = build(kind), TOKENS[1, :4]
    padding = np.zeros(2, np.int32)
    rows = [padding, short] if side == "left" else [short, padding]
    tokens = np.stack([TOKENS[0], np.concatenate(rows)])
    mask = np.ones((2, 6), bool)
    mask[1] = np.arange(6) >= 2 if side == "left" else np.arange(6) < 4
    metrics = {"last": LogProb(3), "loss": Loss(tokens)}
    _, cache, grads = model.run_with_grads(tokens, metrics, NAMES, attention_mask=mask)
    alone = model.run_with_grads(short, {"last": LogProb(3), "loss": Loss(short[None])}, NAMES)
    for name in metrics:
        same(grads[name].unpad(1), alone.grads[name])
        for point in ("hook_embed", Z1, STREAM):
            assert not np.asarray(grads[name][point])[~mask].any()
            assert np.asarray(grads[name][point]).any()
    same(cache.unpad(1), alone.cache)
    if side == "right":
        with pytest.raises(InputError, match=r"reads position 5 of prompt 1, where there is padding.*4 tokens"):
            model.run_with_grads(tokens, lambda logits: logits[:, -1, 3], NAMES, attention_mask=mask)
    last = model.run_with_grads(tokens, LogProb(3), NAMES, pos_slice=-1, attention_mask=mask).grads
    close(last[Z1][1], grads["last"].unpad(1)[Z1][0, -1:])
    moved = model.run_with_jvp(tokens, {STREAM: Add(np.arange(16.0), pos=-1)}, LogProb(3), Z1, attention_mask=mask)
    expected = grads["last"][STREAM] @ np.arange(16, dtype=np.float32)
    close(moved.tangent, expected[[0, 1], [5, 5 if side == "left" else 3]])


def test_under_jit_and_vmap(llama: HookedTransformer) -> None:
    plain = llama.run_with_grads(TOKENS, {"a": DIFFERENCE, "b": Loss(TOKENS)}, NAMES, remat=True)
    run = jax.jit(lambda model, tokens: model.run_with_grads(tokens, {"a": DIFFERENCE, "b": Loss(TOKENS)}, NAMES))
    value, _, grads = run(llama, TOKENS)
    for name in "ab":
        close(value[name], plain.value[name])
        same(grads[name], plain.grads[name])
    assert isinstance(grads["a"], DerivativeCache)
    each = jax.vmap(lambda tokens: llama.run_with_grads(tokens, LogProb(3), NAMES).grads)(TOKENS)
    whole = llama.run_with_grads(TOKENS, LogProb(3), NAMES).grads
    same({name: value[:, 0] for name, value in each.items()}, whole)
    direction = np.random.default_rng(0).standard_normal((5, 16)).astype(np.float32)
    along = jax.jit(jax.vmap(lambda one: llama.run_with_jvp(TOKENS, {STREAM: one}, LogProb(3), Z1).tangent))(direction)
    close(along, np.einsum("bpm,nm->nb", whole[STREAM], direction), atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "moe"])
def test_blocks_computed_again(kind: str) -> None:
    """The same numbers; between the passes only the streams between blocks are held."""
    deep = build(kind, n_layers=6, **({"moe_layers": (True,) * 6} if kind == "moe" else {}))
    held, found = {}, {}
    tokens = np.tile(TOKENS, (8, 2))

    def live() -> int:
        return sum({a.unsafe_buffer_pointer(): a.nbytes for a in jax.live_arrays()}.values())

    for remat in (False, True):
        before = live()

        def metric(logits: Any, before: int = before, remat: bool = remat) -> Any:
            held[remat] = live() - before
            return logits[:, -1, 1] - logits[:, -1, 2]

        found[remat] = np.asarray(deep.run_with_grads(tokens, metric, "hook_embed", remat=remat).grads["hook_embed"])
    close(found[True], found[False], atol=1e-4)
    assert held[True] < held[False] / 4, held


def test_half_precision(llama: HookedTransformer) -> None:
    """Gradients of a bfloat16 model are float32, finite, and point where the float32 model's do."""
    narrow = llama.to("bfloat16")
    for remat in (False, True):
        value, _, grads = narrow.run_with_grads(TOKENS, {"a": DIFFERENCE, "b": Loss(TOKENS)}, remat=remat)
        wide = llama.run_with_grads(TOKENS, {"a": DIFFERENCE, "b": Loss(TOKENS)}).grads
        for metric in value:
            for name, gradient in grads[metric].items():
                assert gradient.dtype == jnp.float32
                assert np.isfinite(gradient).all(), name
                a, b = np.ravel(gradient), np.ravel(wide[metric][name])
                assert a @ b > 0.98 * np.linalg.norm(a) * np.linalg.norm(b), name
    moved = narrow.run_with_jvp(TOKENS, {STREAM: np.ones(16)}, DIFFERENCE, Z1)
    assert moved.tangents[Z1].dtype == jnp.bfloat16
    assert np.isfinite(narrow.run_with_hvp(TOKENS, LogProb(1), {Z1: np.ones(8)}).products[Z1]).all()


def test_directions(model: HookedTransformer) -> None:
    """The change along directions is the gradient's product with them, and moves what comes after."""
    rng = np.random.default_rng(0)
    along = {("z", 1): rng.standard_normal((4, 8)), STREAM: Add(rng.standard_normal(16), pos=2)}
    value, tangent, _, tangents = model.run_with_jvp(TOKENS, along, DIFFERENCE, [STREAM, Z1, "resid_post1"])
    grads = model.run_with_grads(TOKENS, DIFFERENCE, [STREAM, Z1]).grads
    expected = np.einsum("bphd,hd->b", grads[Z1], along["z", 1]) + grads[STREAM][:, 2] @ along[STREAM].value
    close(value, difference(model(TOKENS)))
    close(tangent, expected, atol=1e-5)
    close(tangents[STREAM][:, 2], np.broadcast_to(along[STREAM].value, (2, 16)))
    assert not np.asarray(tangents[STREAM])[:, [0, 1, 3, 4, 5]].any()
    logits, change, _, everything = model.run_with_jvp(TOKENS, along)
    close(logits, model(TOKENS))
    close(change[:, -1, 1][0] - change[:, -1, 2][0], tangent[0], atol=1e-5)
    close(everything["resid_post", 1], tangents["resid_post", 1])
    assert len(everything) == len(model.run_with_cache(TOKENS)[1])


def test_backward_hooks_run_in_gradient_runs(model: HookedTransformer) -> None:
    """They see the gradient, change what earlier points get, and may return it in a tuple as PyTorch's do."""
    plain = model.run_with_grads(TOKENS, DIFFERENCE, ["hook_embed", STREAM]).grads
    seen = []

    def doubled(gradient: Any, hook: Any) -> Any:
        assert not isinstance(gradient, jax.core.Tracer)
        seen.append(hook.name)
        return (2 * gradient,)

    with model.hooks(bwd_hooks=[(STREAM, doubled)]) as hooked:
        by_function = hooked.run_with_grads(TOKENS, DIFFERENCE, ["hook_embed", STREAM], remat=True).grads
    by_data = model.add_hook(STREAM, Scale(2.0), dir="bwd").run_with_grads(TOKENS, DIFFERENCE, list(plain)[::-1]).grads
    assert seen == [STREAM]
    for found in (by_function, by_data):
        close(found["hook_embed"], 2 * plain["hook_embed"])
        close(found[STREAM], 2 * plain[STREAM])  # as the cache shows what forward hooks leave
    hooked = model.add_hook(STREAM, Scale(2.0), dir="bwd")
    _, cache = hooked.run_with_cache(TOKENS, return_type="loss", incl_bwd=True, names_filter="hook_embed")
    _, without = model.run_with_cache(TOKENS, return_type="loss", incl_bwd=True, names_filter="hook_embed")
    close(cache["hook_embed_grad"], 2 * without["hook_embed_grad"])
    along = {"hook_embed": np.arange(16.0)}
    close(hooked.run_with_jvp(TOKENS, along, DIFFERENCE, Z1).tangent,
          model.run_with_jvp(TOKENS, along, DIFFERENCE, Z1).tangent)  # fmt: skip


def test_points_whose_shape_depends_on_the_run(model: HookedTransformer) -> None:
    names = ["blocks.1.hook_attn_in", "blocks.1.ln1.hook_normalized"]
    grads = model.run_with_grads(TOKENS, DIFFERENCE, names).grads
    assert grads[names[1]].shape == (2, 6, 4, 16)
    stream = model.run_with_grads(TOKENS, DIFFERENCE, STREAM).grads[STREAM]
    direct = model.run_with_grads(TOKENS, DIFFERENCE, "blocks.1.hook_resid_mid").grads["resid_mid", 1]
    close(grads[names[0]].sum(2), stream - direct, atol=1e-5)  # what flows through attention
    with pytest.raises(InputError, match=r"ln1.hook_normalized has no gradient: it fires three times"):
        model.run_with_grads(TOKENS, DIFFERENCE, ["blocks.1.hook_q_input", names[1]])
    mixture = build("moe")
    indices = "blocks.1.mlp.hook_expert_indices"
    with pytest.raises(InputError, match=r"expert_indices has no gradient: it holds whole numbers"):
        mixture.run_with_grads(TOKENS, DIFFERENCE, indices)
    with pytest.raises(InputError, match=r"expert_indices holds whole numbers: nothing moves"):
        mixture.run_with_jvp(TOKENS, {indices: 1.0}, DIFFERENCE)
    grads = mixture.run_with_grads(TOKENS, DIFFERENCE, lambda name: "mlp" in name).grads
    with pytest.raises(UnknownHookError, match=r"not kept.*whole numbers have no derivative"):
        grads[indices]


def test_a_metric_without_a_slope(model: HookedTransformer) -> None:
    """KL of a run to itself, at the base: what is left of its gradient is rounding."""
    base = model(TOKENS)
    for metric in (KL(base), KL(base, pos=None), LogitDiff(3, 3), lambda logits: ((logits - base) ** 2).sum()):
        with pytest.warns(ZeroGradientWarning, match=r"does not change to first order.*compares the run with itself"):
            model.run_with_grads(TOKENS, metric, Z1)
    model.run_with_grads(TOKENS, {"far": KL(0.5 * base), "small": lambda logits: 1e-6 * logits[:, -1, 1]}, Z1)


def test_new_numbers_compile_nothing(llama: HookedTransformer, compilations: Any) -> None:
    def run(answer: int, tokens: np.ndarray, layer: int) -> None:
        llama.run_with_grads(tokens, LogitDiff(answer, 2), ("z", layer))
        llama.run_with_jvp(tokens, {("resid_mid", layer): np.full(16, answer)}, LogProb(answer), ("z", layer))

    run(1, TOKENS, 0)
    run(1, TOKENS, 1)
    before = compilations.count
    run(5, TOKENS[::-1].copy(), 0)
    run(7, TOKENS, 1)
    assert compilations.count == before
