"""Plans are exact where they can be: parameters, caches, keys and values; they grow with the run; changes help."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest

import tljax
from tljax.planning import generating
from tljax.planning.programs import read_keys_bytes
from tljax.planning.shapes import read_shape

SHAPE = {
    "d_model": 16, "n_layers": 2, "n_heads": 4, "n_key_value_heads": 2, "d_head": 4, "d_mlp": 32, "n_ctx": 64,
    "d_vocab": 40, "act_fn": "silu", "gated_mlp": True, "positional_embedding_type": "rotary",
}  # fmt: skip
CFG = tljax.HookedTransformerConfig(**SHAPE)
BIG = 10**15
STREAMS = [("resid_post", layer) for layer in range(2)]


def planned(what: str = "forward", **options: object) -> tljax.planning.MemoryPlan:
    return tljax.plan(CFG, **{"what": what, "memory": BIG, "batch": 2, "pos": 16} | options)


def of_tree(tree: object) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.fixture(scope="module")
def model() -> tljax.HookedTransformer:
    return tljax.HookedTransformer(CFG)


def test_parameters_and_cache_are_those_of_the_model(model: tljax.HookedTransformer) -> None:
    real = model.to("bfloat16")
    plan = planned("cache", dtype="bfloat16", names_filter=["z1", "pattern1", "hook_embed", "ln_final.hook_scale"])
    names = ["z1", "pattern1", "hook_embed", "ln_final.hook_scale"]
    _, cache = real.run_with_cache(np.ones((2, 16), np.int32), names_filter=names)
    assert plan.parameters == of_tree(real.params) == of_tree(model.params) // 2
    assert plan.moments[-1].cache == of_tree(dict(cache))


def test_keys_and_values_are_those_of_a_generation() -> None:
    local = CFG.replace(use_local_attn=True, window_size=8, attn_types=("local", "global"))
    for cfg in (CFG, local):
        real = tljax.KeyValueCache.init_cache(cfg, 3, 32)
        assert generating.key_value_bytes(cfg, 3, 32) == of_tree(real)
    assert read_keys_bytes(CFG, 3, 32) == of_tree(tljax.KeyValueCache.init_cache(CFG, 3, 32).keys) * 2


@pytest.mark.parametrize(
    ("what", "options"),
    [("cache", {"names_filter": STREAMS}), ("gradients", {"names_filter": STREAMS}), ("sweep", {}), ("generate", {}),
     ("harvest", {})],
)  # fmt: skip
def test_more_prompts_and_longer_ones_take_more(what: str, options: dict[str, object]) -> None:
    usual = planned(what, **options)
    assert usual.bytes < planned(what, batch=8, **options).bytes
    assert usual.bytes < planned(what, pos=48, **options).bytes
    assert usual.parameters == planned(what, pos=48, **options).parameters
    assert usual.bytes == usual.parameters + usual.activations + usual.cache + usual.temporaries
    assert usual.fits


def test_remat_holds_streams_alone() -> None:
    kept, again = (planned("gradients", names_filter=STREAMS, remat=remat) for remat in (False, True))
    streams = 2 * 2 * 16 * 16 * 4
    assert again.activations < 4 * streams < kept.activations


def test_every_change_it_names_makes_the_run_smaller() -> None:
    usual = {"names_filter": STREAMS, "memory": 1000}
    full = planned("cache", **usual)
    assert full.fits is False
    assert len(full.changes) >= 4
    for change in full.changes:
        changed = planned("cache", **usual | dict(change.options))
        assert changed.bytes == change.bytes < full.bytes
        assert not change.fits
    room = planned("cache", **usual | {"memory": full.changes[0].bytes})
    assert room.changes[0].fits
    assert room.changes[0].bytes <= room.memory
    assert "DOES NOT FIT" in repr(room)
    assert str(room.changes[0]) in repr(room)


def test_a_mesh_divides_what_it_divides() -> None:
    one, two = planned(mesh_shape=1), planned(mesh_shape=2)
    spread = planned(mesh_shape=(2, 2))
    assert two.parameters < one.parameters * 0.55
    assert spread.n_devices == 4
    assert spread.parameters == two.parameters
    assert spread.peak.bytes < two.peak.bytes < one.peak.bytes
    four = planned(mesh_shape={"model": 4})
    assert four.replicated == ("n_kv",)
    axes = tljax.checkpoints.layout.parameter_axes(CFG)
    sizes = tljax.checkpoints.layout.parameter_shapes(CFG)
    cut = {"n_heads", "d_mlp", "d_vocab", "d_vocab_out"}
    expected = sum(4 * math.prod(sizes[path]) // (4 if cut & set(names) else 1) for path, names in axes.items())
    assert four.parameters == expected


@pytest.mark.parametrize(
    ("mesh_shape", "rules"),
    [({"fsdp": 2}, None), ({"fsdp": 2, "model": 2}, None), ({"data": 2, "model": 2}, None), ({"model": 4}, None),
     ({"heads": 2}, {"n_heads": "heads", "n_kv": "heads"}),
     ({"data": 2, "model": 2}, tljax.scale.ShardingRules.tensor_parallel() | tljax.scale.ShardingRules.fsdp())],
)  # fmt: skip
def test_a_device_holds_what_the_table_of_a_sharded_model_says(mesh_shape: dict[str, int], rules: object) -> None:
    """Bytes by brute force: each parameter's length along each axis, divided by the mesh where that divides."""
    given = tljax.scale.ShardingRules.for_mesh(mesh_shape) if rules is None else tljax.scale.ShardingRules(rules)
    shapes, expected = tljax.checkpoints.layout.parameter_shapes(CFG), 0
    for path, axes in tljax.checkpoints.layout.parameter_axes(CFG).items():
        left, own = dict(mesh_shape), list(shapes[path])
        for number, axis in enumerate(axes):
            for over in given[axis]:
                if over in left and own[number] % left[over] == 0:
                    own[number] //= left.pop(over)
        expected += 4 * math.prod(own)
    assert planned(mesh_shape=mesh_shape, rules=rules).parameters == expected


