"""Latent attention: what real checkpoints carry that is read or refused by name, and which weights do not exist."""

import functools
import math
from typing import Any

import numpy as np
import pytest
from read_config import read
from variants import TOKENS, build

from tljax import HookedTransformerConfig, Scale
from tljax.errors import ConfigError, UnsupportedModelError

V2, V3, GLM = "deepseek_v2_whole_queries", "deepseek_v3_groups", "glm4_moe_lite"
OWN_CODE = {"AutoConfig": "configuration_deepseek.DeepseekV2Config", "AutoModel": "modeling_deepseek.DeepseekV2Model"}
YARN_LITE = {
    "type": "yarn", "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707, "beta_fast": 32, "beta_slow": 1,
    "original_max_position_embeddings": 4096,
}  # fmt: skip


@pytest.mark.parametrize(
    ("variant", "changes", "message"),
    [
        (V2, {"norm_topk_prob": True}, r"norm_topk_prob=True.*supported: False"),
        (V2, {"topk_method": "noaux_tc"}, r"topk_method='noaux_tc'.*supported: greedy, group_limited_greedy"),
        (V2, {"scoring_func": "sigmoid"}, r"scoring_func='sigmoid'"),
        (V2, {"mlp_bias": True}, r"mlp_bias=True"),
        (V2, {"moe_layer_freq": 2}, r"moe_layer_freq=2"),
        (V2, {"num_key_value_heads": 2}, r"num_key_value_heads=2.*supported: 4"),
        (V2, {"auto_map": {"AutoModel": "modeling_mine.DeepseekV2Model"}}, r"auto_map=.*modeling_mine"),
        (V3, {"topk_method": "greedy"}, r"topk_method='greedy'"),
        (V3, {"scoring_func": "softmax"}, r"scoring_func='softmax'"),
        (V3, {"quantization_config": {"quant_method": "aqlm"}}, r"quantization_config=.*full-precision"),
        (GLM, {"mlp_layer_types": ["dense", "sparse", "other"]}, r"mlp_layer_types=\['other'"),
        (GLM, {"first_k_dense_replace": 2}, r"first_k_dense_replace=2.*supported: 1"),
    ],
)
def test_attributes_that_are_refused(variant: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        read(variant, **changes)


def test_what_deepseek_2s_own_checkpoints_carry() -> None:
    cfg = read(
        V2, rope_parameters=None, rope_theta=10000, rope_scaling=YARN_LITE, auto_map=OWN_CODE, moe_layer_freq=1,
        ep_size=1, seq_aux=True, aux_loss_alpha=0.001, scoring_func="softmax", n_group=1, topk_group=1,
        max_position_embeddings=163840,
    )  # fmt: skip
    assert cfg.yarn_attention_factor == 1.0
    assert cfg.attn_scale == pytest.approx(math.sqrt(10) / (0.1 * 0.707 * math.log(40) + 1) ** 2, rel=1e-12)
    assert (cfg.expert_groups, cfg.q_lora_rank, cfg.moe_layers) == (None, None, (False, True, True))
    assert (cfg.router, cfg.routed_scaling_factor, cfg.d_shared_expert) == ("softmax", 1.6, 48)


def test_layers_without_experts() -> None:
    assert read(V3, first_k_dense_replace=0).moe_layers is None
    assert read(GLM, mlp_layer_types=None).moe_layers == (False, True, True)


LATENT = {
    "d_model": 16, "n_layers": 1, "n_ctx": 8, "n_heads": 4, "d_head": 6, "positional_embedding_type": "rotary",
    "rotary_dim": 4, "kv_lora_rank": 5,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_lora_rank": None, "q_lora_rank": 3}, "q_lora_rank needs kv_lora_rank"),
        ({"positional_embedding_type": "standard", "rotary_dim": None}, "needs positional_embedding_type='rotary'"),
        ({"rotary_dim": None}, "rotary_dim=6 of the d_head=6"),
        ({"n_key_value_heads": 2}, "leave out n_key_value_heads=2"),
        ({"use_qk_norm": True}, "norms on its latents"),
        ({"clip_qkv": 1.0}, "norms on its latents"),
        ({"kv_lora_rank": 0}, "kv_lora_rank must be an integer of at least 1"),
        ({"d_value": 0}, "d_value must be an integer of at least 1"),
    ],
)
def test_configs_that_are_refused(changes: dict[str, Any], message: str) -> None:
    HookedTransformerConfig(**LATENT)
    with pytest.raises(ConfigError, match=message):
        HookedTransformerConfig(**LATENT | changes)


