"""The parameters of a config: their dotted paths, axes and shapes, and the nested tree of them.

The stored layout puts the contracted axis first (``W_Q`` is ``[d_model, n_heads, d_head]``), so that no call
has to transpose a weight.
"""

import functools
from collections.abc import Mapping
from typing import Any

from tljax.config import HookedTransformerConfig
from tljax.hooks.points import EMBEDDING, HEAD, stage_of
from tljax.modules.block import TransformerBlock
from tljax.modules.embedding import EmbeddingStage, HeadStage
from tljax.modules.parameters import axis_sizes
from tljax.modules.stack import stage_axes
from tljax.typing import Params


def parameter_axes(cfg: HookedTransformerConfig) -> dict[str, tuple[str, ...]]:
    """Returns the axis names of every parameter, by dotted path such as ``"blocks.3.attn.W_Q"``.

    The modules declare these names with their parameters. A sharding rule by axes, such as ``"n_heads"`` over a mesh's
    ``"model"``, needs only these names and :func:`axis_sizes`.
    """
    axes = dict(stage_axes(EmbeddingStage, cfg))
    for layer, kind in enumerate(cfg.layer_kinds):
        axes |= {f"blocks.{layer}.{name}": names for name, names in stage_axes(TransformerBlock, cfg, kind).items()}
    return axes | dict(stage_axes(HeadStage, cfg))


@functools.lru_cache(maxsize=64)
def parameter_shapes(cfg: HookedTransformerConfig) -> Mapping[str, tuple[int, ...]]:
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
    """Returns the leaves of nested parameters by dotted path; a block's path contains its index."""
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
    """Inverts :func:`flatten`: returns nested parameters, with the blocks as a tuple in layer order."""
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
