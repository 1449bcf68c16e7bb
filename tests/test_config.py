"""The config: derived fields, validation messages, dict round trips, identity."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from tljax import HookedTransformerConfig
from tljax.config import LayerKind
from tljax.errors import ConfigError
from tljax.numerics import canonical_dtype

SIZES = {"d_model": 16, "n_layers": 2, "n_ctx": 8, "n_heads": 4, "d_vocab": 10}


def config(**changes: object) -> HookedTransformerConfig:
    return HookedTransformerConfig(**(SIZES | changes))


@pytest.mark.parametrize(
    ("given", "field", "value"),
    [
        ({}, "d_head", 4),
        ({"n_heads": -1, "d_head": 8}, "n_heads", 2),
        ({}, "d_mlp", 64),
        ({"attn_only": True}, "d_mlp", None),
        ({"d_mlp": 5}, "d_mlp", 5),
        ({}, "d_vocab_out", 10),
        ({"d_vocab_out": 3}, "d_vocab_out", 3),
        ({}, "rotary_dim", None),
        ({"positional_embedding_type": "rotary"}, "rotary_dim", 4),
        ({"positional_embedding_type": "rotary", "rotary_dim": 2}, "rotary_dim", 2),
        ({}, "attn_scale", 2.0),
        ({"attn_scale": 3.0}, "attn_scale", 3.0),
        ({"use_attn_scale": False}, "attn_scale", 1.0),
        ({}, "initializer_range", 0.2),
        ({"init_mode": "xavier_normal"}, "initializer_range", 1.0),
        ({"initializer_range": 0.5}, "initializer_range", 0.5),
        (
            {"attn_types": ["global", "local"], "use_local_attn": True, "window_size": 3},
            "attn_types",
            ("global", "local"),
        ),
        ({"dtype": "bf16"}, "dtype", "bfloat16"),
        ({"dtype": jnp.float16}, "dtype", "float16"),
        ({}, "kv_heads", 4),
        ({"n_key_value_heads": 2}, "kv_heads", 2),
        ({"dtype": "fp16"}, "jnp_dtype", jnp.dtype("float16")),
        ({}, "n_params", 2 * (4 * 16 * 16 + 2 * 16 * 64)),
        ({"attn_only": True}, "n_params", 2 * 4 * 16 * 16),
        ({"gated_mlp": True, "n_key_value_heads": 1}, "n_params", 2 * (2 * 16 * 4 * 5 + 3 * 16 * 64)),
    ],
)
def test_derived_fields(given: dict, field: str, value: object) -> None:
    assert getattr(config(**given), field) == value


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"clip_qkv": -1.0}, "clip_qkv must be positive or None, got -1.0"),
        (
            {"use_normalization_after_only": True, "use_normalization_before_and_after": True},
            "Set one of use_normalization_before_and_after, use_normalization_after_only",
        ),
        ({"normalization_type": None, "use_normalization_after_only": True}, "need a normalization_type, got None"),
        ({"qk_norm_span": "heads"}, r"qk_norm_span='heads' is not one of \['shared', 'per_head', 'joint'\]"),
        ({"qk_norm_after_rotary": True}, "qk_norm_after_rotary need positional_embedding_type='rotary'"),
        ({"alibi_rounded": True}, "alibi_rounded needs alibi"),
        ({"d_embed": 8}, "d_embed=8 puts a projection where a final norm"),
        ({"n_heads": -1}, "Give d_head or n_heads"),
        ({"n_heads": -1, "d_head": 5}, "d_model=16 is not a multiple of d_head=5"),
        ({"n_heads": 3}, "not a multiple of n_heads=3"),
        ({"d_model": 0}, "d_model must be an integer of at least 1, got 0"),
        ({"n_layers": -1}, "n_layers must be an integer of at least 0"),
        ({"n_ctx": 2.5}, "n_ctx must be an integer"),
        ({"n_key_value_heads": 3}, "n_heads=4 is not a multiple of n_key_value_heads=3"),
        ({"rotary_dim": 3}, "rotary_dim=3 must be even"),
        ({"rotary_dim": 6}, "at most d_head=4"),
        ({"eps": 0.0}, "eps must be positive"),
        ({"act_fn": "gelu_knew"}, "act_fn='gelu_knew' is not one of .* Did you mean 'gelu_new'"),
        ({"act_fn": None}, "act_fn=None"),
        ({"normalization_type": "LNpre"}, "Did you mean 'LNPre'"),
        ({"positional_embedding_type": "rotery"}, "Did you mean 'rotary'"),
        ({"attention_dir": "casual"}, "Did you mean 'causal'"),
        ({"init_mode": "xavier"}, "xavier_"),
        ({"matmul_precision": "best"}, "matmul_precision='best'"),
        ({"dtype": "flaot32"}, "Did you mean 'float32'"),
        ({"dtype": "int32"}, "dtype 'int32' is not one of"),
        ({"dtype": None}, "dtype None is not one of"),
        ({"use_local_attn": True}, "use_local_attn needs window_size and attn_types"),
        ({"use_local_attn": True, "attn_types": ("local", "local"), "window_size": 0}, "window_size must be"),
        ({"attn_types": ("global",)}, "attn_types has 1 entries for n_layers=2"),
        ({"attn_types": ("global", "sliding")}, "'global' and 'local'"),
        ({"gated_mlp": True, "act_fn": "solu_ln"}, "no gated form"),
        ({"attn_only": True, "parallel_attn_mlp": True}, "attn_only has no MLP"),
        ({"d_vocab": -7}, "d_vocab"),
    ],
)
def test_validation_messages(given: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**given)


def test_unknown_keys_name_the_nearest_field() -> None:
    with pytest.raises(ConfigError, match=r"'d_modle' is not a config field. Did you mean 'd_model'"):
        HookedTransformerConfig.from_dict({**SIZES, "d_modle": 3})
    with pytest.raises(ConfigError, match=r"'n_layer' is not a config field. Did you mean 'n_layers'"):
        config().replace(n_layer=3)
    with pytest.raises(ConfigError, match=r"'a_b_c'.*'x_y_z'"):
        HookedTransformerConfig.from_dict({**SIZES, "a_b_c": 3, "x_y_z": 1})


def test_dict_round_trip_survives_json() -> None:
    cfg = config(
        attn_types=("local", "global"), use_local_attn=True, window_size=4, seed=3, dtype="bf16", act_fn="solu"
    )
    again = HookedTransformerConfig.from_dict(json.loads(json.dumps(cfg.to_dict())))
    assert again == cfg
    assert hash(again) == hash(cfg)
    assert set(cfg.to_dict()) == {field.name for field in dataclasses.fields(cfg)}


def test_numpy_sizes_survive_json() -> None:
    cfg = config(d_model=np.int64(16), n_layers=np.int32(2))
    assert cfg == config()
    json.dumps(cfg.to_dict())


def test_identity_and_freezing() -> None:
    assert config() == config()
    assert hash(config()) == hash(config())
    assert config() != config(eps=1e-6)
    assert hash(config()) != hash(config(eps=1e-6))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config().d_model = 3  # type: ignore[misc]


def test_replace_derives_again_what_was_derived() -> None:
    assert config().replace(eps=0.5).eps == 0.5
    assert config().replace(d_head=16).attn_scale == 4.0
    assert config().replace(d_vocab=50).d_vocab_out == 50
    assert config(attn_scale=3.0).replace(d_head=16).attn_scale == 3.0


def test_unwrap() -> None:
    cfg = config()
    assert HookedTransformerConfig.unwrap(cfg) is cfg
    assert HookedTransformerConfig.unwrap(dict(SIZES)) == cfg
    with pytest.raises(ConfigError, match="from_pretrained"):
        HookedTransformerConfig.unwrap("gpt2")  # type: ignore[arg-type]


def test_layer_kinds() -> None:
    local = config(attn_types=("local", "global"), use_local_attn=True, window_size=4)
    assert [local.layer_kind(n).local for n in range(2)] == [True, False]
    assert [config(attn_types=("local", "global")).layer_kind(n) for n in range(2)] == [LayerKind()] * 2


@pytest.mark.parametrize(
    ("dtype", "name"),
    [("fp32", "float32"), ("float64", "float64"), (np.float16, "float16"), (jnp.bfloat16, "bfloat16")],
)
def test_canonical_dtype(dtype: object, name: str) -> None:
    assert canonical_dtype(dtype) == name


def test_canonical_dtype_takes_torch_dtypes_without_torch() -> None:
    class FakeTorchDtype:
        def __str__(self) -> str:
            return "torch.bfloat16"

    assert canonical_dtype(FakeTorchDtype()) == "bfloat16"
