"""Validation of a config: the values that each field may take, and the fields that go together."""

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tljax.attention_kernels import KERNELS, refusal
from tljax.checks import check_type, fits
from tljax.errors import ConfigError, nearest

if TYPE_CHECKING:
    from tljax.config import HookedTransformerConfig

PER_LAYER = ("attn_types", "rotary_layers", "moe_layers")
"""Fields with an entry for each layer, where they are set."""
ACTIVATIONS = (
    "relu",
    "relu2",
    "gelu",
    "gelu_new",
    "gelu_fast",
    "gelu_pytorch_tanh",
    "silu",
    "quick_gelu",
    "solu",
    "solu_ln",
    "xielu",
)
NORMALIZATIONS = ("LN", "LNPre", "RMS", "RMSPre", None)
POSITIONAL_EMBEDDINGS = ("standard", "shortformer", "rotary", "alibi", "none")
QK_NORM_SPANS = ("shared", "per_head", "joint")
ROUTERS = ("softmax", "chosen_softmax", "sparsemixer", "sigmoid")
INIT_MODES = (
    "gpt2", "xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal", "muP",
)  # fmt: skip
PRECISIONS = ("highest", "high", "default")
ATTENTION_PATHS = ("auto", "materialised", "blockwise", *KERNELS)
_NO_SIZES = ("seed", "bos_token_id", "pad_token_id")
"""Integer fields that are not sizes, and so may be zero."""
_SAID_ELSEWHERE = (
    "normalization_type", "positional_embedding_type", "attention_dir", "init_mode", "matmul_precision", "qk_norm_type",
    "qk_norm_span", "router", "act_fn", "dtype", "eos_token_ids", "splices", "attention_path",
)  # fmt: skip
"""Fields that are not checked by type: those with a list of choices here, or converted by the config."""
_POSITIVE = (
    "eps", "latent_norm_eps", "alibi_bias_max", "embedding_multiplier", "residual_multiplier", "logits_multiplier",
    "routed_scaling_factor", "rotary_base", "rotary_base_local", "rotary_scaling_factor", "NTK_by_parts_factor",
    "NTK_by_parts_low_freq_factor", "NTK_by_parts_high_freq_factor", "attn_scale", "clip_qkv", "swiglu_limit",
)  # fmt: skip
"""Fields that must be above zero; some may be ``None``, for not used."""


def checked_sizes(cfg: "HookedTransformerConfig") -> dict[str, int]:
    """Returns the sizes that are set, as Python ints.

    Raises:
        ConfigError: a size is not an integer, or too small.
    """
    sizes = {}
    whole = [field.name for field in dataclasses.fields(cfg) if field.type in (int, int | None)]
    for name in (name for name in whole if name not in _NO_SIZES):
        value = getattr(cfg, name)
        if value is None or (value == -1 and name in ("d_head", "n_heads", "d_vocab", "d_vocab_out")):
            continue
        smallest = 0 if name == "n_layers" else 1
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < smallest:
            raise ConfigError(f"{name} must be an integer of at least {smallest}, got {value!r}.")
        sizes[name] = int(value)
    return sizes


def checked_fields(cfg: "HookedTransformerConfig") -> dict[str, Any]:
    """Returns the fields that are flags, numbers or strings, as Python's own types.

    Raises:
        ConfigError: a field has the wrong type (``parallel_attn_mlp="false"`` would count as true), or is not finite.
    """
    plain = {}
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if field.name in _SAID_ELSEWHERE:
            continue
        check_type(value, field.type, field.name, ConfigError)
        value = tuple(map(_as_python, value)) if isinstance(value, list | tuple | np.ndarray) else _as_python(value)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise ConfigError(f"{field.name}={value!r} must be finite.")
        plain[field.name] = value
    return plain


def _as_python(value: Any) -> Any:
    return value.item() if hasattr(value, "dtype") else value


def check(cfg: "HookedTransformerConfig") -> None:
    """Raises ConfigError, saying what was given and what fits, unless ``cfg`` describes a model."""
    _check_choices(cfg)
    _check_ranges(cfg)
    _check_combinations(cfg)
    _check_places_of_norms(cfg)
    _check_embedding(cfg)
    _check_rotary_scaling(cfg)
    _check_latent_attention(cfg)
    _check_experts(cfg)
    _check_special_tokens(cfg)
    if (reason := refusal(cfg)) is not None:
        raise ConfigError(f"attention_path={cfg.attention_path!r}: {reason}. Use 'auto' or 'blockwise'.")


