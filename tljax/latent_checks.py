"""What must hold of a config's latent attention."""

from typing import TYPE_CHECKING

from tljax.errors import ConfigError

if TYPE_CHECKING:
    from tljax.config import HookedTransformerConfig


def check_latent_attention(cfg: "HookedTransformerConfig") -> None:
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
