"""What parameters a config has: their dotted paths, axes and shapes, and the nested tree they live in.

The stored layout puts the contracted axis first (``W_Q`` is ``[d_model, n_heads, d_head]``), so that no call
has to transpose a weight.
"""

from collections.abc import Mapping
from typing import Any

from tljax.config import HookedTransformerConfig, LayerKind
from tljax.hooks.points import EMBEDDING, HEAD, stage_of
from tljax.modules.norm import block_norm_kind, final_norm_kind, post_norm_kind
from tljax.typing import Params


def axis_sizes(cfg: HookedTransformerConfig) -> dict[str, int]:
    """Returns the length of every parameter axis.

    >>> cfg = HookedTransformerConfig(d_model=8, n_heads=4, n_key_value_heads=2, n_layers=1, n_ctx=5)
    >>> axis_sizes(cfg)["n_kv"], axis_sizes(cfg)["d_head"]
    (2, 2)
    """
    return {
        "d_model": cfg.d_model,
        "n_ctx": cfg.n_ctx,
        "n_heads": cfg.n_heads,
        "n_kv": cfg.kv_heads,
        "d_head": cfg.d_head,
        "d_value": cfg.value_width,
        "d_rotary": cfg.rotary_dim or 0,
        "d_unrotated": cfg.d_head - (cfg.rotary_dim or 0),
        "q_rank": cfg.q_lora_rank or 0,
        "kv_rank": cfg.kv_lora_rank or 0,
        "q_width": cfg.n_heads * cfg.d_head,
        "kv_width": cfg.kv_heads * cfg.d_head,
        "d_mlp": cfg.d_mlp or 0,
        "n_experts": cfg.num_experts or 0,
        "d_expert": cfg.d_expert or 0,
        "d_shared": cfg.d_shared_expert or 0,
        "one": 1,
        "d_embed": cfg.d_embed or 0,
        "d_vocab": cfg.d_vocab,
        "d_vocab_out": cfg.d_vocab_out,
    }


def parameter_axes(cfg: HookedTransformerConfig) -> dict[str, tuple[str, ...]]:
    """Returns the axis names of every parameter, by dotted path such as ``"blocks.3.attn.W_Q"``."""
    width = "d_model" if cfg.d_embed is None else "d_embed"
    axes = {"embed.W_E": f"d_vocab {width}"} | _norm_axes(
        "embed.ln", "LN" if cfg.post_embedding_ln else None, "d_model"
    )
    if cfg.d_embed is not None:
        axes |= {"embed.W_proj": "d_embed d_model", "unembed.W_proj": "d_model d_embed"}
    if cfg.learns_positions:
        axes["pos_embed.W_pos"] = "n_ctx d_model"
    blocks = {kind: _block_axes(cfg, kind) for kind in cfg.layer_kinds}
    for layer, kind in enumerate(cfg.layer_kinds):
        block = blocks[kind]
        axes |= {f"blocks.{layer}.{name}": spec for name, spec in block.items()}
    axes |= _norm_axes("ln_final", final_norm_kind(cfg), "d_model")
    axes |= {"unembed.W_U": f"{width} d_vocab_out", "unembed.b_U": "d_vocab_out"}
    return {path: tuple(spec.split()) for path, spec in axes.items()}


def parameter_shapes(cfg: HookedTransformerConfig) -> dict[str, tuple[int, ...]]:
    """Returns the stored shape of every parameter, by dotted path."""
    sizes = axis_sizes(cfg)
    return {path: tuple(sizes[axis] for axis in axes) for path, axes in parameter_axes(cfg).items()}


def stages_of(cfg: HookedTransformerConfig) -> dict[str, list[str]]:
    """Returns the paths of each stage in loading order: the head, with the largest temporaries, first."""
    stages: dict[str, list[str]] = {HEAD: [], EMBEDDING: []}
    for path in parameter_axes(cfg):
        stages.setdefault(stage_of(path)[0], []).append(path)
    return stages


def flatten(params: Params) -> dict[str, Any]:
    """Returns the leaves of nested parameters by dotted path; a block's path carries its index."""
    flat: dict[str, Any] = {}
    pending: list[tuple[str, Any]] = [("", params)]
    while pending:
        prefix, node = pending.pop()
        children = enumerate(node) if isinstance(node, tuple | list) else node.items()
        for key, child in children:
            if isinstance(child, Mapping | tuple | list):
                pending.append((f"{prefix}{key}.", child))
            else:
                flat[f"{prefix}{key}"] = child
    return flat


def unflatten(flat: Mapping[str, Any]) -> Params:
    """Returns the nested parameters of :func:`flatten`'s output, blocks as a tuple in layer order."""
    nested: Params = {}
    for path, leaf in flat.items():
        *parents, name = path.split(".")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    if "blocks" in nested:
        nested["blocks"] = tuple(nested["blocks"][str(layer)] for layer in range(len(nested["blocks"])))
    return nested