def _check_special_tokens(cfg: "HookedTransformerConfig") -> None:
    for name in ("eos_token_ids", "bos_token_id", "pad_token_id"):
        value = getattr(cfg, name)
        ids = value if isinstance(value, tuple) else () if value is None else (value,)
        if value == () or any(isinstance(one, bool) or not isinstance(one, int) for one in ids):
            several = " or several of them" if name == "eos_token_ids" else ""
            raise ConfigError(f"{name}={value!r} must be a token id, a whole number{several}, or None.")


def _check_choices(cfg: "HookedTransformerConfig") -> None:
    choices = {
        "normalization_type": NORMALIZATIONS,
        "positional_embedding_type": POSITIONAL_EMBEDDINGS,
        "attention_dir": ("causal", "bidirectional"),
        "init_mode": INIT_MODES,
        "matmul_precision": PRECISIONS,
        "attention_path": ATTENTION_PATHS,
        "qk_norm_type": ("RMS", "LN"),
        "qk_norm_span": QK_NORM_SPANS,
        "router": ROUTERS,
    }
    if not cfg.attn_only:
        choices["act_fn"] = ACTIVATIONS
    for name, allowed in choices.items():
        value = getattr(cfg, name)
        if value not in allowed:
            known = [option for option in allowed if option is not None]
            raise ConfigError(f"{name}={value!r} is not one of {known}.{nearest(str(value), known)}")


def _check_ranges(cfg: "HookedTransformerConfig") -> None:
    for field in dataclasses.fields(cfg):
        if field.name in _POSITIVE and (value := getattr(cfg, field.name)) is not None and not value > 0:
            optional = " or None" if fits(None, field.type) else ""
            raise ConfigError(f"{field.name} must be positive{optional}, got {value}.")
    if cfg.router_jitter < 0:
        raise ConfigError(f"router_jitter must be 0 or more, got {cfg.router_jitter}.")
    if cfg.use_NTK_by_parts_rope and not cfg.NTK_by_parts_low_freq_factor < cfg.NTK_by_parts_high_freq_factor:
        raise ConfigError(
            f"NTK_by_parts_low_freq_factor={cfg.NTK_by_parts_low_freq_factor} must be below "
            f"NTK_by_parts_high_freq_factor={cfg.NTK_by_parts_high_freq_factor}: frequencies between them are blended."
        )


def _check_combinations(cfg: "HookedTransformerConfig") -> None:
    if cfg.n_heads % cfg.kv_heads:
        raise ConfigError(
            f"n_heads={cfg.n_heads} is not a multiple of n_key_value_heads={cfg.n_key_value_heads}: "
            "each key/value head serves a whole group of query heads."
        )
    if cfg.rotary_dim is not None and (cfg.rotary_dim % 2 or cfg.rotary_dim > cfg.d_head):
        raise ConfigError(f"rotary_dim={cfg.rotary_dim} must be even and at most d_head={cfg.d_head}.")
    if cfg.use_local_attn and (cfg.window_size is None or cfg.attn_types is None):
        raise ConfigError("use_local_attn needs window_size and attn_types ('global' or 'local' for each layer).")
    for name in PER_LAYER:
        value = getattr(cfg, name)
        if value is not None and len(value) != cfg.n_layers:
            raise ConfigError(f"{name} has {len(value)} entries for n_layers={cfg.n_layers}.")
    rotates = cfg.positional_embedding_type == "rotary"
    if not rotates and (cfg.rotary_layers or cfg.rotary_base_local is not None or cfg.qk_norm_after_rotary):
        raise ConfigError(
            "rotary_layers, rotary_base_local and qk_norm_after_rotary need positional_embedding_type='rotary', "
            f"got {cfg.positional_embedding_type!r}."
        )
    if cfg.attn_types is not None and set(cfg.attn_types) - {"global", "local"}:
        raise ConfigError(f"attn_types may hold 'global' and 'local', got {sorted(set(cfg.attn_types))}.")
    if cfg.gated_mlp and cfg.act_fn is not None and cfg.act_fn.endswith("_ln"):
        raise ConfigError(f"act_fn={cfg.act_fn!r} normalises inside the MLP and has no gated form.")
    if cfg.gated_mlp_bias and (not cfg.gated_mlp or cfg.attn_only):
        raise ConfigError("gated_mlp_bias gives the two branches of a gated MLP their biases: set gated_mlp too.")
    if cfg.attn_only and cfg.parallel_attn_mlp:
        raise ConfigError("attn_only has no MLP to run in parallel: set one of attn_only, parallel_attn_mlp.")
    if cfg.attn_only and cfg.use_hook_mlp_in:
        raise ConfigError("use_hook_mlp_in: an attention-only model has no MLP input.")
    if cfg.has_norms_after and cfg.normalization_type is None:
        raise ConfigError(
            "use_normalization_before_and_after and use_normalization_after_only need a normalization_type, got None."
        )
    if cfg.alibi_rounded and cfg.positional_embedding_type != "alibi":
        raise ConfigError(f"alibi_rounded needs alibi, got {cfg.positional_embedding_type!r} positional embeddings.")
    if cfg.use_attn_in and cfg.kv_heads != cfg.n_heads:
        raise ConfigError("use_attn_in needs as many key/value as query heads; use use_split_qkv_input.")


