"""Edge scores against gradients of masks, of split inputs and of writers, sums that they must have, and invariances."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kinds import KINDS, graph_of, model_of, pairs_of

from tljax import HookedTransformer, HookedTransformerConfig
from tljax.circuits import EdgeScores, ResidualGraph, edge_scores
from tljax.circuits.masked import masked_stream
from tljax.circuits.scores.gradients import Slopes, reader_slopes
from tljax.circuits.scores.integrated import Ends, points_of
from tljax.circuits.writers import writer_outputs, writer_points
from tljax.forward.forward import run_forward
from tljax.hooks.dictionary import HookDictionary, HookEntry
from tljax.hooks.interventions import Add, Replace
from tljax.modules.context import AttentionContext
from tljax.modules.stack import block_module
from tljax.patching import LogitDiff
from tljax.patching.metrics.reads import unembed
from tljax.text.batch import Batch
from tljax.text.inputs import prepare

METRIC = LogitDiff([3, 4, 5], [6, 7, 8])


def close(got: Any, wanted: Any, tolerance: float = 2e-5) -> None:
    """Within a share of the largest entry."""
    np.testing.assert_allclose(np.asarray(got), np.asarray(wanted), rtol=0, atol=tolerance * np.abs(wanted).max())


def metric_of(model: HookedTransformer, stream: jax.Array, batch: Batch) -> jax.Array:
    head = {name: model.params[name] for name in ("ln_final", "unembed") if name in model.params}
    return METRIC.in_text(batch.mask)(unembed(model.cfg, head, stream))


def written(model: HookedTransformer, graph: ResidualGraph, batch: Batch) -> jax.Array:
    _, cache = model.run_with_cache(batch, names_filter=list(writer_points(graph)))
    return writer_outputs(model.cfg, model.params, graph, cache.cache_dict)


def masked_metric(kind: str, clean: Batch, replacement: jax.Array, masks: Any) -> jax.Array:
    """Metric of circuits, ``[mask, batch]``, from masks ``[mask, batch or 1, writer, reader]``."""
    model, graph = model_of(kind), graph_of(kind)
    prepared = prepare(model.cfg, None, clean)
    context, masks = AttentionContext.of(prepared), jnp.asarray(masks)[:, :, None]
    streams = masked_stream(model.cfg, model.params, graph, prepared.value, context, masks, replacement)
    return jnp.stack([metric_of(model, stream, clean) for stream in streams])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_eap_is_the_gradient_of_masks_and_sums_to_that_of_writers(kind: str, padding: str) -> None:
    model, graph, (clean, corrupted) = model_of(kind), graph_of(kind), pairs_of(padding)
    scores = edge_scores(model, clean, corrupted, METRIC, graph=graph, reduce="none")
    replacement = written(model, graph, corrupted)
    present = np.ones((1, 3, *graph.shape), np.float32)
    gradient = jax.grad(lambda masks: masked_metric(kind, clean, replacement, masks).sum())(present)[0]
    close(scores.values, -gradient)
    close(scores.node_scores(), node_attribution(kind, clean, corrupted))
    ends = metric_of(model, jnp.stack([model.run_with_cache(b)[1]["resid_post", -1] for b in (clean,)])[0], clean)
    close(scores.baseline, ends)


def node_attribution(kind: str, clean: Batch, corrupted: Batch) -> np.ndarray:
    """Gradient times change at every writer's own output, ``[batch, writer]``."""
    model, graph = model_of(kind), graph_of(kind)
    names = list(writer_points(graph))
    runs = [model.run_with_cache(batch, names_filter=names)[1] for batch in (clean, corrupted)]

    def total(offsets: dict[str, jax.Array]) -> jax.Array:
        hooked = [(name, Add(offset)) for name, offset in offsets.items()]
        return METRIC.in_text(clean.mask)(model.run_with_hooks(clean, fwd_hooks=hooked)).sum()

    gradients = jax.grad(total)({name: jnp.zeros_like(runs[0][name]) for name in names})
    mask = np.asarray(clean.mask)[:, :, None]
    found = {name: gradients[name] * (runs[1][name] - runs[0][name]) for name in names}
    columns = []
    for name, product in found.items():
        if name.endswith("mlp_out") and kind == "mixtral":
            continue
        parts = product if product.ndim == 4 else product[:, :, None]
        columns.append(jnp.where(mask, parts.sum(axis=-1), 0).sum(axis=1))
    return np.concatenate(columns, axis=1)


