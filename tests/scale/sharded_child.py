"""What a child process with eight fake CPU devices computes, on one device and on a mesh; prints one JSON line.

Each function of ``CHECKS`` takes a model and returns arrays; it is called with a model on one device and with the same
model on a mesh. ``ON_MESH`` are claims about where things lie, which raise where they do not hold.
"""

import json
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import monitoring
from jax.sharding import PartitionSpec as P
from variants import build

import tljax
from tljax import HookedTransformer, Zero
from tljax.analysis import logit_lens
from tljax.circuits import Circuit, ResidualGraph, edge_scores, faithfulness, select
from tljax.dictionaries import Dictionary, DictionaryConfig
from tljax.errors import ShardingError
from tljax.forward import stages
from tljax.harvest import harvest
from tljax.patching import LogitDiff, ablation_sweep, path_patch, sweep
from tljax.scale import ShardingRules, make_mesh

TOKENS = np.random.default_rng(1).integers(0, 16, (4, 6)).astype(np.int32)
OTHER = np.random.default_rng(2).integers(0, 16, (4, 6)).astype(np.int32)
METRIC = LogitDiff(np.arange(4), np.arange(4, 8))
POINT = "blocks.1.hook_resid_pre"
DRAWN = build("llama", n_heads=8, d_vocab=16, n_layers=2, original_architecture="LlamaForCausalLM")
MODEL = DRAWN.replace(
    params=jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * 0 if path[-1].key.startswith("b_") else leaf, DRAWN.params
    )
)  # Llama has no biases, and save_hf refuses them
RULES = ShardingRules.tensor_parallel() | ShardingRules.data_parallel()
COMPILED: list[str] = []
"""An entry for each program that was compiled."""
BOTH = ShardingRules.tensor_parallel() | ShardingRules.fsdp()


def everything(model: HookedTransformer) -> Any:
    logits, cache = model.run_with_cache(TOKENS)
    return logits, dict(cache.items()), model(TOKENS, return_type="loss")


def a_padded_batch(model: HookedTransformer) -> Any:
    return model(tljax.Batch.from_rows([list(row[: 3 + number]) for number, row in enumerate(TOKENS)]))[:, -1]


def interventions(model: HookedTransformer) -> Any:
    return model.run_with_hooks(TOKENS, fwd_hooks=[("z0", Zero(head=3, pos=2)), ("k1", Zero(head=1))])


def python_hooks(model: HookedTransformer) -> Any:
    seen = []
    hooks = [("z0", lambda x, hook: x.at[:, 2, 3].set(0)), ("resid_post1", lambda x, hook: seen.append(np.asarray(x)))]
    return model.run_with_hooks(TOKENS, fwd_hooks=hooks), seen[0]


def a_sweep(model: HookedTransformer) -> Any:
    return sweep(model, TOKENS, OTHER, METRIC, "resid_pre", reduce="none", progress=False).values


def sweeps_of_other_kinds(model: HookedTransformer) -> Any:
    """Attention patterns, which are patched by row; a metric in Python; few runs at once; prompts of two lengths."""

    def last_logits(logits: Any) -> Any:
        return logits[:, 3, 3] - logits[:, 3].max(axis=-1)

    patterns = sweep(model, TOKENS, OTHER, METRIC, "pattern", ("head",), layers=1, max_batch=3, progress=False)
    padded = tljax.Batch.from_rows([list(TOKENS[0]), list(TOKENS[1, :4])])
    heads = ablation_sweep(model, padded, last_logits, "z", ("head",), reduce="none", progress=False)
    return patterns.values, heads.values


def an_estimate(model: HookedTransformer) -> Any:
    return sweep(model, TOKENS, OTHER, METRIC, "z", ("head", "pos"), method="attribution", progress=False).values


def paths(model: HookedTransformer) -> Any:
    to_heads = path_patch(model, TOKENS, OTHER, METRIC, [("q", 1, 2), ("v", 1)], layers=0, progress=False)
    return path_patch(model, TOKENS, OTHER, METRIC, "logits", progress=False).values, to_heads.values


def generation(model: HookedTransformer) -> Any:
    one = model.generate(TOKENS[:1], max_new_tokens=4, do_sample=False, verbose=False, stop_at_eos=False)
    many = model.generate(TOKENS, max_new_tokens=4, do_sample=False, verbose=False, stop_at_eos=False)
    return one, many


