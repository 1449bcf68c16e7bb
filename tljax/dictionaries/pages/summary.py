"""``FeatureSummary``: what a page says of a feature, as data."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, TypedDict

import numpy as np

from tljax.checks import typed, whole
from tljax.dictionaries.evaluation.sites import AnyDictionary
from tljax.dictionaries.evaluation.weights import decoder_rows, weight_figures
from tljax.dictionaries.pages.activations import FeatureActivations, collect_activations, feature_mask
from tljax.dictionaries.pages.effects import ablation_loss_changes, logit_effects
from tljax.dictionaries.pages.examples import ExampleGroup, choose_examples
from tljax.errors import InputError
from tljax.model.hooked_transformer import HookedTransformer
from tljax.progress import Progress
from tljax.text.batch import Batch
from tljax.text.methods import token_labels

_BINS = 50
_NEIGHBOURS = 10
_MOST = 100
"""Features that are summarised if none are named."""


class SummaryOptions(TypedDict, total=False):
    """Options of :func:`summarise_features`, documented there."""

    k: int
    n_intervals: int
    per_interval: int
    window: tuple[int, int]
    n_logits: int
    measure_ablation: bool
    batch_size: int
    exclude_tokens: Sequence[int] | Literal["special"] | None
    prepend_bos: bool | None
    seed: int
    progress: bool | None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Histogram:
    """Counts of values in bins of equal width.

    Attributes:
        counts: ``[bin]``.
        edges: ``[bin + 1]``.
    """

    counts: np.ndarray
    edges: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray, bins: int = _BINS) -> "Histogram":
        """Counts values from the smallest to the largest; one empty bin if there are none."""
        if not len(values):
            return cls(counts=np.zeros(1, int), edges=np.asarray([0.0, 1.0]))
        counts, edges = np.histogram(np.asarray(values, np.float64), bins)
        return cls(counts=counts, edges=edges)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class FeatureSummary:
    """What is known of a feature.

    Attributes:
        feature: its number.
        n_tokens: number of tokens that were looked at.
        density: share of them at which it is active.
        largest, mean: its largest activation, and the mean where it is active; 0 if it never is.
        activations: histogram of its activations where it is active.
        decoder_norm, encoder_decoder_cosine: of its weights.
        logits: histogram of its effects on the logits of all tokens, for one unit of activation; ``None`` where these
            are not known (:func:`logit_effects`).
        promoted, suppressed: the tokens with the largest and the smallest effects, ``(token, effect)``.
        similar: features whose decoder rows have the largest cosines with its own, ``(feature, cosine)``.
        correlated: features whose activations correlate most with its own over tokens, ``(feature, correlation)``.
        groups: examples: the largest activations, then intervals from the highest down; empty if it is never active.
        ablation: mean rise of the next token's loss at the first group's most active tokens when the feature is
            ablated, in nats; NaN if it was not measured.
    """

    feature: int
    n_tokens: int
    density: float
    largest: float
    mean: float
    activations: Histogram
    decoder_norm: float
    encoder_decoder_cosine: float
    logits: Histogram | None
    promoted: tuple[tuple[str, float], ...]
    suppressed: tuple[tuple[str, float], ...]
    similar: tuple[tuple[int, float], ...]
    correlated: tuple[tuple[int, float], ...]
    groups: tuple[ExampleGroup, ...]
    ablation: float

    def __repr__(self) -> str:
        return (
            f"FeatureSummary({self.feature}: active at {self.density:.3g} of {self.n_tokens} tokens, largest "
            f"{self.largest:.3g}; raises {', '.join(repr(token) for token, _ in self.promoted[:3])})"
        )


@typed
def summarise_features(
    model: HookedTransformer,
    dictionary: AnyDictionary,
    prompts: Any,
    features: Sequence[int] | None = None,
    *,
    k: int = 20,
    n_intervals: int = 5,
    per_interval: int = 5,
    window: tuple[int, int] = (10, 5),
    n_logits: int = 10,
    measure_ablation: bool = True,
    batch_size: int = 8,
    exclude_tokens: Sequence[int] | Literal["special"] | None = None,
    prepend_bos: bool | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> list[FeatureSummary]:
    """Summarises features: where they are active, what they write, what resembles them, what the model loses without.

    Args:
        model: the model that the dictionary belongs to.
        dictionary: the dictionary.
        prompts: texts, token ids ``[batch, pos]``, a ``Batch``, or what :func:`collect_activations` returned.
        features: which; ``None`` takes the 100 whose largest activation times decoder norm is largest.
        k: examples with the largest activations, one of a prompt.
        n_intervals, per_interval: intervals of the activation's size, and examples drawn from each.
        window: tokens shown before and after the most active one.
        n_logits: tokens listed whose logits a feature raises and lowers most.
        measure_ablation: whether to run the prompts of the first group without the feature.
        batch_size, exclude_tokens, prepend_bos: as for :func:`collect_activations`; not read if ``prompts`` are
            collected activations, but for ``batch_size``.
        seed: where the draws of examples start.
        progress: whether to show a bar; ``None`` shows one after three seconds.

    Raises:
        InputError: a feature that does not exist, or collected activations of another dictionary; otherwise as
            :func:`collect_activations`.
    """
    for name, value, least in (("k", k, 1), ("n_intervals", n_intervals, 0), ("per_interval", per_interval, 1)):
        whole(value, name, at_least=least)
    whole(n_logits, "n_logits", 1, model.cfg.d_vocab_out)
    for size in window:
        whole(size, "window", at_least=0)
    rows = decoder_rows(dictionary)
    if features is not None:
        feature_mask(features, len(rows))
    if isinstance(prompts, FeatureActivations):
        collected = prompts
    else:
        collected = collect_activations(
            model, dictionary, prompts, batch_size=batch_size, exclude_tokens=exclude_tokens, prepend_bos=prepend_bos,
            progress=progress,
        )  # fmt: skip
    if collected.d_sae != len(rows):
        raise InputError(
            f"The collected activations are of {collected.d_sae} features and the dictionary has {len(rows)}: collect "
            "them with this dictionary."
        )
    strength = collected.largest * np.linalg.norm(rows, axis=-1)
    given = np.argsort(-strength, kind="stable")[:_MOST] if features is None else np.asarray(features, int)
    chosen = given % len(rows)
    if not len(chosen):
        raise InputError("features= is empty: name at least one feature, or leave it out.")
    tables = _Tables(model, dictionary, collected, chosen, rows)
    examples = {"k": k, "n_intervals": n_intervals, "per_interval": per_interval, "window": window, "seed": seed}
    made = []
    with Progress(len(chosen), progress, "pages", "feature") as bar:
        for index, feature in enumerate(chosen.tolist()):
            groups = choose_examples(collected, feature, **examples)
            if measure_ablation and groups:
                largest = _with_losses(model, dictionary, collected, feature, groups[0], batch_size)
                groups = (largest, *groups[1:])
            made.append(tables.summary(index, feature, groups, n_logits))
            bar.advance(1)
    return made


class _Tables:
    """What the summaries of several features share."""

    def __init__(
        self,
        model: HookedTransformer,
        dictionary: AnyDictionary,
        collected: FeatureActivations,
        chosen: np.ndarray,
        rows: np.ndarray,
    ) -> None:
        self.collected, self.rows = collected, rows
        self.weights = weight_figures(dictionary)
        self.logits = logit_effects(model, dictionary, chosen)
        self.labels = token_labels(model, np.arange(model.cfg.d_vocab_out)) if self.logits is not None else []
        self.correlations = collected.correlations(chosen)
        norms = np.linalg.norm(rows, axis=-1)
        with np.errstate(invalid="ignore", divide="ignore"):
            unit = rows / norms[:, None]
        self.cosines = unit[chosen] @ unit.T

    def summary(self, index: int, feature: int, groups: tuple[ExampleGroup, ...], n_logits: int) -> FeatureSummary:
        _, values = self.collected.of(feature)
        effects = None if self.logits is None else self.logits[index]
        order = np.zeros(0, int) if effects is None else np.argsort(effects, kind="stable")
        listed = [] if effects is None else [(self.labels[one], float(effects[one])) for one in order]
        peaks = [(one.loss_changes, one.pos - one.start) for group in groups[:1] for one in group.examples]
        measured = [changes[place] for changes, place in peaks if changes is not None]
        known = [change for change in measured if np.isfinite(change)]
        return FeatureSummary(
            feature=feature,
            n_tokens=self.collected.n_tokens,
            density=float(self.collected.density[feature]),
            largest=float(self.collected.largest[feature]),
            mean=float(values.mean()) if len(values) else 0.0,
            activations=Histogram.of(values),
            decoder_norm=float(self.weights.decoder_norm[feature]),
            encoder_decoder_cosine=float(self.weights.encoder_decoder_cosine_sim[feature]),
            logits=None if effects is None else Histogram.of(effects),
            promoted=tuple(listed[::-1][:n_logits]),
            suppressed=tuple(listed[:n_logits]),
            similar=_nearest(self.cosines[index], feature),
            correlated=_nearest(self.correlations[index], feature),
            groups=groups,
            ablation=float(np.mean(known)) if known else float("nan"),
        )


def _nearest(values: np.ndarray, feature: int) -> tuple[tuple[int, float], ...]:
    """Returns the other features with the largest values, ``(feature, value)``, without those that are unknown."""
    values = values.copy()
    values[feature] = np.nan
    order = np.argsort(np.where(np.isnan(values), np.inf, -values), kind="stable")[:_NEIGHBOURS]
    return tuple((int(one), float(values[one])) for one in order if not np.isnan(values[one]))


def _with_losses(
    model: HookedTransformer,
    dictionary: AnyDictionary,
    collected: FeatureActivations,
    feature: int,
    group: ExampleGroup,
    batch_size: int,
) -> ExampleGroup:
    """Returns a group whose examples say what ablating the feature does to the loss."""
    prompts = [one.prompt for one in group.examples]
    prompts += prompts[:1] * (batch_size - len(prompts))  # one shape, so one program, for all features
    batch = Batch.from_mask(collected.tokens[prompts], collected.mask[prompts], "right")
    changes = ablation_loss_changes(model, dictionary, feature, batch, batch_size)
    examples = tuple(
        dataclasses.replace(one, loss_changes=changes[row, one.start : one.start + len(one.tokens)])
        for row, one in enumerate(group.examples)
    )
    return dataclasses.replace(group, examples=examples)
