"""OLMo 3 (``Olmo3ForCausalLM``): OLMo 2 with a window in three of four layers; YaRN stretches only the others."""

from typing import Any

from tljax.checkpoints.families import olmo2
from tljax.checkpoints.families.llama import IGNORED, read_window, write_layer_types
from tljax.checkpoints.family import Family, sizes
from tljax.checkpoints.formats.hf_config import HFConfig
from tljax.config import HookedTransformerConfig

LOCAL, GLOBAL = "sliding_attention", "full_attention"
THETA = 500000.0


def read_config(hf: HFConfig) -> HookedTransformerConfig:
    """Returns our config for an ``Olmo3Config``."""
    local = [(layer + 1) % 4 != 0 for layer in range(hf("num_hidden_layers"))]
    window = read_window(hf, hf("sliding_window", 4096, null=None), local)
    cfg = olmo2.read_olmo2(hf, theta=THETA, layer_type=GLOBAL, **window)
    base = _local_base(hf)
    # under YaRN alone layers with a window are unscaled by themselves
    plain = cfg.use_yarn_rope and base == cfg.rotary_base
    return cfg if plain else cfg.replace(rotary_base_local=base)


def _local_base(hf: HFConfig) -> float:
    own = dict(hf("rope_parameters", {}).get(LOCAL) or {})
    if own.pop("rope_type", "default") != "default":
        raise hf.unsupported(f"rope_parameters[{LOCAL!r}]", hf("rope_parameters")[LOCAL], "rope_type 'default'")
    if "rope_theta" not in own and hf("rope_theta", THETA) != THETA:  # versions of transformers differ on whose it is
        raise hf.unsupported("rope_theta", hf("rope_theta"), f"{THETA}, or a rope_theta for each type of layer")
    return float(own.get("rope_theta", THETA))


def write_config(cfg: HookedTransformerConfig, nonzero: frozenset[str]) -> dict[str, Any]:
    """Returns the ``Olmo3Config`` attributes of ``cfg``."""
    attributes = olmo2.write_config(cfg, nonzero)
    theta, scaling = attributes.pop("rope_theta"), attributes.pop("rope_scaling") or {"rope_type": "default"}
    local = theta if cfg.rotary_base_local is None else cfg.rotary_base_local
    return attributes | {
        "sliding_window": cfg.window_size,
        "layer_types": write_layer_types(cfg),
        "rope_parameters": {
            GLOBAL: scaling | {"rope_theta": theta},
            LOCAL: {"rope_type": "default", "rope_theta": local},
        },
    }


OLMO3 = Family(
    architecture="Olmo3ForCausalLM",
    model_type="olmo3",
    read_config=read_config,
    write_config=write_config,
    rows=olmo2.rows,
    prefix="model.",
    ignored=IGNORED,
    defaults=sizes(d_model=4096, n_layers=32, n_heads=32, d_mlp=11008, n_ctx=2048, d_vocab=50304),
)