def gradients(model: HookedTransformer) -> Any:
    def loss(model: HookedTransformer) -> Any:
        return model(TOKENS, return_type="loss")

    cache = model.run_with_cache(TOKENS, incl_bwd=True, names_filter=["z0", "resid_pre1"], return_type="loss")[1]
    return jax.jit(jax.grad(loss))(model).params, dict(cache.items())


def circuits(model: HookedTransformer) -> Any:
    graph = ResidualGraph.of(model)
    kept = select(np.random.default_rng(0).normal(size=graph.shape), graph, fraction=0.5)
    scores = edge_scores(model, TOKENS, OTHER, METRIC, progress=False)
    return scores.values, faithfulness(model, Circuit(kept, graph), TOKENS, OTHER, METRIC).values


def a_dictionary() -> Dictionary:
    rng = np.random.default_rng(4)
    shapes = {"W_enc": (16, 32), "b_enc": (32,), "W_dec": (32, 16), "b_dec": (16,)}
    params = {name: rng.normal(size=shape).astype(np.float32) / 4 for name, shape in shapes.items()}
    return Dictionary(params, DictionaryConfig(d_in=16, d_sae=32))


def dictionaries(model: HookedTransformer) -> Any:
    spliced = model.with_dictionaries({POINT: a_dictionary()})
    logits, cache = spliced.run_with_cache(TOKENS)
    return logits, cache[f"{POINT}.hook_sae_acts_post"], a_sweep_of_features(spliced)


def a_sweep_of_features(model: HookedTransformer) -> Any:
    name = f"{POINT}.hook_sae_acts_post"
    at = {"feature": [1, 2]}
    return sweep(model, TOKENS, OTHER, METRIC, name, ("feature",), at=at, reduce="none", progress=False).values


def a_harvest(model: HookedTransformer) -> Any:
    with tempfile.TemporaryDirectory() as directory:
        store = harvest(model, TOKENS, [POINT], directory, batch_size=2, dtype="float32", progress=False)
        return np.asarray(store[POINT][:])


def a_lens(model: HookedTransformer) -> Any:
    return logit_lens(model, TOKENS, targets=[3, 7]).target_log_probs


def processing(model: HookedTransformer) -> Any:
    processed = model.process_weights()
    assert processed.mesh == model.mesh
    return processed(TOKENS)


def a_native_checkpoint(model: HookedTransformer) -> Any:
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        again = HookedTransformer.from_pretrained_no_processing(directory, mesh=model.mesh)
        where(again, model)
        return again.params


def a_hugging_face_checkpoint(model: HookedTransformer) -> Any:
    with tempfile.TemporaryDirectory() as directory:
        model.save_hf(directory)
        again = HookedTransformer.from_pretrained(directory, mesh=model.mesh)
        where(again, model)
        return again.params, again(TOKENS)


def in_four_bits(model: HookedTransformer) -> Any:
    small = model.quantize("int4", group_size=8)
    with tempfile.TemporaryDirectory() as directory:
        small.save_pretrained(directory)
        again = HookedTransformer.from_pretrained_no_processing(directory, mesh=model.mesh)
        where(again, small)
    table = small.sharding_table()
    if model.mesh is not None:
        assert table["blocks.0.attn.W_Q"].spec == table["blocks.0.attn.W_Q.scale"].spec == P(None, "model", None)
        assert table["blocks.0.mlp.W_out"].spec == P("model", None)
    rows = sweep(small, TOKENS, OTHER, METRIC, "resid_pre", reduce="none", progress=False).values
    one = small.generate(TOKENS[:1], max_new_tokens=2, do_sample=False, verbose=False, stop_at_eos=False)
    return small(TOKENS), again.params, rows, one, small.dequantize().params


def under_transformations(model: HookedTransformer) -> Any:
    return jax.jit(lambda m, tokens: m(tokens))(model, TOKENS), jax.vmap(lambda row: model(row[None]))(TOKENS)


def where(again: HookedTransformer, model: HookedTransformer) -> None:
    """Both lie alike."""
    assert again.mesh == model.mesh
    if model.mesh is not None:
        own, theirs = again.sharding_table(), model.sharding_table()
        assert {path: own[path].spec for path in own} == {path: theirs[path].spec for path in own}


CHECKS: dict[str, Callable[[HookedTransformer], Any]] = {
    one.__name__: one
    for one in (
        everything, a_padded_batch, interventions, python_hooks, a_sweep, sweeps_of_other_kinds, an_estimate, paths,
        generation, gradients, circuits, dictionaries, a_harvest, a_lens, processing, a_native_checkpoint,
        a_hugging_face_checkpoint, in_four_bits, under_transformations,
    )
}  # fmt: skip