def _check_places_of_norms(cfg: "HookedTransformerConfig") -> None:
    ways = ("use_normalization_before_and_after", "use_normalization_after_only", "use_normalization_of_residual")
    if len(chosen := [name for name in ways if getattr(cfg, name)]) > 1:
        raise ConfigError(f"Set one of {', '.join(ways)}, or none; got {', '.join(chosen)}.")
    if cfg.use_normalization_of_residual and (cfg.normalization_type is None or cfg.parallel_attn_mlp):
        raise ConfigError(
            "use_normalization_of_residual needs a normalization_type and blocks in sequence, got "
            f"normalization_type={cfg.normalization_type!r}, parallel_attn_mlp={cfg.parallel_attn_mlp}."
        )


def _check_embedding(cfg: "HookedTransformerConfig") -> None:
    if cfg.d_embed is None:
        return
    if cfg.has_final_norm or cfg.post_embedding_ln:
        raise ConfigError(
            f"d_embed={cfg.d_embed} puts a projection where a final norm or post_embedding_ln would be folded: use it "
            "with use_normalization_of_residual or normalization_type=None, without post_embedding_ln."
        )


def _check_experts(cfg: "HookedTransformerConfig") -> None:
    experts, chosen = cfg.num_experts, cfg.experts_per_token
    if (experts is None) != (chosen is None):
        raise ConfigError(
            f"num_experts and experts_per_token go together, got {experts} and {chosen}: set both or neither."
        )
    if experts is None or chosen is None:
        if cfg.moe_layers is not None or cfg.d_shared_expert is not None:
            raise ConfigError("moe_layers and d_shared_expert need num_experts and experts_per_token.")
        return
    if cfg.attn_only or (cfg.act_fn or "").endswith(("_ln", "xielu")):
        raise ConfigError(f"num_experts={experts} needs an activation without parameters (attn_only, act_fn).")
    if chosen > experts:
        raise ConfigError(f"experts_per_token={chosen} is more than num_experts={experts}.")
    if cfg.router == "sparsemixer" and chosen != 2:
        raise ConfigError(f"router='sparsemixer' chooses 2 experts, got experts_per_token={chosen}.")
    groups, of_them = cfg.expert_groups or 1, cfg.expert_groups_per_token or 1
    if experts % groups or of_them > groups or chosen > experts // groups * of_them:
        raise ConfigError(
            f"expert_groups={cfg.expert_groups}, expert_groups_per_token={cfg.expert_groups_per_token}: "
            f"{experts} experts must fall into equal groups, of which the chosen ones hold at least {chosen}."
        )


