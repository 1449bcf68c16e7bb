"""What real checkpoints of the parallel families carry that is read or refused by name, and what is not exported."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from read_config import read

from tljax.checkpoints import load_checkpoint, save_hf
from tljax.checkpoints.families import family_of
from tljax.checkpoints.layout import flatten, unflatten
from tljax.errors import UnsupportedModelError

RAW = {"fold_ln": False, "center_writing_weights": False, "center_unembed": False, "fold_value_biases": False}
MULTIMODAL = {"type": "mrope", "mrope_section": [1, 1]}


@pytest.mark.parametrize(
    ("variant", "changes", "message"),
    [
        ("phi", {"rope_parameters": None, "rope_scaling": MULTIMODAL}, r"rope_type='mrope'"),
        ("phi", {"hidden_act": "mish"}, r"hidden_act='mish'"),
        ("stablelm", {"head_dim": 4}, r"head_dim=4.*supported: 8"),
        ("stablelm", {"norm_eps": 1e-6}, r"norm_eps=1e-06"),
        ("falcon_mqa", {"auto_map": {"AutoModel": "modeling_mine.Falcon"}}, r"auto_map=.*code of its own"),
        ("falcon_mqa", {"num_ln_in_parallel_attn": 2}, r"num_ln_in_parallel_attn=2"),
        ("falcon_mqa", {"apply_residual_connection_post_layernorm": True}, r"apply_residual_connection_post_layernorm"),
        ("falcon_mqa", {"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0.5"),
        ("falcon_mha_bias_untied", {"num_kv_heads": 2}, r"num_kv_heads=2.*supported: 4"),
    ],
)
def test_attributes_that_are_refused(variant: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        read(variant, **changes)


def test_phi_of_before_rope_parameters() -> None:
    cfg = read("phi", rope_parameters=None, rope_theta=5000.0, partial_rotary_factor=0.75, rope_scaling=None)
    assert (cfg.rotary_dim, cfg.rotary_base, cfg.parallel_attn_mlp) == (6, 5000.0, True)
    assert not cfg.default_prepend_bos
    assert read("phi", rope_parameters=None).rotary_dim == 4


def test_stablelm_of_before_rope_parameters() -> None:
    assert read("stablelm", rope_parameters=None).rotary_dim == 2
    assert read("stablelm", rope_parameters=None, partial_rotary_factor=0.5, rope_theta=100).rotary_base == 100.0


def test_falcon_7b_as_it_was_published() -> None:
    published = {
        "architectures": ["FalconForCausalLM"], "model_type": "falcon", "alibi": False, "bias": False,
        "apply_residual_connection_post_layernorm": False, "hidden_size": 4544, "layer_norm_epsilon": 1e-5,
        "multi_query": True, "new_decoder_architecture": False, "num_attention_heads": 71, "num_hidden_layers": 32,
        "num_kv_heads": 71, "parallel_attn": True, "vocab_size": 65024, "hidden_dropout": 0.0,
        "auto_map": {"AutoModelForCausalLM": "modeling_falcon.FalconForCausalLM"},
    }  # fmt: skip
    family = family_of(published)
    hf = family.config(published)
    cfg = family.read_config(hf)
    rows = {row.paths: row for row in family.rows(hf)}
    hf.refuse_unread()
    assert (cfg.kv_heads, cfg.d_head, cfg.d_mlp, cfg.n_ctx, cfg.rotary_dim) == (1, 64, 18176, 2048, 64)
    assert rows["unembed.W_U"].tied_to == "transformer.word_embeddings.weight"


@pytest.mark.parametrize("variant", ["phi", "stablelm_parallel_gqa_bias", "falcon_mqa"])
def test_a_shared_norm_that_became_two_cannot_be_exported(
    variant: str, hf_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    loaded = load_checkpoint(hf_checkpoint(variant), **RAW)
    flat = flatten(loaded.params)
    changed = unflatten(flat | {"blocks.1.ln2.w": flat["blocks.1.ln2.w"] + 1})
    with pytest.raises(UnsupportedModelError, match=r"blocks\.1\.ln1\.w and blocks\.1\.ln2\.w differ"):
        save_hf(changed, loaded.cfg, tmp_path / "x")
    assert not (tmp_path / "x").exists()