COMPILES_ITS_OWN = {"gradients": 1, "under_transformations": 1}
"""Groups that give JAX a new function to compile at each call."""


def part(array: jax.Array) -> tuple[int, ...]:
    """The shape of what one device holds."""
    return array.sharding.shard_shape(array.shape)


def activations_follow(sharded: HookedTransformer) -> None:
    """Heads and neurons over "model", prompts over "data", two key/value heads on all four."""
    logits, cache = sharded.run_with_cache(TOKENS)
    held = {name: part(cache[name]) for name in ("z0", "post1", "pattern0", "resid_post1")}
    assert held == {"z0": (2, 6, 2, 8), "post1": (2, 6, 16), "pattern0": (2, 2, 6, 6), "resid_post1": (2, 6, 16)}
    assert part(logits)[0] == 2
    table = sharded.sharding_table()
    assert table["blocks.0.attn.W_K"].why == "n_kv=2 does not divide by model=4"
    assert table["blocks.0.attn.W_Q"].spec == P(None, "model", None)
    spliced = sharded.with_dictionaries({POINT: a_dictionary()})
    assert spliced.dictionaries[POINT].W_dec.sharding.spec[0] == "model"
    acts = spliced.run_with_cache(TOKENS)[1][f"{POINT}.hook_sae_acts_post"]
    assert part(acts) == (2, 6, 8)
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(sharded.params))
    assert held == table.bytes_per_device


def fully_sharded(_: HookedTransformer) -> None:
    """Every matrix is split eight ways, prompts stay over "data", and the numbers are those of one device."""
    model = MODEL.shard(make_mesh(data=2, model=4), BOTH)
    logits, cache = model.run_with_cache(TOKENS)
    np.testing.assert_allclose(logits, MODEL(TOKENS), atol=2e-5)
    assert model.params["blocks"][0]["attn"]["W_Q"].addressable_shards[0].data.size * 8 == 16 * 8 * 8
    assert all(part(cache[name])[0] == 2 for name in ("z0", "resid_post1", "post1"))
    assert not model.sharding_table(BOTH)["blocks.1.mlp.W_in"].why


def sites_are_divided(sharded: HookedTransformer) -> None:
    """Each device does an eighth of a sweep's work: every group of "data" its own sites, by heads and neurons."""
    done, seen = dict[str, float](), []
    apply = stages._apply_compiled

    def counted(label: str) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            out = apply(*arguments)
            if arguments[-1][1].packing is not None:
                work = apply.lower(*arguments).compile().cost_analysis()["flops"]  # one device's
                done[label] = done.get(label, 0) + work
                seen.append((label, out[0].shape[0], part(out[0])[0]))
            return out

        return run

    tokens, other = (np.tile(rows, (1, 2)) for rows in (TOKENS, OTHER))
    try:
        for label, model in (("one", MODEL), ("mesh", sharded)):
            stages._apply_compiled = counted(label)
            sweep(model, tokens, other, METRIC, "resid_pre", progress=False)
    finally:
        stages._apply_compiled = apply
    assert done["mesh"] < 1.3 * done["one"] / 8, done  # shorter arrays are padded a little more; keys are on all four
    assert {one[1:] for one in seen if one[0] == "mesh"} == {(2, 1)}, seen


def programs_are_shared(sharded: HookedTransformer) -> None:
    """A second layer, another head, other prompts and other sites compile nothing; nor does a mesh compile more."""
    sharded.run_with_hooks(TOKENS, fwd_hooks=[("z0", Zero(head=3, pos=2))])
    before = len(COMPILED)
    sharded.run_with_hooks(OTHER, fwd_hooks=[("z1", Zero(head=2, pos=1))])
    assert len(COMPILED) == before
    counts = []
    new = build("llama", n_heads=8, d_vocab=16, n_layers=3, d_model=24, original_architecture="LlamaForCausalLM")
    for model in (new, new.shard(sharded.mesh, RULES)):
        before = len(COMPILED)
        a_sweep(model)
        counts.append(len(COMPILED) - before)
        sweep(model, OTHER, TOKENS, METRIC, "resid_pre", reduce="none", progress=False)
        assert len(COMPILED) == before + counts[-1]
    assert counts[1] <= counts[0], counts