def split_products(
    kind: str, clean: Batch, corrupted: Batch, edits: Mapping[str, Any]
) -> tuple[np.ndarray, dict[str, Any]]:
    """Changes of writers times gradients at separate inputs of all readers, as the reference computes them."""
    model, graph = model_of(kind), graph_of(kind)
    prepared = prepare(model.cfg, None, clean)
    points = {
        f"blocks.{layer}.hook_{letter}_input": (3, 7, heads, 32)
        for layer in range(2)
        for letter, heads in (("q", 4), ("k", graph.n_kv_heads), ("v", graph.n_kv_heads))
    } | {f"blocks.{layer}.hook_mlp_in": (3, 7, 32) for layer in range(2)}

    def total(offsets: dict[str, jax.Array]) -> jax.Array:
        entries = (*edits.items(), *((name, Add(offset)) for name, offset in offsets.items() if name != "final"))
        hooks = HookDictionary(entries=tuple(HookEntry(name, edit) for name, edit in entries))
        context = AttentionContext.of(prepared)
        final, _ = run_forward(model.cfg, model.params, prepared.value, context, hooks=hooks, stop=2)
        return metric_of(model, final + offsets["final"], clean).sum()

    zeros = {name: jnp.zeros(shape) for name, shape in (points | {"final": (3, 7, 32)}).items()}
    gradients = jax.grad(total)(zeros)
    parts = []
    for layer in range(2):
        parts += [gradients[f"blocks.{layer}.hook_{letter}_input"] for letter in "qkv"]
        parts.append(gradients[f"blocks.{layer}.hook_mlp_in"][:, :, None])
    readers = jnp.concatenate([*parts, gradients["final"][:, :, None]], axis=2)
    change = written(model, graph, corrupted) - written(model, graph, clean)
    return np.einsum("btfd,btrd->bfr", change, readers) * graph.edges, gradients


@pytest.mark.parametrize("method", ["eap-ig", "eap-ig-activations", "clean-corrupted"])
def test_paths_average_gradients_at_split_inputs(method: str) -> None:
    kind, (clean, corrupted), steps = "llama", pairs_of(), 2
    model, graph = model_of(kind), graph_of(kind)
    scores = edge_scores(
        model, clean, corrupted, METRIC, method, reduce="none", steps=None if method == "clean-corrupted" else steps
    )
    runs = [model.run_with_cache(batch)[1] for batch in (clean, corrupted)]
    outputs = [name for layer in range(2) for name in (f"blocks.{layer}.attn.hook_z", f"blocks.{layer}.hook_mlp_out")]
    places = {"eap-ig": (0.5, 1.0), "eap-ig-activations": (0.0, 0.5), "clean-corrupted": (0.0, 1.0)}[method]
    names = ["hook_embed", *(outputs if method == "eap-ig-activations" else ())]
    total: Any = 0.0
    for name in names:
        for place in places:
            value = runs[0][name] + place * (runs[1][name] - runs[0][name])
            total = total + split_products(kind, clean, corrupted, {name: Replace(value)})[0]
    close(scores.values, total / (len(names) * len(places)))
    assert graph.n_kv_heads == 2


@pytest.mark.parametrize("kind", ["gpt2", "gemma2"])
@pytest.mark.parametrize("ablation", ["patching", "zero"])
def test_scores_along_masks_add_up(kind: str, ablation: str) -> None:
    model, graph, (clean, corrupted) = model_of(kind), graph_of(kind), pairs_of("left")
    scores = edge_scores(
        model,
        clean,
        corrupted,
        METRIC,
        "mask-ig",
        ablation=ablation,
        graph=graph,
        steps=24,
        reduce="none",  # type: ignore[arg-type]
    )
    replacement = written(model, graph, corrupted) * np.float32(ablation == "patching")
    none, present = np.zeros((1, 1, *graph.shape)), np.ones((1, 1, *graph.shape))
    empty, full = (masked_metric(kind, clean, replacement, masks)[0] for masks in (none, present))
    close(scores.values.sum(axis=(1, 2)), empty - full, 2e-4)
    both = edge_scores(
        model, clean, corrupted, METRIC, "mask-ig", ablation=ablation, graph=graph, steps=2, grid="both", reduce="none"  # type: ignore[arg-type]
    )  # fmt: skip

    def at(place: float) -> jax.Array:
        masks = jnp.full((1, 3, *graph.shape), 1 - place)
        return -jax.grad(lambda masks: masked_metric(kind, clean, replacement, masks).sum())(masks)[0]

    close(both.values, sum(at(place) for place in (0.0, 0.5, 1.0)) / 3)


