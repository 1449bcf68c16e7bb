"""``evaluate_dictionary``: runs prompts and sums what is measured."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from tljax.checks import typed, whole
from tljax.dictionaries.dictionary import Dictionary
from tljax.dictionaries.evaluation.evaluation import DictionaryEvaluation, FeatureFigures
from tljax.dictionaries.evaluation.figures import LOSS_SUMS, TOKEN_SUMS, Figures, Sums
from tljax.dictionaries.evaluation.measuring import SiteMeasures, centre_of, measure_losses, measure_site
from tljax.dictionaries.evaluation.sites import AnyDictionary, Sites
from tljax.dictionaries.evaluation.weights import weight_figures
from tljax.errors import DictionaryError, InputError
from tljax.hooks.interventions import Replace, Zero
from tljax.model.hooked_transformer import HookedTransformer
from tljax.model.running import uses_head
from tljax.modules.readout import Readout
from tljax.progress import Progress
from tljax.text.batch import Batch

_COLUMNS = len(TOKEN_SUMS) + len(LOSS_SUMS)
_SQUARED_OUT, _PRODUCT, _ERROR = (TOKEN_SUMS.index(name) for name in ("squared_out", "product", "error"))


@typed
def evaluate_dictionary(
    model: HookedTransformer,
    dictionary: AnyDictionary,
    prompts: Any,
    *,
    batch_size: int = 8,
    exclude_tokens: Sequence[int] | Literal["special"] | None = None,
    run_spliced: bool = True,
    massive: float = 10.0,
    bootstrap: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    prepend_bos: bool | None = None,
    progress: bool | None = None,
) -> DictionaryEvaluation:
    """Measures how well a dictionary explains its site, and what the model loses when it is spliced in.

    The same for autoencoders, transcoders (compared and written at the point that they write), crosscoders and
    cross-layer transcoders. Features are those of the clean run, also where a dictionary writes at several points, and
    the spliced run has no error term.

    Args:
        model: the model that the dictionary belongs to.
        dictionary: the dictionary; its tap says where it belongs.
        prompts: texts, token ids ``[batch, pos]`` or a ``Batch``; not those that the dictionary was trained on.
        batch_size: prompts in one run.
        exclude_tokens: ids of tokens that do not count: they keep their activation in the spliced run and are left out
            of every mean (the loss at a position belongs to the token there, not to the next). ``"special"`` means the
            tokenizer's special tokens.
        run_spliced: whether to run the model spliced and with the site zero; ``False`` leaves the losses NaN.
        massive: a token's norm is massive from this many times its batch's median on.
        bootstrap: resamples of the prompts for the intervals; 0 for none.
        confidence: share of resamples inside an interval.
        seed: where the resampling starts.
        prepend_bos: whether texts get a BOS token; ``None`` means ``cfg.default_prepend_bos``.
        progress: whether to show a bar; ``None`` shows one after three seconds.

    Returns:
        The numbers; see :class:`Figures` for each definition.

    Raises:
        DictionaryError: the dictionary does not fit the model, its tap is unknown, or its numbers are not finite.
        InputError: no prompts, no tokens that count, or options out of range.

    Recompiles for another batch size or longest prompt.
    """
    whole(batch_size, "batch_size", at_least=1)
    whole(bootstrap, "bootstrap", at_least=0)
    if not 0 < confidence < 1 or not massive > 0:
        raise InputError(f"confidence={confidence} must lie between 0 and 1, and massive={massive} above 0.")
    sites = Sites.of(dictionary, model)
    _refuse_selection_over_batch(dictionary)
    excluded = excluded_ids(model, exclude_tokens)
    runs = Runs.of(model, prompts, batch_size, excluded, prepend_bos)
    totals = _Totals(runs.batch.shape)
    shift = None
    head_is_named = uses_head([*sites.names, *(entry.name for entry in model._hooks.entries)])
    readout = None if head_is_named else Readout.of(model.cfg, model.params)
    to = None if readout is None else model.cfg.n_layers
    with Progress(len(runs), progress, "evaluation", "batch") as bar:
        for run in runs:
            end, cache = model.run_with_cache(
                run.batch, names_filter=sites.names, return_type="logits" if run_spliced else None,
                stop_at_layer=to if run_spliced else None,
            )  # fmt: skip
            values = {name: cache[name] for name in sites.names}
            if shift is None:
                shift = centre_of(dictionary, sites, values, run.counts)
            measured = measure_site(dictionary, sites, values, run.counts, shift, np.float32(massive))
            losses = _losses(model, sites, run, end, measured, readout) if run_spliced else None
            totals.add(run, measured, losses)
            bar.advance(1)
    return totals.result(sites, dictionary, bootstrap, confidence, seed)


def excluded_ids(model: HookedTransformer, exclude_tokens: Sequence[int] | Literal["special"] | None) -> np.ndarray:
    """Returns the ids of tokens that do not count, ``[n]``.

    Raises:
        InputError: an id outside the vocabulary; ``"special"`` without a tokenizer that has special tokens.
    """
    if exclude_tokens is None:
        return np.zeros(0, np.int32)
    if isinstance(exclude_tokens, str):
        tokenizer = model.tokenizer
        given = [] if tokenizer is None else sorted(tokenizer.all_special_ids)
        if not given:
            raise InputError(
                'exclude_tokens="special" needs a tokenizer with special tokens; give ids instead, exclude_tokens=[0].'
            )
        return np.asarray(given, np.int32)
    return np.asarray([whole(one, "exclude_tokens", 0, model.cfg.d_vocab - 1) for one in exclude_tokens], np.int32)


class Run(NamedTuple):
    """One batch of an evaluation.

    Attributes:
        batch: the prompts; the last batch is filled up with its first prompt.
        counts: ``[batch, pos]``, which tokens count.
        rows: numbers of the prompts, without those filled up.
    """

    batch: Batch
    counts: jax.Array
    rows: np.ndarray


class Runs:
    """Prompts in batches of one shape, with which tokens count.

    Args:
        batch: all prompts.
        batch_size: prompts in a batch.
        excluded: ids of tokens that do not count.
    """

    def __init__(self, batch: Batch, batch_size: int, excluded: np.ndarray) -> None:
        self.batch, self.batch_size = batch, min(batch_size, len(batch))
        self.tokens, self.mask = np.asarray(batch.tokens), np.asarray(batch.mask)
        self.counts = self.mask & ~np.isin(self.tokens, excluded)
        if not self.counts.any():
            raise InputError(
                f"All {int(self.mask.sum())} tokens of the prompts are among the {len(excluded)} excluded ones, so "
                "nothing is left to measure. Exclude fewer, or give longer prompts."
            )

    @classmethod
    def of(
        cls, model: HookedTransformer, prompts: Any, batch_size: int, excluded: np.ndarray, prepend_bos: bool | None
    ) -> "Runs":
        """Reads the prompts of a model."""
        batch = model.to_batch(prompts, prepend_bos=prepend_bos, padding_side="right")
        return cls(batch, batch_size, excluded)

    def __len__(self) -> int:
        return math.ceil(len(self.batch) / self.batch_size)

    def __iter__(self) -> Iterator[Run]:
        for start in range(0, len(self.batch), self.batch_size):
            rows = np.arange(start, min(start + self.batch_size, len(self.batch)))
            filled = np.concatenate([rows, np.full(self.batch_size - len(rows), start)])
            counts = self.counts[filled]
            counts[len(rows) :] = False
            yield Run(Batch.from_mask(self.tokens[filled], self.mask[filled], "right"), jax.device_put(counts), rows)


def _losses(
    model: HookedTransformer, sites: Sites, run: Run, clean: jax.Array, measured: SiteMeasures, readout: Readout | None
) -> np.ndarray:
    written = dict(zip(sites.writes, measured.replacements, strict=True))
    heads = dict(zip(sites.writes, sites.heads, strict=True))
    zero = [(name, Zero() if heads[name] is None else Zero(head=heads[name])) for name in written]
    replaced = [(name, Replace(value)) for name, value in written.items()]
    to = None if readout is None else model.cfg.n_layers
    changed = (model.run_with_hooks(run.batch, fwd_hooks=hooks, stop_at_layer=to) for hooks in (replaced, zero))
    return np.asarray(measure_losses((clean, *changed), readout, run.batch.tokens, run.batch.mask, run.counts))


def _refuse_selection_over_batch(dictionary: AnyDictionary) -> None:
    if not isinstance(dictionary, Dictionary) or dictionary.cfg.architecture != "batchtopk":
        return
    raise DictionaryError(
        "A batchtopk dictionary selects features over the whole batch, as in training, so its numbers would depend on "
        "batch_size and padding. Evaluate its inference form: a jumprelu dictionary with its threshold."
    )


class _Totals:
    """Sums of an evaluation, in float64.

    Args:
        shape: number of prompts, and positions.
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        self.shape, self.n_text_tokens = shape, 0
        self.prompts, self.massive = (np.zeros((shape[0], _COLUMNS)) for _ in range(2))
        self.positions = np.zeros((shape[1], _COLUMNS))
        self.biases: list[np.ndarray] = []
        self.vectors: dict[str, list[np.ndarray]] = {}
        self.summed: dict[str, np.ndarray] = {}

    def add(self, run: Run, measured: SiteMeasures, losses: np.ndarray | None) -> None:
        site = np.asarray(measured.tokens, np.float64)[: len(run.rows)]
        if not np.isfinite(site[..., _ERROR]).all():
            row = run.rows[np.argwhere(~np.isfinite(site[..., _ERROR]))[0][0]]
            raise InputError(
                f"Activations or reconstructions of prompt {row} are not finite, so no mean over it is. Look at "
                "model.run_with_cache of that prompt."
            )
        kept = len(run.rows)
        losses = np.full((*site.shape[:2], len(LOSS_SUMS)), 0.0) if losses is None else losses[:kept].astype(np.float64)
        table = np.concatenate([site, losses], axis=-1)
        huge = np.asarray(measured.massive)[:kept]
        self.n_text_tokens += int(np.asarray(run.batch.mask)[:kept].sum())
        self.prompts[run.rows] = table.sum(1)
        self.massive[run.rows] = np.where(huge[..., None], table, 0).sum(1)
        self.positions += table.sum(0)
        self.biases.append(site[..., [_SQUARED_OUT, _PRODUCT]].sum((0, 1)))
        for name in ("targets", "errors", "massive_targets", "massive_errors"):
            self.vectors.setdefault(name, []).append(np.asarray(getattr(measured, name))[:kept])
        for name in ("position_targets", "position_errors", "fired", "prompts_fired", "activation"):
            self.summed[name] = self.summed.get(name, 0.0) + np.asarray(getattr(measured, name), np.float64)
        self.summed["largest"] = np.maximum(self.summed.get("largest", 0.0), np.asarray(measured.largest))

    def result(
        self, sites: Sites, dictionary: AnyDictionary, bootstrap: int, confidence: float, seed: int
    ) -> DictionaryEvaluation:
        v = {name: np.concatenate(parts).astype(np.float64) for name, parts in self.vectors.items()}
        prompts = Sums(self.prompts, v["targets"], v["errors"])
        massive = Sums(self.massive, v["massive_targets"], v["massive_errors"])
        ordinary = Sums(*(getattr(prompts, name) - getattr(massive, name) for name in vars(prompts)))
        positions = Sums(self.positions, self.summed["position_targets"], self.summed["position_errors"])
        total = prompts.total
        mean = total.targets[0] / total.tokens[0, 0]
        squared, product = np.asarray(self.biases).T
        low, high = _intervals(prompts, bootstrap, confidence, seed)
        return DictionaryEvaluation(
            figures=Figures.of(total).group(0),
            low=low,
            high=high,
            confidence=confidence,
            ordinary=Figures.of(ordinary.total).group(0),
            massive=Figures.of(massive.total, mean).group(0),
            by_position=Figures.of(positions, mean),
            features=self._features(total.tokens[0, 0]),
            weights=weight_figures(dictionary),
            n_prompts=self.shape[0],
            n_text_tokens=self.n_text_tokens,
            reads=sites.reads,
            writes=sites.writes,
            name=repr(dictionary),
            by_batch=np.divide(squared, product, out=np.full(len(squared), np.nan), where=product != 0),
        )

    def _features(self, n_tokens: float) -> FeatureFigures:
        s = self.summed
        with np.errstate(invalid="ignore", divide="ignore"):
            return FeatureFigures(
                density=s["fired"] / n_tokens,
                prompts_fired=s["prompts_fired"].astype(int),
                consistent_activation_heuristic=s["fired"] / s["prompts_fired"],
                mean_activation=s["activation"] / s["fired"],
                largest_activation=s["largest"],
            )


def _intervals(prompts: Sums, bootstrap: int, confidence: float, seed: int) -> tuple[Figures | None, Figures | None]:
    """Returns the ends of percentile intervals over resamples of the prompts (Efron 1979)."""
    n = len(prompts.tokens)
    if n < 2 or not bootstrap:
        return None, None
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=bootstrap)
    drawn = Figures.of(prompts.weighted(counts.astype(np.float64)))
    tails = (1 - confidence) / 2, (1 + confidence) / 2
    ends = {name: _quantiles(values, tails) for name, values in vars(drawn).items()}
    return tuple(Figures(**{name: float(pair[end]) for name, pair in ends.items()}) for end in (0, 1))  # type: ignore[return-value]


def _quantiles(values: np.ndarray, at: tuple[float, float]) -> np.ndarray:
    known = values[np.isfinite(values)]
    return np.quantile(known, at) if len(known) else np.full(2, np.nan)
