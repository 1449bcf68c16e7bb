"""``train_interchange``: interchanges at every layer, position, head, rank and seed, with their controls."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import numpy as np
import optax

from tljax.cache.activation_cache import ActivationCache
from tljax.checks import check_type, typed, whole
from tljax.errors import InputError
from tljax.hooks.names import ActName
from tljax.interchange.baselines import UNTRAINED, Untrained
from tljax.interchange.controls import CONTROLS, Control, reinitialized
from tljax.interchange.fitting import Fitted, Labels, fit_sites
from tljax.interchange.methods import Trained
from tljax.interchange.pairs import InterchangePairs, arbitrary_targets
from tljax.interchange.result import IIA, InterchangeResult
from tljax.interchange.settings import Settings
from tljax.interchange.sites import Point, point_of, read_heads
from tljax.model.hooked_transformer import HookedTransformer
from tljax.patching.result import PatchingResult

Method = Literal[Trained, Untrained]
_OWN_SIZE = ("boundless", "dbm", "full")
"""Methods that find their number of dimensions themselves."""


@typed
def train_interchange(
    model: HookedTransformer,
    pairs: InterchangePairs,
    activation_name: ActName = "resid_post",
    *,
    method: Method = "das",
    rank: int | Sequence[int] | None = None,
    layers: Sequence[int] | int | None = None,
    pos: Any = None,
    source_pos: Any = None,
    heads: Any = None,
    seeds: Sequence[int] = (0,),
    test: InterchangePairs | None = None,
    iso: InterchangePairs | None = None,
    iso_test: InterchangePairs | None = None,
    epochs: int = 20,
    batch_size: int = 128,
    micro_batch_size: int | None = None,
    lr: Any = None,
    strength: float = 1.0,
    featurizer: Any = "identity",
    tie_masks: bool = False,
    penalty: float | None = None,
    temperature: Any = None,
    optimizer: optax.GradientTransformation | None = None,
    controls: Sequence[Control] = CONTROLS,
    max_sites: int | None = None,
    progress: bool | None = None,
) -> InterchangeResult:
    """Finds a subspace at every site whose interchange turns the base's answer into the counterfactual one.

    All sites share one compiled program: those of a layer train at the same time, ``vmap`` over positions, heads, ranks
        and seeds, and the layer is data. Base prompts run once up to each layer, sources once.

    Args:
        model: the model; it is not changed.
        pairs: the pairs to train on.
        activation_name: the activation: ``"resid_post"``, ``"attn_out"``, ``"mlp_out"``, ``"mlp_post"``, ``"z"``, ...;
            with a layer in its name, that layer alone.
        method: ``"das"``, a subspace of given rank; ``"mdas"``, which must also leave ``iso`` pairs alone;
            ``"boundless"``, a rotation of the whole space and a boundary; ``"dbm"``, a mask over the coordinates of
            ``featurizer``. Or one that trains nothing: ``"full"``, ``"mean_difference"``, ``"probe"``, ``"pca"``,
            ``"neuron"``, ``"random_neuron"``, ``"random"``.
        rank: number of dimensions, or several to compare; 1 by default. ``"boundless"``, ``"dbm"`` and ``"full"`` find
            theirs.
        layers: the layers; all by default.
        pos: positions, counted in each base prompt's text, or names of ``pairs.named_pos``; by default every position.
        source_pos: for numbers, the positions in the source prompts; the same by default.
        heads: for an activation with heads, which; all by default, a site each.
        seeds: where random draws start: of starting subspaces and of the order of pairs.
        test: pairs to score on; by default those of the training.
        iso: pairs whose target is the base's own answer (another variable was interchanged in the causal model).
        iso_test: iso pairs to score on; by default ``iso``.
        epochs: how often each pair is used.
        batch_size: pairs in a step.
        micro_batch_size: pairs that run at once, to save memory; their gradients are added up.
        lr: learning rate; by default 1e-2, and for ``"boundless"`` 1e-3 with 1e-2 for the boundary. A dict gives
            several: ``{"free": 1e-3, "boundary": 1e-2}``.
        strength: of the interchange.
        featurizer: for ``"dbm"``: ``"identity"``, ``"pca"``, ``"svd"``, or orthonormal columns ``[d, n]``.
        tie_masks: for ``"dbm"``: one mask for all coordinates.
        penalty: weight in the loss of the boundary (1 by default) or of the mask's sum (1e-4).
        temperature: of the gates, ``(first, last)``; by default (50, 0.1) for ``"boundless"``, (1, 1e-3) for ``"dbm"``.
        optimizer: an optax optimiser instead of Adam; ``lr`` is then its own. Make it once: another object compiles
            anew.
        controls: ``"placebo"``, random subspaces moved as far; ``"labels"``, the same fit on labels that mean nothing;
            ``"random_model"``, the same fit on random weights. The latter two cost as much as the fit itself.
        max_sites: most sites of a layer to train at once; by the free memory by default.
        progress: whether to show a progress bar; by default one appears after three seconds.

    Returns:
        Scores and subspaces at each site. Gates are hard there, 0 or 1.

    Raises:
        InputError: a rank above the activation's width, an option that the method does not have, pairs that do not fit
            the model, activations that are not finite.
        UnknownHookError: an activation that the model does not have.

    Recompiles for another activation, number of pairs, of sites of a layer or of steps; not for other layers,
    positions, seeds, learning rates or strengths.
    """
    point = point_of(model, activation_name, layers)
    ranks = _ranks(method, rank, point)
    _check_options(method, featurizer, tie_masks, penalty, temperature, iso)
    count = len(pairs) + (len(iso) if method == "mdas" and iso is not None else 0)
    batch = min(whole(batch_size, "batch_size", at_least=1), count)
    micro = batch if micro_batch_size is None else whole(micro_batch_size, "micro_batch_size", at_least=1)
    settings = Settings(
        method=method, ranks=ranks, seeds=_seeds(seeds), heads=read_heads(point, heads), pos=pos, source_pos=source_pos,
        pairs_at_once=min(micro, batch), epochs=whole(epochs, "epochs", at_least=1), batch_size=batch, lr=lr,
        strength=strength, featurizer=featurizer, tie_masks=tie_masks, penalty=penalty, progress=progress,
        temperature=_temperature(temperature), optimizer=optimizer,
        max_sites=None if max_sites is None else whole(max_sites, "max_sites", at_least=1),
    )  # fmt: skip
    _check_same_classes(pairs, test=test, iso=iso, iso_test=iso_test)
    wanted = tuple(controls)
    for one in wanted:
        check_type(one, Control, "controls")
    return _fit_with_controls(model, pairs, test, iso, iso_test, point, settings, wanted)


def _fit_with_controls(
    model: HookedTransformer,
    pairs: InterchangePairs,
    test: InterchangePairs | None,
    iso: InterchangePairs | None,
    iso_test: InterchangePairs | None,
    point: Point,
    settings: Settings,
    controls: tuple[Control, ...],
) -> InterchangeResult:
    fitted_on, weights = pairs, None
    if settings.method == "mdas":
        assert iso is not None
        fitted_on, sizes = pairs.join(iso), [len(pairs), len(iso)]
        weights = np.repeat([sum(sizes) / (2 * size) for size in sizes], sizes)
    target = pairs if test is None else test
    scored = {IIA: target}
    if (kept := iso if iso_test is None else iso_test) is not None:
        scored["iso"] = kept
    notes = [f"{name} not run: controls={controls}" for name in CONTROLS if name not in controls]
    labels = _labels(fitted_on, target) if "labels" in controls else None
    if isinstance(labels, str):
        notes.append(f"labels not run: {labels}")
    fits, unseen, arbitrary = labels if isinstance(labels, tuple) else (None, None, None)
    fitted = fit_sites(
        model, fitted_on, scored, point, settings, weights=weights, controlled=IIA, labels=fits
    )  # fmt: skip
    values = _scores(fitted, settings, scored, "placebo" in controls)
    if unseen is not None and arbitrary is not None:
        values["arbitrary labels"] = (fitted.answers[IIA]["labels"] == arbitrary)[..., unseen].mean(axis=-1)
    if "random_model" in controls:
        if any(isinstance(each.source, ActivationCache) for each in (pairs, target)):
            notes.append("random_model not run: the sources are a cache of the trained model")
        else:
            random = reinitialized(model, settings.seeds[0])
            found = fit_sites(random, fitted_on, {IIA: target}, point, settings, weights=weights)
            values["random model"] = (found.answers[IIA]["fit"] == target.targets).mean(axis=-1)
    if test is None:
        notes.append("scored on the pairs of the fit: pass test=, as from pairs.split()")
    return _as_result(point, settings, fitted, values, target, tuple(notes))


def _scores(
    fitted: Fitted, settings: Settings, scored: dict[str, InterchangePairs], placebo: bool
) -> dict[str, np.ndarray]:
    """Returns the scores of a fit by name, ``[layer, site]``."""
    found, targets = fitted.answers[IIA], scored[IIA].targets
    values = {IIA: (found["fit"] == targets).mean(axis=-1)}
    values["full swap"] = np.repeat((found["full"] == targets).mean(axis=-1), settings.n_repeats(), axis=-1)
    if placebo:
        values["placebo"] = (found["placebo"] == targets).mean(axis=(-2, -1))
    if "iso" in scored:
        values["iso"] = (fitted.answers["iso"]["fit"] == scored["iso"].targets).mean(axis=-1)
        values["disentangle"] = (values[IIA] + values["iso"]) / 2
    return values


def _labels(pairs: InterchangePairs, scored: InterchangePairs) -> tuple[Labels, np.ndarray, np.ndarray] | str:
    """Returns arbitrary labels to fit, which scored pairs have keys that the fit has not seen, and their labels; or why
    not.

    If no scored pair has a key of its own, the fit leaves half of the keys out.
    """
    classes, seen = np.unique(pairs.targets), np.arange(len(pairs))
    unseen = ~np.isin(scored.keys, pairs.keys)
    if not unseen.any():
        names = sorted(set(pairs.keys))
        if len(names) < 2:
            return "all pairs have one key"
        inside = {names[n] for n in np.random.default_rng(0).permutation(len(names))[: len(names) // 2]}
        seen = np.flatnonzero([key in inside for key in pairs.keys])
        unseen = np.asarray([key not in inside for key in scored.keys])
    fits = Labels(arbitrary_targets(pairs.keys, classes), seen)
    return fits, unseen, arbitrary_targets(scored.keys, classes)


def _as_result(
    point: Point,
    settings: Settings,
    fitted: Fitted,
    values: dict[str, np.ndarray],
    scored: InterchangePairs,
    notes: tuple[str, ...],
) -> InterchangeResult:
    axes = settings.axes()
    sizes = {
        "pos": len(fitted.positions), "head": len(settings.heads or ()), "rank": len(settings.ranks),
        "seed": len(settings.seeds),
    }  # fmt: skip
    lead = (len(point.layers), *(sizes[axis] for axis in axes))
    labels = {
        "layer": [f"L{layer}" for layer in point.layers], "pos": fitted.positions,
        "head": [f"H{head}" for head in settings.heads or ()], "rank": [f"R{rank}" for rank in settings.ranks],
        "seed": [f"S{seed}" for seed in settings.seeds],
    }  # fmt: skip
    stacked = jax.device_put(np.stack([value.reshape(lead) for value in values.values()]).astype(np.float32))
    scores = PatchingResult(
        stacked, ("metric", "layer", *axes), metric_names=tuple(values), activation_name=point.relative, labels=labels
    )
    columns, answers = fitted.columns, fitted.answers[IIA]
    return InterchangeResult(
        method=settings.method, activation_name=point.relative, scores=scores,
        columns=None if columns is None else columns.reshape(*lead, *columns.shape[2:]),
        gates=fitted.gates.reshape(*lead, -1), losses=fitted.losses.reshape(-1, *lead),
        unpatched=float((answers["unpatched"][0] == scored.targets).mean()), chance=1 / len(np.unique(scored.targets)),
        is_right=(answers["fit"] == scored.targets).reshape(*lead, -1), notes=notes,
    )  # fmt: skip


def _ranks(method: str, rank: Any, point: Point) -> tuple[int, ...]:
    if method in _OWN_SIZE:
        if rank is not None:
            raise InputError(f"method={method!r} finds its number of dimensions itself: leave rank= out.")
        return (1,)
    ranks = [1] if rank is None else [rank] if np.ndim(rank) == 0 else list(rank)
    numbers = tuple(whole(one, "rank", at_least=1) for one in ranks)
    if not numbers or len(set(numbers)) < len(numbers):
        raise InputError(f"rank={list(numbers)} needs one rank or more, each once.")
    if max(numbers) > point.width:
        raise InputError(
            f"rank={max(numbers)} is more than the {point.width} dimensions of {point.name(point.layers[0])} "
            f"({point.spec.axes[-1]})."
        )
    return numbers


def _seeds(seeds: Any) -> tuple[int, ...]:
    numbers = tuple(whole(seed, "seeds", at_least=0) for seed in np.atleast_1d(np.asarray(seeds)).tolist())
    if not numbers or len(set(numbers)) < len(numbers):
        raise InputError(f"seeds={list(numbers)} needs one seed or more, each once.")
    return numbers


def _temperature(temperature: Any) -> tuple[float, float] | None:
    if temperature is None:
        return None
    numbers = np.asarray(temperature, np.float64)
    if numbers.shape != (2,) or not (numbers > 0).all():
        raise InputError(f"temperature={temperature!r} needs two positive numbers, (first, last).")
    return float(numbers[0]), float(numbers[1])


def _check_options(method: str, featurizer: Any, tie_masks: bool, penalty: Any, temperature: Any, iso: Any) -> None:
    if method not in get_args(Trained) and method not in UNTRAINED:
        raise InputError(f"method={method!r} is not one of {', '.join((*get_args(Trained), *UNTRAINED))}.")
    if method != "dbm" and (tie_masks or not isinstance(featurizer, str) or featurizer != "identity"):
        raise InputError(f"featurizer= and tie_masks= belong to method='dbm', not to {method!r}.")
    if method not in ("dbm", "boundless") and not (penalty is None and temperature is None):
        raise InputError(f"penalty= and temperature= belong to gates, method='dbm' or 'boundless', not to {method!r}.")
    if method == "mdas" and iso is None:
        raise InputError(
            "method='mdas' trains on cause and iso pairs together: pass iso=, pairs whose target is the base's answer."
        )


def _check_same_classes(pairs: InterchangePairs, **others: InterchangePairs | None) -> None:
    for name, other in others.items():
        if other is not None and not pairs.has_classes_of(other):
            raise InputError(f"{name}= has other task_logits than the training pairs: make both with the same classes.")
