"""The table machinery: rows in both directions, and the check of a table against what is stored."""

import jax
import numpy as np
import pytest
from hf_models import VARIANTS, hf_config

from tljax import HookedTransformerConfig
from tljax.checkpoints.families import family_of
from tljax.checkpoints.layout import flatten, parameter_axes, parameter_shapes, stages_of, unflatten
from tljax.checkpoints.mapping import match, stored_apart
from tljax.checkpoints.rows import Row, TensorInfo, bind, may_be_absent
from tljax.errors import CheckpointError, UnsupportedModelError
from tljax.modules.parameters import axis_sizes
from tljax.modules.stack import init_params

SIZES = {"d_model": 4, "n_heads": 3, "n_kv": 3, "d_head": 2}
CFG = HookedTransformerConfig(d_model=4, n_layers=2, n_heads=2, d_head=2, n_ctx=5, d_vocab=6)


def rows() -> list[Row]:
    return [Row(path, " ".join(axes), path) for path, axes in parameter_axes(CFG).items()]


def stored() -> dict[str, TensorInfo]:
    return {path: TensorInfo("F32", shape) for path, shape in parameter_shapes(CFG).items()}


def test_fused_tensor_is_split_by_blocks() -> None:
    array = np.arange(4 * 18).reshape(4, 18)
    row = Row("c_attn.weight", "d_model (3 n_heads d_head)", "blocks.{l}.attn.W_Q|W_K|W_V")
    q, k, v = row.read(array, ("d_model", "n_heads", "d_head"), SIZES)
    np.testing.assert_array_equal(q, array[:, :6].reshape(4, 3, 2))
    np.testing.assert_array_equal(k, array[:, 6:12].reshape(4, 3, 2))
    np.testing.assert_array_equal(v, array[:, 12:].reshape(4, 3, 2))
    assert row.targets(7) == ("blocks.7.attn.W_Q", "blocks.7.attn.W_K", "blocks.7.attn.W_V")


def test_fused_tensor_is_split_head_by_head() -> None:
    array = np.arange(18 * 4).reshape(18, 4)
    row = Row("query_key_value.weight", "(n_heads 3 d_head) d_model", "attn.W_Q|W_K|W_V")
    parts = row.read(array, ("d_model", "n_heads", "d_head"), SIZES)
    by_head = array.reshape(3, 3, 2, 4)  # head, q/k/v, d_head, d_model
    for which, part in enumerate(parts):
        np.testing.assert_array_equal(part, by_head[:, which].transpose(2, 0, 1))


def test_parts_of_unequal_length_are_joined_along_their_axis() -> None:
    sizes = SIZES | {"n_kv": 1}
    array = np.arange(10 * 4).reshape(10, 4)
    row = Row("qkv.weight", "(n_heads+n_kv+n_kv d_head) d_model", "attn.W_Q|W_K|W_V")
    q, k, v = row.read(array, ("d_model", "n_heads", "d_head"), sizes)
    np.testing.assert_array_equal(q, array[:6].reshape(3, 2, 4).transpose(2, 0, 1))
    np.testing.assert_array_equal(k[:, 0], array[6:8].T)
    np.testing.assert_array_equal(v[:, 0], array[8:].T)
    assert row.shape(sizes) == (10, 4)
    np.testing.assert_array_equal(row.write((q, k, v), ("d_model", "n_heads", "d_head"), sizes), array)


def test_rows_that_a_model_never_uses_are_skipped() -> None:
    row = Row("positions.weight", "n_ctx d_model", "pos_embed.W_pos", skip=2)
    sizes = SIZES | {"n_ctx": 3}
    array = np.arange(20).reshape(5, 4)
    (ours,) = row.read(array, ("n_ctx", "d_model"), sizes)
    np.testing.assert_array_equal(ours, array[2:])
    assert row.shape(sizes) == (5, 4)
    written = row.write((ours,), ("n_ctx", "d_model"), sizes)
    np.testing.assert_array_equal(written[2:], array[2:])
    assert not written[:2].any()


def test_heads_stored_one_by_one_are_stacked() -> None:
    sizes, ours = SIZES | {"n_kv": 2}, ("n_kv", "d_head")
    (entry,) = bind([Row("k_norm.{k}.weight", "n_kv d_head", "attn.k_norm.w")], 1)
    assert entry.keys(sizes) == ("k_norm.0.weight", "k_norm.1.weight")
    assert entry.shape(sizes) == (2,)
    stored = {"k_norm.0.weight": np.array([1.0, 2.0]), "k_norm.1.weight": np.array([3.0, 4.0])}
    (whole,) = entry.read(stored.__getitem__, ours, sizes)
    np.testing.assert_array_equal(whole, [[1, 2], [3, 4]])
    for key, part in stored.items():
        np.testing.assert_array_equal(entry.write(key, [whole], ours, sizes), part)


