"""The FLOPs that a sweep spent, and what it would have spent naively."""

import dataclasses
import functools
from collections.abc import Sequence

from tljax.config import HookedTransformerConfig
from tljax.modules.stack import block_weights


@dataclasses.dataclass(frozen=True)
class SweepReport:
    """Report of what a sweep did and spent.

    Attributes:
        sites: number of sites.
        skipped: sites whose patch changes nothing that the metric reads, so that nothing was run for them.
        reductions: the kinds of work left out, in words.
        metric: how the metric was evaluated.
        flops: floating-point operations spent, base runs included.
        floor_flops: the least an exact sweep of these sites can spend in blocks: for each patched prompt, the tokens
            from the first changed position on, in the layers above the change, without the last layer where the metric
            reads one position.
        naive_flops: one full forward pass a site, all logits.
    """

    sites: int
    skipped: int
    reductions: tuple[str, ...]
    metric: str
    flops: float
    floor_flops: float
    naive_flops: float

    def __str__(self) -> str:
        done = ", ".join(self.reductions) or "no reduction"
        saved = self.naive_flops / max(self.flops, 1.0)
        return (
            f"{self.sites} sites ({self.skipped} without effect): {done}; metric {self.metric}; "
            f"{self.flops:.3g} FLOPs, {saved:.3g} times fewer than one forward pass a site"
        )


def join_reports(reports: Sequence[SweepReport]) -> SweepReport:
    """Joins the reports of several sweeps into one."""
    reductions = dict.fromkeys(reduction for report in reports for reduction in report.reductions)
    return SweepReport(
        sum(report.sites for report in reports),
        sum(report.skipped for report in reports),
        tuple(reductions),
        ", ".join(dict.fromkeys(report.metric for report in reports)),
        sum(report.flops for report in reports),
        sum(report.floor_flops for report in reports),
        sum(report.naive_flops for report in reports),
    )


def block_flops_per_token(cfg: HookedTransformerConfig) -> int:
    """FLOPs of a block's matrices for one token (a multiplication and an addition for each weight)."""
    return sum(_flops_per_token(cfg))


@functools.lru_cache(maxsize=256)
def _flops_per_token(cfg: HookedTransformerConfig) -> tuple[int, int]:
    """Returns FLOPs for what later tokens read of a token (keys and values), and for the rest; means over layers."""
    blocks, layers = [block_weights(cfg, kind) for kind in cfg.layer_kinds], max(cfg.n_layers, 1)
    return 2 * sum(b.read_later for b in blocks) // layers, 2 * sum(b.others for b in blocks) // layers


def block_flops(cfg: HookedTransformerConfig, tokens: int, queries: int, rows: int, query_pos: int, keys: int) -> int:
    """Returns the FLOPs of one block.

    Args:
        cfg: the model's config.
        tokens: tokens whose keys and values are computed.
        queries: tokens whose output is computed.
        rows, query_pos, keys: shape of the attention scores of one head.
    """
    scores = 2 * cfg.n_heads * (cfg.d_head + cfg.value_width) * rows * query_pos * keys
    read_later, others = _flops_per_token(cfg)
    return tokens * read_later + queries * others + scores


def blocks_flops(cfg: HookedTransformerConfig, batch: int, pos: int) -> int:
    """FLOPs of all blocks on whole prompts."""
    return cfg.n_layers * block_flops(cfg, batch * pos, batch * pos, batch, pos, pos)


def forward_flops(cfg: HookedTransformerConfig, batch: int, pos: int) -> int:
    """FLOPs of a full forward pass to all logits."""
    return blocks_flops(cfg, batch, pos) + batch * pos * logits_flops(cfg)


def logits_flops(cfg: HookedTransformerConfig) -> int:
    """FLOPs of unembedding one token to all logits."""
    width = cfg.d_embed or cfg.d_model
    narrowing = 0 if cfg.d_embed is None else cfg.d_model * cfg.d_embed
    return 2 * (narrowing + width * cfg.d_vocab_out)