def _block_axes(cfg: HookedTransformerConfig, kind: LayerKind) -> dict[str, str]:
    axes = _norm_axes("ln1", block_norm_kind(cfg), "d_model")
    value = "d_head" if cfg.d_value is None else "d_value"
    axes |= {"attn.W_O": f"n_heads {value} d_model", "attn.b_O": "d_model"}
    axes |= _reader_axes(value) if cfg.kv_lora_rank is None else _latent_axes(cfg, value)
    if cfg.use_qk_norm:
        for letter, heads, width in (("q", "n_heads", "q_width"), ("k", "n_kv", "kv_width")):
            spans = {"shared": "d_head", "per_head": f"{heads} d_head", "joint": width}
            axes |= _norm_axes(f"attn.{letter}_norm", cfg.qk_norm_type, spans[cfg.qk_norm_span])
    if cfg.use_attention_sinks:
        axes["attn.sinks"] = "n_heads"
    axes |= _norm_axes("ln1_post", post_norm_kind(cfg), "d_model")
    if cfg.attn_only:
        return axes
    axes |= _norm_axes("ln2_post", post_norm_kind(cfg), "d_model")
    axes |= _norm_axes("ln2", block_norm_kind(cfg), "d_model")
    if kind.experts:
        return axes | _experts_axes(cfg)
    axes |= _mlp_axes(cfg, "mlp", "d_mlp")
    if cfg.act_fn == "xielu":
        axes |= {"mlp.act.alpha_p": "one", "mlp.act.alpha_n": "one", "mlp.act.beta": "", "mlp.act.eps": ""}
    if cfg.act_fn == "solu_ln":
        axes |= _norm_axes("mlp.ln", "LN" if cfg.normalization_type == "LN" else None, "d_mlp")
    return axes


def _reader_axes(value: str) -> dict[str, str]:
    return {
        "attn.W_Q": "d_model n_heads d_head",
        "attn.W_K": "d_model n_kv d_head",
        "attn.W_V": f"d_model n_kv {value}",
        "attn.b_Q": "n_heads d_head",
        "attn.b_K": "n_kv d_head",
        "attn.b_V": f"n_kv {value}",
    }


def _latent_axes(cfg: HookedTransformerConfig, value: str) -> dict[str, str]:
    if cfg.q_lora_rank is None:
        axes = {"attn.W_Q": "d_model n_heads d_head", "attn.b_Q": "n_heads d_head"}
    else:
        axes = {"attn.W_Q_down": "d_model q_rank", "attn.b_Q_down": "q_rank", "attn.W_Q_up": "q_rank n_heads d_head"}
        axes |= _norm_axes("attn.q_latent_norm", "RMS", "q_rank")
    return axes | {
        "attn.W_KV_down": "d_model kv_rank",
        "attn.b_KV_down": "kv_rank",
        "attn.W_K_rot": "d_model d_rotary",
        "attn.b_K_rot": "d_rotary",
        "attn.kv_latent_norm.w": "kv_rank",
        "attn.W_K_up": "kv_rank n_heads d_unrotated",
        "attn.W_V_up": f"kv_rank n_heads {value}",
    }


def _mlp_axes(cfg: HookedTransformerConfig, name: str, width: str) -> dict[str, str]:
    axes = {"W_in": f"d_model {width}", "W_out": f"{width} d_model", "b_in": width, "b_out": "d_model"}
    if cfg.gated_mlp:
        axes["W_gate"] = f"d_model {width}"
    if cfg.gated_mlp_bias:
        axes["b_gate"] = width
    return {f"{name}.{leaf}": spec for leaf, spec in axes.items()}


def _experts_axes(cfg: HookedTransformerConfig) -> dict[str, str]:
    axes = {
        "mlp.W_router": "d_model n_experts",
        "mlp.experts.W_in": "n_experts d_model d_expert",
        "mlp.experts.W_out": "n_experts d_expert d_model",
    }
    if cfg.gated_mlp:
        axes["mlp.experts.W_gate"] = "n_experts d_model d_expert"
    if cfg.expert_biases:
        widths = {"in": "d_expert", "out": "d_model"} | ({"gate": "d_expert"} if cfg.gated_mlp else {})
        axes |= {f"mlp.experts.b_{name}": f"n_experts {width}" for name, width in widths.items()}
        axes["mlp.b_router"] = "n_experts"
    if cfg.router == "sigmoid":
        axes["mlp.b_choice"] = "n_experts"
    if cfg.d_shared_expert is not None:
        axes |= _mlp_axes(cfg, "mlp.shared", "d_shared")
        if cfg.gate_shared_expert:
            axes["mlp.W_shared_gate"] = "d_model one"
    return axes


def _norm_axes(name: str, kind: str | None, axis: str) -> dict[str, str]:
    if kind == "LN":
        return {f"{name}.w": axis, f"{name}.b": axis}
    return {f"{name}.w": axis} if kind == "RMS" else {}