def test_completeness_and_tolerance() -> None:
    model, (clean, corrupted) = model_of("llama"), pairs_of("right")
    coarse = edge_scores(model, clean, corrupted, METRIC, "eap-ig")
    fine = edge_scores(model, clean, corrupted, METRIC, "eap-ig", tolerance=1e-4)
    assert coarse.completeness_error > 10 * fine.completeness_error
    assert fine.completeness_error <= 1e-4
    assert fine.convention.grid == "gauss"
    assert fine.convention.steps >= 4
    effect = fine.source_metric - fine.baseline
    close(fine.values[0].sum(), effect, 1e-3)


def test_estimate_is_exact_where_the_model_is_linear() -> None:
    cfg = HookedTransformerConfig(
        d_model=8, n_heads=2, n_layers=2, n_ctx=4, d_vocab=12, attn_only=True, normalization_type=None, seed=1
    )
    model = HookedTransformer(cfg)
    blocks = [
        {**block, "attn": {**block["attn"], "W_Q": 0 * block["attn"]["W_Q"], "W_K": 0 * block["attn"]["W_K"]}}
        for block in model.params["blocks"]
    ]
    model = model.replace(params={**model.params, "blocks": type(model.params["blocks"])(blocks)})
    graph, metric = ResidualGraph.of(model), LogitDiff([3, 4], [5, 6])
    clean, corrupted = np.array([[1, 2, 3], [4, 5, 6]]), np.array([[1, 7, 3], [8, 5, 6]])
    scores = edge_scores(model, clean, corrupted, metric, reduce="none")
    _, cache = model.run_with_cache(corrupted)
    replacement = writer_outputs(cfg, model.params, graph, cache.cache_dict)
    edges = np.argwhere(graph.edges)
    masks = np.ones((len(edges), 1, 1, *graph.shape), np.float32)
    masks[np.arange(len(edges)), 0, 0, edges[:, 0], edges[:, 1]] = 0
    streams = masked_stream(cfg, model.params, graph, clean, AttentionContext(), masks, replacement)
    exact = jnp.stack([metric(unembed(cfg, {"unembed": model.params["unembed"]}, one)) for one in streams])
    close(scores.values[:, edges[:, 0], edges[:, 1]].T, exact - scores.baseline[None])
    for method in ("eap-ig", "mask-ig"):
        close(
            edge_scores(model, clean, corrupted, metric, method, reduce="none").values[:, 0, -1],
            scores.values[:, 0, -1],
        )


@functools.cache
def by_position(padding: str, size: Any = "auto") -> EdgeScores:
    return edge_scores(
        model_of("gpt2"), *pairs_of(padding), METRIC, axes=("pos",), reduce="none", batch_size=size
    )  # fmt: skip


def test_neither_batches_nor_padding_nor_parts_change_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    right = by_position("right")
    model, (clean, corrupted) = model_of("gpt2"), pairs_of("right")
    close(by_position("left").values, right.values)
    close(by_position("right", 2).values, right.values)
    assert right.sizes["pos"] == 7
    assert not right.values[0, 5:].any()
    mean = edge_scores(model, clean, corrupted, METRIC)
    close(right.sum_positions().mean().values, mean.values)
    whole_batch = METRIC.in_text(clean.mask)
    for metric in (whole_batch, lambda logits: whole_batch(logits).mean()):
        close(
            edge_scores(model, clean, corrupted, lambda logits, m=metric: m(logits), batch_size=2).values, mean.values
        )
    monkeypatch.setattr("tljax.memory.WORKING_BYTES", 4 * 1500 * 3)  # three tokens at a time
    close(edge_scores(model, clean, corrupted, METRIC).values, mean.values)
    flow = edge_scores(model, clean, method="information-flow", axes=("pos",))
    close(flow.sum_positions().values[:, -1].sum(), 1.0)


