"""What checkpoints of Bloom, MPT, Falcon, CodeGen, XGLM, Galactica and GPT-1 carry that is read or refused by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from read_config import read, read_attributes

from tljax import HookedTransformer
from tljax.checkpoints import load_checkpoint, save_hf
from tljax.checkpoints.layout import flatten, unflatten
from tljax.errors import UnsupportedModelError

RAW = {"fold_ln": False, "center_writing_weights": False, "center_unembed": False, "fold_value_biases": False}


def test_gpt_1_has_no_token_that_starts_a_text() -> None:
    assert not read("openai_gpt").default_prepend_bos


@pytest.mark.parametrize(
    ("variant", "changes", "message"),
    [
        ("bloom", {"apply_residual_connection_post_layernorm": True}, r"apply_residual_connection_post_layernorm=True"),
        ("bloom", {"n_inner": 44}, r"n_inner=44.*supported: 128"),
        ("bloom", {"skip_bias_add_qkv": True}, r"skip_bias_add_qkv=True"),
        ("mpt", {"expansion_ratio": 2}, r"expansion_ratio=2"),
        ("mpt", {"no_bias": False}, r"no_bias=False"),
        ("mpt", {"logit_scale": 0.5}, r"logit_scale=0.5"),
        ("mpt", {"norm_type": "rmsnorm"}, r"norm_type='rmsnorm'"),
        ("mpt", {"attn_config": {"alibi": False}}, r"attn_config sets alibi=False"),
        ("mpt", {"attn_config": {"alibi_bias_max": 4}}, r"alibi_bias_max=4"),
        ("mpt", {"attn_config": {"qk_ln": True}}, r"qk_ln=True"),
        ("mpt", {"attn_config": {"prefix_lm": True}}, r"prefix_lm=True"),
        ("mpt", {"attn_config": {"attn_type": "multiquery_attention"}}, r"attn_type='multiquery_attention'"),
        ("mpt", {"attn_config": {"tempered": 1}}, r"tempered=1"),
        ("mpt", {"auto_map": {"AutoModel": "modeling_mine.MPT"}}, r"auto_map=.*code of its own"),
        ("falcon_new_decoder", {"num_ln_in_parallel_attn": 3}, r"num_ln_in_parallel_attn=3"),
        ("falcon_new_decoder", {"parallel_attn": False}, r"parallel_attn=False"),
        ("codegen", {"n_head": 2}, r"n_head=2.*multiples of 4"),
        ("xglm", {"add_cross_attention": True}, r"add_cross_attention=True"),
        ("xglm", {"activation_function": "mish"}, r"activation_function='mish'"),
        ("galactica", {"learned_embeddings": False}, r"learned_embeddings=False"),
        ("galactica", {"scale_embeddings": True}, r"scale_embeddings=True"),
        ("openai_gpt", {"afn": "gelu_fast"}, r"afn='gelu_fast'"),
    ],
)
def test_attributes_that_are_refused(variant: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        read(variant, **changes)


def test_bloom_as_it_was_published() -> None:
    published = {
        "architectures": ["BloomForCausalLM"], "model_type": "bloom", "apply_residual_connection_post_layernorm": False,
        "attention_softmax_in_fp32": True, "bias_dropout_fusion": True, "layer_norm_epsilon": 1e-5,
        "masked_softmax_fusion": True, "n_embed": 1024, "n_inner": None, "n_layer": 24, "num_attention_heads": 16,
        "offset_alibi": 100, "pretraining_tp": 1, "skip_bias_add": True, "skip_bias_add_qkv": False,
        "seq_length": 2048, "slow_but_exact": False, "use_cache": True, "vocab_size": 250880,
    }  # fmt: skip
    cfg = read_attributes(published)
    assert (cfg.d_model, cfg.n_heads, cfg.n_ctx, cfg.d_mlp) == (1024, 16, 2048, 4096)
    assert not cfg.default_prepend_bos


def test_mpt_as_it_was_published() -> None:
    attention = {
        "alibi": True, "alibi_bias_max": 8, "attn_impl": "torch", "attn_pdrop": 0, "clip_qkv": None, "qk_ln": False,
        "attn_type": "multihead_attention", "attn_uses_sequence_id": False, "prefix_lm": False, "softmax_scale": None,
    }  # fmt: skip
    published = {
        "architectures": ["MPTForCausalLM"], "model_type": "mpt", "attn_config": attention, "d_model": 4096,
        "emb_pdrop": 0, "embedding_fraction": 1.0, "expansion_ratio": 4, "init_device": "cpu", "is_hf": True,
        "learned_pos_emb": True, "logit_scale": None, "max_seq_len": 2048, "n_heads": 32, "n_layers": 32,
        "no_bias": True, "norm_type": "low_precision_layernorm", "vocab_size": 50432, "init_config": {"name": "x"},
        "auto_map": {"AutoModelForCausalLM": "modeling_mpt.MPTForCausalLM"},
    }  # fmt: skip
    cfg = read_attributes(published)
    assert (cfg.d_head, cfg.n_ctx, cfg.clip_qkv, cfg.d_mlp) == (128, 2048, None, 16384)
    assert not cfg.default_prepend_bos


def test_galactica_as_it_was_published() -> None:
    cfg = read("galactica", learned_embeddings=True, scale_embeddings=False)
    assert cfg.normalization_type == "LNPre"


def test_positions_that_are_computed_must_stay_so_to_be_exported(
    hf_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    loaded = load_checkpoint(hf_checkpoint("xglm"), **RAW)
    flat = flatten(loaded.params)
    assert flat["pos_embed.W_pos"].shape == (24, 32)
    changed = unflatten(flat | {"pos_embed.W_pos": flat["pos_embed.W_pos"] + 1})
    with pytest.raises(UnsupportedModelError, match=r"pos_embed.W_pos is not what XGLMForCausalLM computes"):
        save_hf(changed, loaded.cfg, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_shorter_context_takes_the_first_computed_positions(hf_checkpoint: Callable[[str], Path]) -> None:
    whole, short = (load_checkpoint(hf_checkpoint("xglm"), **RAW, n_ctx=n_ctx).params for n_ctx in (None, 7))
    np.testing.assert_array_equal(short["pos_embed"]["W_pos"], whole["pos_embed"]["W_pos"][:7])


def test_one_norm_in_falcon_s_new_decoder(tmp_path: Path) -> None:
    """As in Falcon 11B; written with two equal norms, which is the same function."""
    import torch
    from hf_models import VARIANTS
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model_type, attributes = VARIANTS["falcon_new_decoder"]
    config = AutoConfig.for_model(model_type, **attributes, num_ln_in_parallel_attn=1, initializer_range=0.3)
    theirs = AutoModelForCausalLM.from_config(config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = HookedTransformer.from_pretrained_no_processing(tmp_path / "theirs")
    tokens = np.random.default_rng(0).integers(0, 40, (2, 8))
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(ours(tokens), expected, atol=5e-5)
    ours.save_hf(tmp_path / "ours")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    with torch.no_grad():
        np.testing.assert_array_equal(back(torch.tensor(tokens)).logits.numpy(), expected)