def _check_rotary_scaling(cfg: "HookedTransformerConfig") -> None:
    """Raises ConfigError unless at most one scaling is in use, with numbers that make sense."""
    uses = {
        "rotary_scaling_factor": cfg.rotary_scaling_factor != 1.0,
        "use_NTK_by_parts_rope": cfg.use_NTK_by_parts_rope,
        "use_yarn_rope": cfg.use_yarn_rope,
        "longrope_short_factor and longrope_long_factor": cfg.uses_longrope,
        "use_dynamic_ntk_rope": cfg.use_dynamic_ntk_rope,
    }
    used = [name for name, is_used in uses.items() if is_used]
    if used and cfg.positional_embedding_type != "rotary":
        raise ConfigError(f"{used[0]} needs positional_embedding_type='rotary', got {cfg.positional_embedding_type!r}.")
    if len(used) > 1:
        raise ConfigError(f"Rotary positions are scaled in one way only, got {', '.join(used)}: keep one of them.")
    _check_yarn(cfg)
    if cfg.uses_longrope:
        for name in ("longrope_short_factor", "longrope_long_factor"):
            _check_factors(name, getattr(cfg, name), (cfg.rotary_dim or 0) // 2)
        if cfg.longrope_attention_factor <= 0:
            raise ConfigError(f"longrope_attention_factor must be positive, got {cfg.longrope_attention_factor}.")
    if cfg.use_dynamic_ntk_rope:
        _check_dynamic(cfg)


def _check_yarn(cfg: "HookedTransformerConfig") -> None:
    if cfg.yarn_global_attn_only and not cfg.use_yarn_rope:
        raise ConfigError("yarn_global_attn_only says where YaRN is used: set use_yarn_rope too.")
    if not cfg.use_yarn_rope:
        return
    if not cfg.yarn_factor >= 1:
        raise ConfigError(f"yarn_factor stretches the context and must be at least 1, got {cfg.yarn_factor}.")
    if not cfg.yarn_attention_factor > 0:
        raise ConfigError(f"yarn_attention_factor must be positive, got {cfg.yarn_attention_factor}.")
    if not cfg.yarn_beta_fast >= cfg.yarn_beta_slow > 0:
        raise ConfigError(
            f"yarn_beta_fast={cfg.yarn_beta_fast} and yarn_beta_slow={cfg.yarn_beta_slow} are turns within the "
            "original context: both positive, the fast one not below the slow one."
        )


def _check_factors(name: str, factors: Sequence[float] | None, n_pairs: int) -> None:
    if factors is None:
        raise ConfigError(f"{name} is not set: long rope needs longrope_short_factor and longrope_long_factor.")
    if len(factors) != n_pairs:
        raise ConfigError(f"{name} has {len(factors)} entries for {n_pairs} rotated pairs (rotary_dim / 2).")
    if not all(factor > 0 for factor in factors):
        raise ConfigError(f"{name} must hold positive numbers, got {min(factors)}.")


def _check_dynamic(cfg: "HookedTransformerConfig") -> None:
    if not cfg.dynamic_ntk_factor >= 1:
        raise ConfigError(
            f"dynamic_ntk_factor stretches the context and must be at least 1, got {cfg.dynamic_ntk_factor}."
        )
    if cfg.train_seq_length is None:
        raise ConfigError("use_dynamic_ntk_rope needs train_seq_length, the context before any stretching.")
    if cfg.n_ctx > cfg.train_seq_length:
        raise ConfigError(
            f"n_ctx={cfg.n_ctx} is longer than train_seq_length={cfg.train_seq_length}. Beyond it a model with dynamic "
            "NTK rope changes its frequencies with every token, which tljax does not compute: ask for at most "
            f"n_ctx={cfg.train_seq_length}."
        )


def _check_latent_attention(cfg: "HookedTransformerConfig") -> None:
    """Raises ConfigError unless the fields of latent attention fit each other."""
    if cfg.kv_lora_rank is None:
        if cfg.q_lora_rank is not None:
            raise ConfigError("q_lora_rank needs kv_lora_rank: queries have a latent only where keys and values do.")
        return
    if cfg.positional_embedding_type != "rotary":
        raise ConfigError(
            f"kv_lora_rank={cfg.kv_lora_rank}: latent attention needs positional_embedding_type='rotary', got "
            f"{cfg.positional_embedding_type!r}."
        )
    if cfg.rotary_dim is None or cfg.rotary_dim >= cfg.d_head:
        raise ConfigError(
            f"kv_lora_rank={cfg.kv_lora_rank}: rotary_dim={cfg.rotary_dim} of the d_head={cfg.d_head} dimensions of a "
            "key rotate, and the latent makes the others: give a smaller rotary_dim."
        )
    if cfg.kv_heads != cfg.n_heads:
        raise ConfigError(
            f"kv_lora_rank={cfg.kv_lora_rank} makes keys and values for each of the n_heads={cfg.n_heads}: leave out "
            f"n_key_value_heads={cfg.n_key_value_heads}."
        )
    if cfg.use_qk_norm or cfg.clip_qkv is not None:
        raise ConfigError("kv_lora_rank: latent attention has norms on its latents, not use_qk_norm or clip_qkv.")