def positions_are_divided(_: HookedTransformer) -> None:
    """Four devices do a quarter of a long prompt each, attention by blocks included."""
    cfg = tljax.HookedTransformerConfig(
        d_model=16, n_heads=2, n_layers=1, n_ctx=512, d_vocab=16, act_fn="gelu", positional_embedding_type="rotary"
    )
    model, tokens = HookedTransformer(cfg), np.random.default_rng(0).integers(0, 16, (1, 512)).astype(np.int32)
    spread = model.shard(make_mesh(pos=4))
    logits, cache = spread.run_with_cache(tokens, names_filter=["resid_post0"])
    np.testing.assert_allclose(logits, model(tokens), atol=2e-5)
    assert part(cache["resid_post0"]) == (1, 128, 16)
    explicit = jax.make_mesh((4,), ("pos",), axis_types=(jax.sharding.AxisType.Explicit,))
    with pytest.raises(ShardingError, match=r"Explicit"):
        spread(jax.device_put(tokens, jax.sharding.NamedSharding(explicit, P(None, "pos"))))

    def work(one: HookedTransformer, given: Any) -> float:
        run = jax.jit(lambda params, value: one.replace(params=params)(value, stop_at_layer=1))
        return run.lower(one.params, given).compile().cost_analysis()["flops"]

    over = jax.device_put(tokens, jax.sharding.NamedSharding(spread.mesh, P(None, "pos")))
    np.testing.assert_allclose(spread(over, return_type="loss"), model(tokens, return_type="loss"), atol=2e-5)
    assert work(spread, over) < 0.3 * work(model, tokens)


def other_devices(sharded: HookedTransformer) -> None:
    """An input on other devices is refused in words; one on a single device is taken."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
    there = jax.device_put(TOKENS, jax.sharding.NamedSharding(mesh, P("data")))
    with pytest.raises(ShardingError, match=r"model\.mesh"):
        sharded(there)
    np.testing.assert_allclose(sharded(TOKENS[:3]), MODEL(TOKENS[:3]), atol=2e-5)  # three prompts over two groups
    fourth = jax.device_put(TOKENS, jax.devices()[3])
    np.testing.assert_allclose(sharded(fourth), sharded(jnp.asarray(TOKENS)), atol=2e-5)


def devices_counted(_: HookedTransformer) -> None:
    """``n_devices`` makes a mesh, and reads each device's part."""
    model, plain = (HookedTransformer.from_pretrained("tljax-tiny", **one) for one in ({"n_devices": 4}, {}))
    assert dict(model.mesh.shape) == {"model": 4}
    assert model.params["blocks"][0]["mlp"]["W_in"].addressable_shards[0].data.size * 4 == plain.blocks[0].mlp.W_in.size
    np.testing.assert_allclose(model("one two"), plain("one two"), atol=2e-5)
    assert model.to("cpu:2").mesh is None


ON_MESH: dict[str, Callable[[HookedTransformer], None]] = {
    one.__name__: one
    for one in (
        activations_follow,
        fully_sharded,
        sites_are_divided,
        programs_are_shared,
        positions_are_divided,
        other_devices,
        devices_counted,
    )
}


def farthest(one: Any, other: Any) -> float:
    """The largest absolute difference between two trees of arrays; infinite where they are not alike."""
    ones, others = jax.tree.leaves(one), jax.tree.leaves(other)
    if [np.shape(leaf) for leaf in ones] != [np.shape(leaf) for leaf in others]:
        return float("inf")
    pairs = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in zip(ones, others, strict=True)]
    unlike = [np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0, np.abs(a - b)) for a, b in pairs]
    return max((float(one.max(initial=0)) for one in unlike), default=float("inf"))


def compared(name: str, sharded: HookedTransformer) -> float:
    """The largest difference between one device and a mesh, which compiles no more, and nothing the second time."""
    counts, results = [], []
    for model in (MODEL, sharded, sharded):
        before = len(COMPILED)
        results.append(CHECKS[name](model))
        counts.append(len(COMPILED) - before)
    alone, spread, again = counts
    assert again <= COMPILES_ITS_OWN.get(name, 0), counts
    assert spread <= alone + 5, counts  # a few arrays on one device are cut for the others
    return farthest(*results[:2])


def main(chosen: list[str]) -> None:
    assert jax.device_count() == 8
    monitoring.register_event_duration_secs_listener(
        lambda event, _, **__: COMPILED.append(event) if event.endswith("backend_compile_duration") else None
    )
    sharded = MODEL.shard(make_mesh(data=2, model=4), RULES)
    found: dict[str, Any] = {}
    for name in chosen or [*CHECKS, *ON_MESH]:
        try:
            if name in CHECKS:
                found[name] = compared(name, sharded)
            else:
                ON_MESH[name](sharded)
                found[name] = 0.0
        except Exception:
            found[name] = traceback.format_exc()[-3000:]
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