def test_a_number_is_read_and_written() -> None:
    row = Row("act.beta", "", "mlp.act.beta")
    assert row.shape(SIZES) == ()
    (ours,) = row.read(np.array(0.5), (), SIZES)
    assert ours.shape == row.write([ours], (), SIZES).shape == ()


def test_each_key_head_is_fused_with_its_group_of_query_heads() -> None:
    sizes = SIZES | {"n_heads": 6, "n_kv": 2}
    array = np.arange(20 * 4).reshape(20, 4)
    row = Row("qkv.weight", "(n_kv n_heads/n_kv+one+one d_head) d_model", "attn.W_Q|W_K|W_V")
    sizes["one"], ours = 1, ("d_model", "n_heads", "d_head")
    q, k, v = row.read(array, ours, sizes)
    by_head = array.reshape(2, 5, 2, 4).transpose(3, 0, 1, 2)  # d_model, group, one of it, d_head
    np.testing.assert_array_equal(q, by_head[:, :, :3].reshape(4, 6, 2))
    np.testing.assert_array_equal(k, by_head[:, :, 3])
    np.testing.assert_array_equal(v, by_head[:, :, 4])
    assert row.shape(sizes) == (20, 4)
    np.testing.assert_array_equal(row.write((q, k, v), ours, sizes), array)


def test_heads_are_fused_in_runs() -> None:
    sizes = SIZES | {"n_heads": 4}
    array = np.arange(24 * 4).reshape(24, 4)
    row = Row("qkv.weight", "(2 3 n_heads/2 d_head) d_model", "attn.W_Q|W_V|W_K")
    ours = ("d_model", "n_heads", "d_head")
    parts = row.read(array, ours, sizes)
    by_run = array.reshape(2, 3, 2, 2, 4)  # run, q/v/k, head in it, d_head, d_model
    for which, part in enumerate(parts):
        np.testing.assert_array_equal(part, by_run[:, which].reshape(4, 2, 4).transpose(2, 0, 1))
    np.testing.assert_array_equal(row.write(parts, ours, sizes), array)


@pytest.mark.parametrize(
    ("stored_axes", "paths", "ours"),
    [
        ("d_model (3 n_heads d_head)", "W_Q|W_K|W_V", ("d_model", "n_heads", "d_head")),
        ("(n_heads 3 d_head)", "b_Q|b_K|b_V", ("n_heads", "d_head")),
        ("d_model (n_heads d_head)", "W_O", ("n_heads", "d_head", "d_model")),
        ("d_model", "b_O", ("d_model",)),
    ],
)
def test_write_inverts_read(stored_axes: str, paths: str, ours: tuple[str, ...]) -> None:
    row = Row("key", stored_axes, f"attn.{paths}")
    array = np.random.default_rng(0).standard_normal(row.shape(SIZES))
    parts = row.read(array, ours, SIZES)
    assert all(part.shape == tuple(SIZES[axis] for axis in ours) for part in parts)
    np.testing.assert_array_equal(row.write(parts, ours, SIZES), array)


def test_a_row_with_the_wrong_axes_says_so() -> None:
    with pytest.raises(ValueError, match=r"Row 'key' stores 'd_model d_head', but 'attn.W_Q' has axes"):
        Row("key", "d_model d_head", "attn.W_Q").read(np.zeros((4, 2)), ("d_model", "n_heads", "d_head"), SIZES)


def test_complete_checkpoint_matches_stage_by_stage() -> None:
    stages = match(rows(), CFG, stored())
    assert set(stages) == {"embedding", "blocks.0.", "blocks.1.", "head"}
    assert [entry.key for entry in stages["head"]] == ["ln_final.w", "ln_final.b", "unembed.W_U", "unembed.b_U"]


def test_all_mismatches_are_reported_at_once() -> None:
    tensors = stored()
    del tensors["blocks.1.mlp.W_in"], tensors["blocks.0.attn.b_Q"]
    tensors["surprise"] = TensorInfo("F32", (3,))
    tensors["embed.W_E"] = TensorInfo("F32", (7, 4))
    with pytest.raises(CheckpointError) as caught:
        match(rows(), CFG, tensors, origin="here")
    message = str(caught.value)
    assert "here does not hold the tensors" in message
    assert "2 missing: blocks.0.attn.b_Q [2, 2]; blocks.1.mlp.W_in [4, 16]" in message
    assert "1 unexpected: surprise [3]" in message
    assert "1 of another shape: embed.W_E is [7, 4], config.json says [6, 4]" in message
    assert "Nothing was loaded" in message