def test_weights_that_do_not_exist() -> None:
    model = build("latent")
    for name in ("W_Q", "b_Q"):
        with pytest.raises(ConfigError, match=rf"no {name}: .*W_Q_down \[d_model, q_lora_rank\]"):
            getattr(model, name)
    for name in ("W_K", "W_V", "b_K", "b_V"):
        with pytest.raises(ConfigError, match=rf"no {name}: .*W_{name[2]}_up \[head, kv_lora_rank"):
            getattr(model, name)
    assert model.W_O.shape == (2, 4, 5, 16)
    attn = model.blocks[0].attn
    assert (attn.W_Q_up.shape, attn.W_K_up.shape, attn.W_V_up.shape) == ((4, 7, 8), (4, 6, 4), (4, 6, 5))
    whole = build("latent_keys")
    assert whole.W_Q.shape == (2, 4, 16, 8)
    with pytest.raises(ConfigError, match=r"no W_K: .*W_K_rot"):
        whole.W_K  # noqa: B018


def test_the_factors_give_queries_keys_and_values() -> None:
    """As the error says: down, norm, up; the rotating part of a key straight from the residual stream."""
    model = build("latent")
    _, cache = model.run_with_cache(TOKENS)
    close = functools.partial(np.testing.assert_allclose, atol=1e-5)
    for layer, block in enumerate(model.params["blocks"]):
        attn = {name: np.asarray(leaf) for name, leaf in block["attn"].items() if not isinstance(leaf, dict)}
        stream = np.asarray(cache["normalized", layer, "ln1"]) * np.asarray(block["ln1"]["w"])
        q, kv = np.asarray(cache["q_latent", layer]), np.asarray(cache["kv_latent", layer])
        down = stream @ attn["W_KV_down"] + attn["b_KV_down"]
        norm = np.sqrt(np.square(down).mean(-1, keepdims=True) + model.cfg.latent_norm_eps)
        close(kv, down / norm * np.asarray(block["attn"]["kv_latent_norm"]["w"]))
        close(cache["q", layer], np.einsum("bpr,rhe->bphe", q, attn["W_Q_up"]))
        close(cache["v", layer], np.einsum("bpr,rhe->bphe", kv, attn["W_V_up"]))
        k, rot_k = np.asarray(cache["k", layer]), np.asarray(cache["rot_k", layer])
        close(k[..., :4], np.einsum("bpr,rhe->bphe", kv, attn["W_K_up"]))
        close(k[..., 4:], np.broadcast_to((stream @ attn["W_K_rot"] + attn["b_K_rot"])[:, :, None], k[..., 4:].shape))
        np.testing.assert_array_equal(rot_k[..., :4], k[..., :4])
        assert np.abs(rot_k[:, 1:, :, 4:] - k[:, 1:, :, 4:]).max() > 0.1


def test_python_hooks_on_a_latent_that_keys_and_values_read_apart() -> None:
    model = build("latent")
    split = [("blocks.0.hook_v_input", Scale(-3.0, head=0))]
    expected = model.run_with_hooks(TOKENS, fwd_hooks=split)
    same = ("blocks.0.attn.hook_kv_latent", lambda latent, hook: latent * 1)
    np.testing.assert_allclose(model.run_with_hooks(TOKENS, fwd_hooks=[*split, same]), expected, atol=1e-5)
    assert np.abs(np.asarray(expected - model(TOKENS))).max() > 1e-3


def test_number_of_weights() -> None:
    for kind in ("latent", "latent_keys"):
        model = build(kind)
        parts = [block[part] for block in model.params["blocks"] for part in ("attn", "mlp")]
        sizes = [leaf.size for part in parts for name, leaf in part.items() if name.startswith("W_")]
        assert model.cfg.n_params == sum(sizes)
