"""Command R7B and Command A (``Cohere2ForCausalLM``): Command R in which only layers with a window rotate."""

from typing import Any

from tljax.checkpoints.families import cohere
from tljax.checkpoints.families.llama import IGNORED, read_window, write_layer_types
from tljax.checkpoints.family import Family, sizes
from tljax.checkpoints.formats.hf_config import HFConfig
from tljax.config import HookedTransformerConfig


def read_config(hf: HFConfig) -> HookedTransformerConfig:
    """Returns our config for a ``Cohere2Config``."""
    hf.only(  # the first releases say in words what transformers always does
        order_of_interleaved_layers="local_attn_first",
        position_embedding_type="rope_gptj",
        rotary_pct=1.0,
        use_gated_activation=True,
        use_parallel_block=True,
        use_embedding_sharing=hf("tie_word_embeddings", True),
        use_qk_norm=False,
        head_dim=hf("hidden_size") // hf("num_attention_heads"),
    )
    period = hf("sliding_window_pattern", 4)
    hf.only(layer_switch=period, _sliding_window_pattern=period)  # say it again
    local = [(layer + 1) % period != 0 for layer in range(hf("num_hidden_layers"))]
    window = read_window(hf, hf("sliding_window", 4096, null=None), local)
    return cohere.read_cohere(hf, rotary_layers=rotating_locally(hf, window), **window)


def rotating_locally(hf: HFConfig, window: dict[str, Any]) -> tuple[bool, ...] | None:
    """Returns which layers rotate where only those with a window do; ``None`` for all."""
    kinds = window.get("attn_types", ("global",) * hf("num_hidden_layers"))
    rotating = tuple(kind == "local" for kind in kinds)
    return None if all(rotating) else rotating


def write_config(cfg: HookedTransformerConfig, nonzero: frozenset[str]) -> dict[str, Any]:
    """Returns the ``Cohere2Config`` attributes of ``cfg``."""
    return cohere.write_cohere(cfg, nonzero) | {
        "sliding_window": cfg.window_size,
        "layer_types": write_layer_types(cfg),
    }


COHERE2 = Family(
    architecture="Cohere2ForCausalLM",
    model_type="cohere2",
    read_config=read_config,
    write_config=write_config,
    rows=cohere.rows,
    prefix="model.",
    ignored=IGNORED,
    defaults=sizes(d_model=8192, n_layers=40, n_heads=64, d_mlp=22528, n_ctx=8192, d_vocab=256000),
    inert={"how the embedding was spread over devices": "use_parallel_embedding"},
    own_code="cohere2",
)
