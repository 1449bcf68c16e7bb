"""Which way attention takes: the whole matrix of scores, or some queries at a time."""

import dataclasses

from tljax.config import HookedTransformerConfig, LayerKind

MATRICES = ("hook_attn_scores", "hook_pattern")
"""The points of attention whose values are ``[batch, head, query_pos, key_pos]``."""
MATERIALISED, BLOCKWISE = "materialised", "blockwise"
SHORT_TEXT = 256
"""Most keys for which the matrix is made all the same: smaller blocks would not be faster."""
FEW_QUERIES = 64
"""Fewer queries than this make no large matrix: a step of decoding, a packed run's short suffixes."""


@dataclasses.dataclass(frozen=True)
class AttentionPath:
    """The way that attention takes in one layer.

    Attributes:
        name: ``"materialised"``: scores and pattern ``[batch, head, query_pos, key_pos]`` are made; ``"blockwise"``:
            those of some queries at a time.
        why: the reason, in words.
    """

    name: str
    why: str


def attention_path(cfg: HookedTransformerConfig, queries: int, keys: int, named: bool) -> AttentionPath:
    """Returns the path of one layer's attention.

    It depends on what a program is compiled for (config, shapes, named points), so choosing compiles nothing more.

    Args:
        cfg: the model's config.
        queries: number of queries of a prompt.
        keys: number of keys of a prompt.
        named: whether scores or pattern are named in the run: captured, hooked, or changed by a dictionary.
    """
    if named:
        return AttentionPath(MATERIALISED, "the run names this layer's scores or pattern")
    if cfg.attention_path != "auto":
        return AttentionPath(cfg.attention_path, f"cfg.attention_path is {cfg.attention_path!r}")
    if keys <= SHORT_TEXT:
        return AttentionPath(MATERIALISED, f"no more than {SHORT_TEXT} keys")
    if queries < FEW_QUERIES:
        return AttentionPath(MATERIALISED, f"fewer than {FEW_QUERIES} queries")
    return AttentionPath(BLOCKWISE, f"more than {SHORT_TEXT} keys, and nothing names scores or pattern")


def spliced_at_matrix(kind: LayerKind) -> bool:
    """Whether a dictionary is spliced in at a layer's scores or pattern."""
    return any(point.endswith(MATRICES) for splice in kind.splices for point in (splice.reads, splice.writes))
