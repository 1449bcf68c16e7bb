"""What checkpoints of the families in hf_norm_kinds.py carry that is read or refused by name, or not exported."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
from read_config import read

from tljax.checkpoints import load_checkpoint, save_hf
from tljax.checkpoints.layout import flatten, unflatten
from tljax.errors import UnsupportedModelError

RAW = {"fold_ln": False, "center_writing_weights": False, "center_unembed": False, "fold_value_biases": False}
MULTIMODAL = {"type": "mrope", "mrope_section": [1, 1]}
COHERE2_IN_WORDS = {
    "order_of_interleaved_layers": "local_attn_first", "position_embedding_type": "rope_gptj", "rotary_pct": 1.0,
    "use_embedding_sharing": True, "use_gated_activation": True, "use_parallel_block": True,
    "use_parallel_embedding": False, "use_qk_norm": False, "cache_implementation": "hybrid",
}  # fmt: skip


@pytest.mark.parametrize(
    ("variant", "changes", "message"),
    [
        ("olmo2_gqa", {"clip_qkv": 8.0}, r"clip_qkv=8\.0"),
        ("olmo2_gqa", {"rope_parameters": None, "rope_scaling": MULTIMODAL}, r"rope_type='mrope'"),
        ("cohere_gqa", {"qk_norm": True}, r"qk_norm=True"),
        ("cohere_gqa", {"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0\.5"),
        ("cohere2_mixed", {"use_qk_norm": True}, r"use_qk_norm=True"),
        ("cohere2_mixed", {"position_embedding_type": "alibi"}, r"position_embedding_type='alibi'.*rope_gptj"),
        ("cohere2_mixed", {"use_embedding_sharing": False}, r"use_embedding_sharing=False"),
        ("cohere2_mixed", {"head_dim": 4}, r"head_dim=4.*supported: 8"),
        ("cohere2_mixed", {"sliding_window": None}, r"layer_types='sliding_attention'"),
        ("cohere2_mixed", {"layer_types": ["chunked_attention"] * 3}, r"layer_types=\['chunked_attention'\]"),
        ("olmo_mha", {"clip_qkv": -1.0}, r"clip_qkv=-1\.0.*positive"),
        ("olmo_mha", {"layer_norm_type": "rms"}, r"layer_norm_type='rms'"),
        ("glm4_gqa", {"multi_query_attention": True}, r"multi_query_attention=True"),
        ("nemotron_gqa", {"hidden_act": "swiglu"}, r"hidden_act='swiglu'"),
        ("exaone4_mixed", {"attention_bias": True}, r"attention_bias=True"),
        ("hunyuan_gqa", {"use_qk_norm": False}, r"use_qk_norm=False"),
        ("hunyuan_gqa", {"use_cla": True}, r"use_cla=True"),
        ("apertus_gqa", {"post_norm": True}, r"post_norm=True"),
        ("apertus_gqa", {"qk_norm": False}, r"qk_norm=False"),
        ("apertus_gqa", {"hidden_act": "xielu2"}, r"hidden_act='xielu2'"),
        (
            "olmo3_gqa_window",
            {"rope_parameters": {"full_attention": {}, "sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            r"sliding_attention.*rope_type 'default'",
        ),
        ("olmo3_gqa_window", {"rope_parameters": None, "rope_theta": 1e4}, r"rope_theta=10000\.0.*each type of layer"),
    ],
)
def test_attributes_that_are_refused(variant: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        read(variant, **changes)


def test_exaone_4_with_a_named_pattern_needs_its_layer_types() -> None:
    cfg = read("exaone4_mixed", sliding_window_pattern="LLLG")
    assert cfg.attn_types == ("local", "global", "local")
    assert cfg.rotary_layers == (True, False, True)
    with pytest.raises(ValueError, match="no 'layer_types'"):
        read("exaone4_mixed", without=("layer_types",), sliding_window_pattern="LLLG")


def test_only_layers_with_a_window_rotate() -> None:
    cfg = read("cohere2_mixed", without=("layer_types",), num_hidden_layers=5, **COHERE2_IN_WORDS)
    assert cfg.rotary_layers == (True, True, True, False, True)
    assert cfg.attn_types == ("local", "local", "local", "global", "local")
    assert read("cohere2_mixed", layer_types=["full_attention"] * 3).rotary_layers == (False,) * 3
    assert read("cohere2_mixed", layer_types=["sliding_attention"] * 3).rotary_layers is None
    assert read("exaone4_no_window_tied").rotary_layers is None


def test_hunyuan_7b_as_it_was_published() -> None:
    scaling = {"type": "dynamic", "alpha": 1000.0, "beta_fast": 32, "beta_slow": 1, "factor": 1.0, "mscale": 1.0}
    cfg = read(
        "hunyuan_gqa", rope_parameters=None, rope_scaling=scaling, rope_theta=10000.0, use_qk_norm=True, use_cla=False
    )
    assert cfg.rotary_base == pytest.approx(10000 * 1000 ** (10 / 8))
    assert not cfg.use_dynamic_ntk_rope
    plain = read(
        "hunyuan_gqa", rope_parameters=None, rope_scaling={"type": "dynamic", "factor": 1.0}, rope_theta=10000.0
    )
    assert (plain.use_dynamic_ntk_rope, plain.rotary_base) == (True, 10000.0)


def test_olmo_3_as_it_was_published() -> None:
    scaling = {
        "attention_factor": 1.2079441541679836, "beta_fast": 32, "beta_slow": 1, "factor": 8.0,
        "original_max_position_embeddings": 8192, "rope_type": "yarn",
    }  # fmt: skip
    cfg = read("olmo3_gqa_window", rope_parameters=None, rope_scaling=scaling, rope_theta=500000)
    assert (cfg.use_yarn_rope, cfg.yarn_global_attn_only, cfg.yarn_factor) == (True, True, 8.0)
    assert (cfg.rotary_base, cfg.rotary_base_local, cfg.window_size) == (500000.0, None, 5)


def test_apertus_rotates_like_llama_3_unless_it_says_otherwise() -> None:
    cfg = read("apertus_gqa", without=("rope_parameters",))
    assert (cfg.use_NTK_by_parts_rope, cfg.rotary_base, cfg.NTK_original_ctx_len) == (True, 12e6, 8192)
    assert (cfg.act_fn, cfg.gated_mlp) == ("xielu", False)
    plain = read("apertus_gqa", rope_parameters={"rope_type": "default", "rope_theta": 50.0}, hidden_act="gelu")
    assert (plain.use_NTK_by_parts_rope, plain.rotary_base, plain.act_fn) == (False, 50.0, "gelu")


@pytest.mark.parametrize(
    ("variant", "prepends"),
    [("olmo_mha", True), ("olmo2_gqa", True), ("olmo3_gqa_window", True), ("cohere_gqa", True), ("nemotron_gqa", True),
     ("cohere2_mixed", True), ("hunyuan_gqa", True), ("apertus_gqa", True), ("glm4_gqa", False),
     ("exaone4_mixed", False)],
)  # fmt: skip
def test_which_families_prepend_bos(variant: str, prepends: bool) -> None:
    assert read(variant).default_prepend_bos is prepends


@pytest.mark.parametrize(
    ("variant", "path"),
    [
        ("cohere_qk_norm_untied", "blocks.1.attn.q_norm.b"),
        ("cohere_gqa", "ln_final.b"),
        ("stablelm_qk_norm_parallel", "blocks.0.attn.k_norm.b"),
    ],
)
def test_the_bias_of_a_norm_that_has_none_cannot_be_exported(
    variant: str, path: str, hf_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    loaded = load_checkpoint(hf_checkpoint(variant), **RAW)
    flat = flatten(loaded.params)
    assert not flat[path].any()
    changed = unflatten(flat | {path: jnp.ones_like(flat[path])})
    with pytest.raises(UnsupportedModelError, match=rf"{path} not zero, but .* has no such bias"):
        save_hf(changed, loaded.cfg, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_what_follows_no_norm_of_olmo_is_exported_processed_or_not(
    hf_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """Its layer norms have no parameters to fold, unlike those of a model whose norms were folded."""
    olmo = load_checkpoint(hf_checkpoint("olmo_mha"))
    save_hf(olmo.params, olmo.cfg, tmp_path / "olmo")
    again = load_checkpoint(tmp_path / "olmo", **RAW)
    assert flatten(again.params).keys() == flatten(olmo.params).keys()
    nemotron = load_checkpoint(hf_checkpoint("nemotron_gqa"))
    with pytest.raises(UnsupportedModelError, match="norms of this model were folded"):
        save_hf(nemotron.params, nemotron.cfg, tmp_path / "nemotron")