def test_an_alignment_puts_source_tokens_where_it_says() -> None:
    model, (clean, corrupted) = model_of("llama"), pairs_of()
    plain = edge_scores(model, clean, corrupted, METRIC, reduce="none")
    identity = np.broadcast_to(np.arange(7), (3, 7))
    close(edge_scores(model, clean, corrupted, METRIC, align=identity, reduce="none").values, plain.values)
    longer = np.concatenate([np.asarray(corrupted.tokens), np.full((3, 1), 9)], axis=1)
    close(edge_scores(model, clean, longer, METRIC, align=identity, reduce="none").values, plain.values)
    kept = np.where(identity == 2, -1, identity)
    scores = edge_scores(model, clean, longer, METRIC, align=kept, axes=("pos",), reduce="none")
    assert not scores.values[:, 2].any()
    assert scores.values[:, 3].any()


def test_gradients_at_layer_norms_are_orthogonal_to_ones() -> None:
    model = model_of("gpt2")
    rng = np.random.default_rng(0)
    stream = jnp.asarray(rng.normal(size=(1, 3, 32)), jnp.float32)
    slopes = Slopes(*(jnp.asarray(rng.normal(size=(1, 3, 4, 8)), jnp.float32) for _ in "qkv"), None)
    found = reader_slopes(block_module(model.cfg, 0), model.params["blocks"][0], stream, AttentionContext(), slopes)
    assert found.shape == (12, 1, 3, 32)
    assert float(jnp.abs(found).max()) > 0.1
    assert float(jnp.abs(found.sum(axis=-1)).max()) < 1e-4


def test_grouped_scores_are_sums_of_ungrouped_ones() -> None:
    model, graph, (clean, corrupted) = model_of("llama"), graph_of("llama"), pairs_of()
    native = edge_scores(model, clean, corrupted, METRIC)
    ungrouped = edge_scores(model.set_ungroup_grouped_query_attention(True), clean, corrupted, METRIC)
    assert ungrouped.graph == graph.ungrouped
    close(graph.group(ungrouped.values), native.values)
    mask = graph.mask(["input->a1.kv1<k>", "m0->a1.h2<q>"])
    wanted = ["input->a1.h2<k>", "input->a1.h3<k>", "m0->a1.h2<q>"]
    assert (graph.ungroup(mask) == graph.ungrouped.mask(wanted)).all()


def test_statistics_over_prompts() -> None:
    right = by_position("right").sum_positions()
    values = np.asarray(right.values)
    low, high = right.bootstrap_ci(n_resamples=50)
    inside = (low <= right.mean().values + 1e-6) & (right.mean().values <= high + 1e-6)
    assert inside.all()
    assert (np.asarray(low) >= values.min(axis=0) - 1e-6).all()
    stable = np.asarray(right.sign_stability())[right.graph.edges]
    assert stable.min() >= 1 / 3
    assert stable.max() == 1
    name, value = right.top(1, by="lowers")[0]
    assert value == pytest.approx(values.mean(axis=0)[right.graph.edges].min())
    assert right[name].shape == (3,)
    assert right.top(1)[0][1] == pytest.approx(right.mean().values.ravel()[np.abs(right.mean().values).argmax()])
    assert right.rank_correlation(right) == pytest.approx(1.0)
    flipped = dataclasses.replace(right, values=-right.values)
    assert right.rank_correlation(flipped) == pytest.approx(-1.0)
    close(jax.tree.map(lambda leaf: 2 * leaf, right).values, 2 * values)
    assert "gradient at the base run" in repr(right)
    assert "patched minus baseline" in repr(right)
    np.testing.assert_allclose(points_of("gauss", 3)[1].sum(), 1.0)


def test_runs_along_a_path_may_share_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (clean, corrupted) = model_of("llama"), pairs_of("left")

    def scores(at_once: int) -> Any:
        monkeypatch.setattr(Ends, "runs_at_once", at_once)
        return edge_scores(model, clean, corrupted, METRIC, "eap-ig", steps=5, axes=("pos",), reduce="none").values

    together = scores(3)
    close(together, scores(1))