def test_ignored_patterns_must_match_whole_names() -> None:
    tensors = stored() | {"blocks.0.attn.bias": TensorInfo("U8", (1,))}
    match(rows(), CFG, tensors, ignored=(r"blocks\.\d+\.attn\.bias",))
    with pytest.raises(CheckpointError, match=r"1 unexpected: blocks.0.attn.bias"):
        match(rows(), CFG, tensors, ignored=(r"attn\.bias", "blocks"))


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "I8", "U8"])
def test_quantized_tensors_are_refused(dtype: str) -> None:
    tensors = stored() | {"embed.W_E": TensorInfo(dtype, (6, 4))}
    with pytest.raises(UnsupportedModelError, match=f"embed.W_E as {dtype}.*dequantize"):
        match(rows(), CFG, tensors)


def test_a_table_that_forgets_a_weight_is_a_programming_error_but_absent_biases_are_zero() -> None:
    tensors = stored()
    biases = ("unembed.b_U", "ln_final.b", "blocks.0.ln1.b")
    for bias in biases:
        del tensors[bias]
    match([row for row in rows() if row.key not in biases], CFG, tensors)
    del tensors["ln_final.w"]
    with pytest.raises(ValueError, match=r"fills no \['ln_final.w'\]"):
        match([row for row in rows() if row.key not in (*biases, "ln_final.w")], CFG, tensors)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"normalization_type": "RMS", "gated_mlp": True, "n_key_value_heads": 1, "act_fn": "silu"},
        {"normalization_type": "LNPre", "positional_embedding_type": "rotary"},
        {"final_rms": True, "act_fn": "solu_ln"},
        {"normalization_type": None, "attn_only": True, "d_vocab_out": 3},
    ],
)
def test_layout_is_the_model_s_own(changes: dict) -> None:
    cfg = CFG.replace(**changes)
    params = jax.eval_shape(lambda: init_params(cfg, 0))
    flat = flatten(params)
    assert {path: leaf.shape for path, leaf in flat.items()} == parameter_shapes(cfg)
    assert sorted(path for paths in stages_of(cfg).values() for path in paths) == sorted(flat)
    again = flatten(unflatten(flat))
    assert again.keys() == flat.keys()
    assert jax.tree.structure(unflatten(flat)) == jax.tree.structure(params)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_weight_has_a_row(variant: str) -> None:
    family = family_of(hf_config(variant).to_dict())
    hf = family.config(hf_config(variant).to_dict())
    cfg = family.read_config(hf)
    filled = {path for entry in bind(family.rows(hf), cfg.n_layers) for path in entry.targets}
    assert (
        {path for path in parameter_axes(cfg) if not may_be_absent(path)} - set(family.computed(cfg))
        <= filled
        <= set(parameter_axes(cfg))
    )


def test_of_tied_tensors_either_may_be_the_one_that_is_stored() -> None:
    """In every family that ties its embeddings."""
    tied = 0
    for variant in VARIANTS:
        attributes = hf_config(variant).to_dict()
        family = family_of(attributes)
        hf = family.config(attributes)
        cfg, table = family.read_config(hf), list(family.rows(hf))
        sizes = axis_sizes(cfg)
        entries = [entry for entry in bind(table, cfg.n_layers) if not entry.row.other]
        stored = {key: TensorInfo("F32", entry.shape(sizes)) for entry in entries for key in entry.keys(sizes)}
        for row in [row for row in table if row.tied_to is not None]:
            tied += 1
            head = {key: info for key, info in stored.items() if key != row.tied_to}
            embedding = {key: info for key, info in stored.items() if key != row.key}
            for tensors, name in ((head, row.key), (embedding, row.tied_to), (stored, None)):
                stages = match(table, cfg, tensors, prefix=family.prefix, computed=family.computed(cfg))
                found = [entry for stage in stages.values() for entry in stage]
                names = {entry.key for entry in found if entry.row.key in (row.key, row.tied_to)}
                assert names == ({name} if name else {row.key, row.tied_to}), variant
                apart = [(one.key, other.key) for one, other in stored_apart(stages)]
                assert apart == ([] if name else [(row.key, row.tied_to)])
            neither = {key: info for key, info in head.items() if key != row.key}
            with pytest.raises(CheckpointError, match="2 missing"):
                match(table, cfg, neither, prefix=family.prefix, computed=family.computed(cfg))
    assert tied > 20


def test_of_two_ways_under_one_name_the_shape_tells() -> None:
    other = Row("embed.W_E", "d_model d_vocab", "embed.W_E", other=True)
    turned = stored() | {"embed.W_E": TensorInfo("F32", (4, 6))}
    for tensors, is_other in ((stored(), False), (turned, True)):
        entries = match([*rows(), other], CFG, tensors)["embedding"]
        assert [entry.row.other for entry in entries if entry.key == "embed.W_E"] == [is_other]
    with pytest.raises(CheckpointError, match=r"embed.W_E is \[5, 5\], config.json says \[6, 4\]"):
        match([*rows(), other], CFG, stored() | {"embed.W_E": TensorInfo("F32", (5, 5))})
