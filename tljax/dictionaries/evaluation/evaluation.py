"""The result of an evaluation."""

import dataclasses
from typing import Any

import numpy as np

from tljax.dictionaries.evaluation.figures import Figures
from tljax.dictionaries.evaluation.weights import WeightFigures

_BINS = np.arange(-10.0, 0.01, 0.25)
"""Edges of the histogram of log10 density, as in most dashboards."""
_WORDS = {
    "l0": "features active at a token",
    "mse": "squared error of a token",
    "explained_variance": "ratio of means over all tokens",
    "explained_variance_legacy": "mean of each token's ratio",
    "explained_variance_centered": "ratio of variances (dictionary_learning)",
    "fvu": "fraction of variance unexplained",
    "relative_error": "mean of |x - x_hat|^2 / |x|^2",
    "cossim": "mean cosine",
    "l2_ratio": "mean of |x_hat| / |x|",
    "relative_reconstruction_bias": "1: no shrinkage",
    "ce_loss_without_sae": "nats, the model as it is",
    "ce_loss_with_sae": "nats, spliced",
    "ce_loss_with_ablation": "nats, the site zero",
    "ce_loss_increase": "nats, spliced less clean",
    "ce_loss_score": "1: as clean, 0: as zero",
    "kl_div_with_sae": "nats, KL(clean || spliced)",
    "kl_div_with_ablation": "nats, KL(clean || zero)",
    "kl_div_score": "1: as clean, 0: as zero",
}
"""Rows of the table, with what each is."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class FeatureFigures:
    """Numbers of each feature, ``[d_sae]``.

    Attributes:
        density: share of the tokens that count at which it is active.
        prompts_fired: prompts in which it is active at a token that counts.
        consistent_activation_heuristic: tokens at which it is active, for each prompt in which it is; NaN if none.
        mean_activation: mean over the tokens at which it is active; NaN if none.
        largest_activation: the largest, 0 if it is never active.
    """

    density: np.ndarray
    prompts_fired: np.ndarray
    consistent_activation_heuristic: np.ndarray
    mean_activation: np.ndarray
    largest_activation: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class DictionaryEvaluation:
    """How well a dictionary explains its site, and what the model loses by it. Prints as a table.

    Attributes:
        figures: the numbers, over all tokens that count.
        low, high: ends of their bootstrap intervals over prompts; ``None`` without a bootstrap or with one prompt.
        confidence: share of resamples between the two.
        ordinary: the numbers without tokens of a massive norm, which often decide a ratio of means by themselves.
        massive: the numbers of those tokens alone; variance is taken about the mean of all tokens.
        by_position: the numbers at each position, arrays ``[pos]``; variance is taken about the mean of all tokens.
        features: numbers of each feature.
        weights: what the weights say.
        n_prompts: number of prompts.
        n_text_tokens: number of their tokens, with those that do not count.
        reads, writes: the points.
        name: the dictionary, in words.
        by_batch: ``[batch]`` of ``E |x_hat|^2 / E <x, x_hat>``, which SAELens averages.
    """

    figures: Figures
    low: Figures | None
    high: Figures | None
    confidence: float
    ordinary: Figures
    massive: Figures
    by_position: Figures
    features: FeatureFigures
    weights: WeightFigures
    n_prompts: int
    n_text_tokens: int
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    name: str
    by_batch: np.ndarray

    @property
    def dead(self) -> np.ndarray:
        """Numbers of the features that were never active."""
        return np.flatnonzero(self.features.density == 0)

    @property
    def density_histogram(self) -> tuple[np.ndarray, np.ndarray]:
        """Counts of features by log10 density, and the bins' edges; features that were never active are left out."""
        alive = self.features.density[self.features.density > 0]
        return np.histogram(np.log10(alive).clip(_BINS[0], _BINS[-1]), _BINS)

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as numbers, lists and dicts that JSON can hold (NaN included, as Python writes it).

        The numbers over all tokens are at the top by their names, the rest under ``low``, ``high``, ``ordinary``,
        ``massive``, ``by_position``, ``features`` and ``weights``.
        """
        parts = {"low": self.low, "high": self.high, "ordinary": self.ordinary, "massive": self.massive}
        counts, edges = self.density_histogram
        return {
            **self.figures.to_dict(),
            "n_prompts": self.n_prompts,
            "dead": self.dead.tolist(),
            "density_histogram": {"counts": counts.tolist(), "log10_edges": edges.tolist()},
            **{name: None if part is None else part.to_dict() for name, part in parts.items()},
            "by_position": self.by_position.to_dict(),
            "features": {name: values.tolist() for name, values in vars(self.features).items()},
            "weights": {name: values.tolist() for name, values in vars(self.weights).items()},
            "dictionary": {"name": self.name, "reads": list(self.reads), "writes": list(self.writes)},
        }

    def saelens(self) -> dict[str, Any]:
        """Returns the numbers in the form and by the definitions of SAELens's ``run_evals``.

        ``relative_reconstruction_bias`` is the mean over batches here, and so depends on ``batch_size``.
        """
        f, weights, features = self.figures, self.weights, self.features
        ce = ("ce_loss_score", "ce_loss_with_ablation", "ce_loss_with_sae", "ce_loss_without_sae")
        groups = {
            "model_behavior_preservation": ("kl_div_score", "kl_div_with_ablation", "kl_div_with_sae"),
            "model_performance_preservation": ce,
            "reconstruction_quality": ("explained_variance", "explained_variance_legacy", "mse", "cossim"),
            "shrinkage": ("l2_norm_in", "l2_norm_out", "l2_ratio"),
            "sparsity": ("l0", "l1"),
        }
        metrics: dict[str, dict[str, float]] = {
            group: {name: getattr(f, name) for name in names} for group, names in groups.items()
        }
        known = self.by_batch[np.isfinite(self.by_batch)]
        metrics["shrinkage"]["relative_reconstruction_bias"] = float(known.mean()) if len(known) else float("nan")
        metrics["token_stats"] = dict.fromkeys(
            ("total_tokens_eval_reconstruction", "total_tokens_eval_sparsity_variance"), self.n_text_tokens
        )
        return {
            "metrics": metrics,
            "feature_metrics": {
                "feature_density": features.density.tolist(),
                "consistent_activation_heuristic": features.consistent_activation_heuristic.tolist(),
                "encoder_norm": weights.encoder_norm.tolist(),
                "encoder_bias": weights.encoder_bias.tolist(),
                "encoder_decoder_cosine_sim": weights.encoder_decoder_cosine_sim.tolist(),
            },
        }

    def __repr__(self) -> str:
        f, d_sae = self.figures, len(self.features.density)
        lines = [self.name, f"{int(f.n_tokens)} tokens of {self.n_prompts} prompts"]
        for name, words in _WORDS.items():
            value = getattr(f, name)
            if np.isnan(value):
                continue
            interval = ""
            if self.low is not None and self.high is not None:
                interval = f"[{getattr(self.low, name):.4g}, {getattr(self.high, name):.4g}]"
            lines.append(f"  {name:<28} {value:>10.4g}  {interval:<22} {words}".rstrip())
        density = self.features.density
        dead, rare = len(self.dead), int(((density > 0) & (density < 1e-3)).sum())
        lines.append(
            f"  {'dead':<28} {dead:>10}  of {d_sae} features never active here; {rare} at under 0.1 % of tokens"
        )
        huge, rest = self.massive, self.ordinary
        if huge.n_tokens:
            lines.append(
                f"  {int(huge.n_tokens)} tokens of a massive norm (mean {huge.l2_norm_in:.4g}); without them "
                f"explained_variance is {rest.explained_variance:.4g}, l0 {rest.l0:.4g}"
            )
        return "\n".join(lines)
