"""The numbers that judge a dictionary, as functions of sums over tokens."""

import dataclasses
from typing import Any

import numpy as np

TOKEN_SUMS = (
    "n_tokens", "l0", "l1", "spread", "l2_norm_in", "l2_norm_out", "squared_out", "product", "error", "l2_ratio",
    "cossim", "unexplained_legacy", "relative_error",
)  # fmt: skip
"""What is summed over tokens of the site: see :func:`tljax.dictionaries.evaluation.measuring.measure_site`."""
LOSS_SUMS = (
    "n_kl", "n_ce", "ce_loss_without_sae", "ce_loss_with_sae", "ce_loss_with_ablation", "kl_div_with_sae",
    "kl_div_with_ablation",
)  # fmt: skip
"""What is summed over tokens of the output: see :func:`tljax.dictionaries.evaluation.measuring.measure_losses`."""


@dataclasses.dataclass(frozen=True)
class Sums:
    """Sums over tokens, in float64, for each of several groups of tokens.

    Attributes:
        tokens: ``[group, len(TOKEN_SUMS) + len(LOSS_SUMS)]``, in the order of these names.
        targets: ``[group, width]``: what is reconstructed, less a vector that is near its mean.
        errors: ``[group, width]``: what is reconstructed less the reconstruction.
    """

    tokens: np.ndarray
    targets: np.ndarray
    errors: np.ndarray

    def weighted(self, counts: np.ndarray) -> "Sums":
        """Returns sums of groups, each counted ``counts`` ``[new group, group]`` times."""
        return Sums(counts @ self.tokens, counts @ self.targets, counts @ self.errors)

    @property
    def total(self) -> "Sums":
        """The sum of all groups, as one group."""
        return self.weighted(np.ones((1, len(self.tokens))))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figures:
    """Numbers that judge a dictionary; SAELens's names where it has one.

    ``x`` is what is reconstructed, ``x_hat`` the reconstruction, ``E`` the mean over tokens. Each is a float, or an
    array of one for each group of tokens. NaN where there is nothing to compute it from.

    Attributes:
        n_tokens: number of tokens that count.
        l0: features that are active (not zero) at a token.
        l1: sum of their sizes.
        mse: ``E |x - x_hat|^2``, summed over the width.
        explained_variance: ``1 - E |x - x_hat|^2 / E |x - E x|^2``, a ratio of means over all tokens.
        fvu: ``1 - explained_variance``, the fraction of variance unexplained.
        explained_variance_legacy: ``1 - E (|x - x_hat|^2 / |x - mean of the batch|^2)``, a mean of each token's ratio:
            SAELens's older definition. One token of a huge norm decides the first definition and hardly moves this
            one. Depends a little on ``batch_size``.
        explained_variance_centered: ``1 - var(x - x_hat) / var(x)``, dictionary_learning's definition: a constant
            error does not count.
        relative_error: ``E (|x - x_hat|^2 / |x|^2)``, OpenAI's normalised error.
        cossim: ``E cos(x, x_hat)``.
        l2_norm_in, l2_norm_out: ``E |x|``, ``E |x_hat|``.
        l2_ratio: ``E (|x_hat| / |x|)``; below 1 where features shrink.
        relative_reconstruction_bias: ``E |x_hat|^2 / E <x, x_hat>`` over all tokens; 1 means no shrinkage (Wright and
            Sharkey 2024). SAELens averages it over batches instead: see ``DictionaryEvaluation.saelens``.
        ce_loss_without_sae, ce_loss_with_sae, ce_loss_with_ablation: cross entropy of the next token in nats: as the
            model is, with ``x_hat`` in place of ``x``, with zero in place of ``x``.
        ce_loss_increase: ``with_sae - without_sae``.
        ce_loss_score: ``(with_ablation - with_sae) / (with_ablation - without_sae)``. Near 1 at a residual stream
            however bad the dictionary, because the ablated loss is huge: read the increase too.
        kl_div_with_sae, kl_div_with_ablation: Kullback-Leibler divergence of the spliced (ablated) model's next-token
            distribution from the clean one, ``KL(clean || spliced)``, in nats.
        kl_div_score: ``(with_ablation - with_sae) / with_ablation``.
    """

    n_tokens: Any
    l0: Any
    l1: Any
    mse: Any
    explained_variance: Any
    fvu: Any
    explained_variance_legacy: Any
    explained_variance_centered: Any
    relative_error: Any
    cossim: Any
    l2_norm_in: Any
    l2_norm_out: Any
    l2_ratio: Any
    relative_reconstruction_bias: Any
    ce_loss_without_sae: Any
    ce_loss_with_sae: Any
    ce_loss_with_ablation: Any
    ce_loss_increase: Any
    ce_loss_score: Any
    kl_div_with_sae: Any
    kl_div_with_ablation: Any
    kl_div_score: Any

    def to_dict(self) -> dict[str, Any]:
        """Returns the numbers by name; arrays as lists."""
        return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in vars(self).items()}

    def group(self, index: int) -> "Figures":
        """Returns the numbers of one group, as floats."""
        return Figures(**{name: float(value[index]) for name, value in vars(self).items()})

    @classmethod
    def of(cls, sums: Sums, mean: np.ndarray | None = None) -> "Figures":
        """Computes the numbers of each group.

        Args:
            sums: the groups' sums.
            mean: ``[width]``, the mean that variance is taken about, less the same vector as ``sums.targets``; ``None``
                means each group's own.
        """
        s = dict(zip((*TOKEN_SUMS, *LOSS_SUMS), sums.tokens.T, strict=True))
        with np.errstate(divide="ignore", invalid="ignore"):
            n = np.where(s["n_tokens"] > 0, s["n_tokens"], np.nan)
            e = {name: total / n for name, total in s.items()}
            centre = sums.targets / n[:, None] if mean is None else np.broadcast_to(mean, sums.targets.shape)
            offset = sums.targets / n[:, None]
            variance = e["spread"] - 2 * np.sum(offset * centre, -1) + np.sum(centre**2, -1)
            own_variance = e["spread"] - np.sum(offset**2, -1)
            error_variance = e["error"] - np.sum((sums.errors / n[:, None]) ** 2, -1)
            unexplained = e["error"] / _or_nan(variance)
            ce = {name: s[name] / _or_nan(s["n_ce"]) for name in LOSS_SUMS if name.startswith("ce_")}
            kl = {name: s[name] / _or_nan(s["n_kl"]) for name in LOSS_SUMS if name.startswith("kl_")}
            clean, spliced, ablated = (ce[f"ce_loss_{name}"] for name in ("without_sae", "with_sae", "with_ablation"))
            moved, most = kl["kl_div_with_sae"], kl["kl_div_with_ablation"]
            return cls(
                n_tokens=s["n_tokens"],
                mse=e["error"],
                explained_variance=1 - unexplained,
                fvu=unexplained,
                explained_variance_legacy=1 - e["unexplained_legacy"],
                explained_variance_centered=1 - error_variance / _or_nan(own_variance),
                relative_reconstruction_bias=e["squared_out"] / e["product"],
                **{name: e[name] for name in ("l0", "l1", "cossim", "l2_norm_in", "l2_norm_out", "l2_ratio")},
                relative_error=e["relative_error"],
                **ce,
                ce_loss_increase=spliced - clean,
                ce_loss_score=(ablated - spliced) / _or_nan(ablated - clean),
                **kl,
                kl_div_score=(most - moved) / _or_nan(most),
            )


def _or_nan(value: np.ndarray) -> np.ndarray:
    """Returns a denominator with NaN for zero, so that nothing over nothing is not infinite."""
    return np.where(value == 0, np.nan, value)