def test_fully_sharded_parameters_are_gathered_while_they_are_used() -> None:
    whole, spread = planned(batch=4), planned(batch=4, mesh_shape={"fsdp": 2})
    block = 4 * (16 * 16 * 2 + 2 * 16 * 8 + 3 * 16 * 32 + 5 * 16)  # matrices; then both norms, b_O, b_out, b_Q
    assert spread.parameters < 0.55 * whole.parameters
    assert spread.temporaries > block * 0.9
    assert spread.bytes > planned(batch=2).peak.bytes + spread.parameters


def test_n_devices_share_the_model() -> None:
    assert planned(n_devices=2).bytes == planned(mesh_shape=2).bytes


def test_what_runs_before_the_first_point_keeps_nothing_for_a_backward_pass() -> None:
    first, second = (planned("gradients", names_filter=("resid_post", layer)) for layer in range(2))
    assert second.activations < 0.3 * first.activations
    assert planned("gradients", names_filter="hook_embed").activations > 1.5 * first.activations


def test_pages_of_a_sweep_hold_as_many_rows_as_their_tokens_make() -> None:
    """Longer prompts make fewer rows of as many tokens, not more memory for rows that are not there."""
    one = [("resid_post", 0)]
    assert planned("sweep", names_filter=one).bytes <= planned("sweep", names_filter=STREAMS).bytes
    last = planned("sweep", names_filter=[("resid_post", 1)])
    assert not any("patched" in moment.stage for moment in last.moments)  # it enters above the last block


def test_several_changes_at_once_where_none_fits_alone() -> None:
    usual = {"batch": 8, "rules": {"n_heads": "model"}}  # with rules, no other mesh is tried
    least = planned(**usual | {"batch": 4, "dtype": "bfloat16", "stop_at_layer": 2})
    found = planned(**usual, memory=least.bytes)
    fitting = [change for change in found.changes if change.fits]
    assert len(fitting) == 1
    assert len(fitting[0].options) > 1
    assert planned(**usual | dict(fitting[0].options)).bytes == fitting[0].bytes <= least.bytes


def test_a_measured_run_is_as_large_as_planned(model: tljax.HookedTransformer) -> None:
    """Arrays that the caller holds after a cached run, counted by jax itself."""
    tokens = np.ones((4, 32), np.int32)
    before = {id(array) for array in jax.live_arrays()}
    logits, cache = jax.block_until_ready((lambda pair: (pair[0], dict(pair[1])))(model.run_with_cache(tokens)))
    held = {array.unsafe_buffer_pointer(): array.nbytes for array in jax.live_arrays() if id(array) not in before}
    plan = planned("cache", batch=4, pos=32)
    at_end = plan.moments[-1]
    assert sum(held.values()) == pytest.approx(at_end.activations + at_end.cache, rel=0.1)
    del logits, cache


@pytest.mark.parametrize(
    ("name", "n_params"),
    [("llama-3.1-8b", 8.03e9), ("Llama-3.1-70B-Instruct", 70.55e9), ("meta-llama/Llama-3.1-405B", 405.85e9),
     ("deepseek-v3", 671.0e9), ("gpt2-small", 163e6)],
)  # fmt: skip
def test_known_shapes_need_no_network(name: str, n_params: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    found = read_shape(name)
    sizes = tljax.checkpoints.layout.parameter_shapes(found).values()
    assert sum(map(math.prod, sizes)) == pytest.approx(n_params, rel=2e-3)


def test_a_directory_and_a_bundled_model(tmp_path: Path) -> None:
    tiny = tljax.HookedTransformer.from_pretrained_no_processing("tljax-tiny")
    assert tljax.plan("tljax-tiny", pos=8, memory=BIG).parameters == of_tree(tiny.params)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "vocab_size": 50,
              "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    plan = tljax.plan(tmp_path, pos=8, dtype="bfloat16", memory=BIG)
    matrices = 2 * 50 * 32 + 32 + 2 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32)
    biases = 50 + 2 * (4 * 32 + 64 + 32)  # zeros, as tljax stores them
    assert plan.parameters == 2 * (matrices + biases)
    assert dataclasses.replace(plan, memory=None).fits is None


def test_the_name_is_a_function() -> None:
    import tljax.planning

    assert callable(tljax.plan)
    assert tljax.plan is tljax.planning.plan
