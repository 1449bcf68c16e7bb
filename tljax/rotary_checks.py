"""What must hold of a config's rotary scaling."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tljax.errors import ConfigError

if TYPE_CHECKING:
    from tljax.config import HookedTransformerConfig


def check_rotary_scaling(cfg: "HookedTransformerConfig") -> None:
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
