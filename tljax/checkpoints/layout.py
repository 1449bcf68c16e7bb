"""What parameters a config has: their dotted paths, axes and shapes, and the nested tree they live in.

The stored layout puts the contracted axis first (``W_Q`` is ``[d_model, n_heads, d_head]``), so that no call
has to transpose a weight.
"""

from collections.abc import Mapping
from typing import Any

from tljax.config import HookedTransformerConfig
from tljax.modules.norm import post_norm_kind
from tljax.typing import Params

HEAD, EMBED, BLOCKS = "head", "embed", "blocks."


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
        "d_mlp": cfg.d_mlp or 0,
        "d_vocab": cfg.d_vocab,
        "d_vocab_out": cfg.d_vocab_out,
    }


def parameter_axes(cfg: HookedTransformerConfig) -> dict[str, tuple[str, ...]]:
    """Returns the axis names of every parameter, by dotted path such as ``"blocks.3.attn.W_Q"``."""
    axes = {"embed.W_E": "d_vocab d_model"}
    if cfg.positional_embedding_type == "standard":
        axes["pos_embed.W_pos"] = "n_ctx d_model"
    block = _block_axes(cfg)
    for layer in range(cfg.n_layers):
        axes |= {f"blocks.{layer}.{name}": spec for name, spec in block.items()}
    kind = "RMS" if cfg.final_rms and cfg.normalization_type == "LN" else cfg.normalization_type
    axes |= _norm_axes("ln_final", kind, "d_model")
    axes |= {"unembed.W_U": "d_model d_vocab_out", "unembed.b_U": "d_vocab_out"}
    return {path: tuple(spec.split()) for path, spec in axes.items()}


def parameter_shapes(cfg: HookedTransformerConfig) -> dict[str, tuple[int, ...]]:
    """Returns the stored shape of every parameter, by dotted path."""
    sizes = axis_sizes(cfg)
    return {path: tuple(sizes[axis] for axis in axes) for path, axes in parameter_axes(cfg).items()}


def stage_of(path: str) -> str:
    """Returns the loading stage of a path: ``"embed"``, ``"blocks.3"`` or ``"head"``.

    >>> [stage_of(path) for path in ("pos_embed.W_pos", "blocks.3.ln1.w", "unembed.b_U")]
    ['embed', 'blocks.3', 'head']
    """
    first, *rest = path.split(".")
    if path.startswith(BLOCKS):
        return BLOCKS + rest[0]
    return HEAD if first in ("ln_final", "unembed") else EMBED


def stages_of(cfg: HookedTransformerConfig) -> dict[str, list[str]]:
    """Returns the paths of each stage in loading order: the head, with the largest temporaries, first."""
    stages: dict[str, list[str]] = {HEAD: [], EMBED: []}
    for path in parameter_axes(cfg):
        stages.setdefault(stage_of(path), []).append(path)
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


def _block_axes(cfg: HookedTransformerConfig) -> dict[str, str]:
    axes = _norm_axes("ln1", cfg.normalization_type, "d_model")
    axes |= {
        "attn.W_Q": "d_model n_heads d_head",
        "attn.W_K": "d_model n_kv d_head",
        "attn.W_V": "d_model n_kv d_head",
        "attn.W_O": "n_heads d_head d_model",
        "attn.b_Q": "n_heads d_head",
        "attn.b_K": "n_kv d_head",
        "attn.b_V": "n_kv d_head",
        "attn.b_O": "d_model",
    }
    if cfg.use_qk_norm:
        axes |= {"attn.q_norm.w": "d_head", "attn.k_norm.w": "d_head"}
    axes |= _norm_axes("ln1_post", post_norm_kind(cfg), "d_model")
    if cfg.attn_only:
        return axes
    axes |= _norm_axes("ln2_post", post_norm_kind(cfg), "d_model")
    axes |= _norm_axes("ln2", cfg.normalization_type, "d_model")
    axes |= {
        "mlp.W_in": "d_model d_mlp",
        "mlp.W_out": "d_mlp d_model",
        "mlp.b_in": "d_mlp",
        "mlp.b_out": "d_model",
    }
    if cfg.gated_mlp:
        axes["mlp.W_gate"] = "d_model d_mlp"
    if cfg.act_fn == "solu_ln":
        axes |= _norm_axes("mlp.ln", "LN" if cfg.normalization_type == "LN" else None, "d_mlp")
    return axes


def _norm_axes(name: str, kind: str | None, axis: str) -> dict[str, str]:
    if kind == "LN":
        return {f"{name}.w": axis, f"{name}.b": axis}
    return {f"{name}.w": axis} if kind == "RMS" else {}
