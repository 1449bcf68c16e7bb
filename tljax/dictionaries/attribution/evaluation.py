"""How much of a behaviour a feature circuit carries: everything outside it ablated, or everything inside."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal, TypedDict, Unpack

import jax.numpy as jnp
import numpy as np

from tljax.cache.activation_cache import ActivationCache
from tljax.checks import typed, whole
from tljax.dictionaries.attribution.circuit import FeatureCircuit
from tljax.dictionaries.attribution.effects import metric_of_each
from tljax.dictionaries.attribution.nodes import Nodes, SplicedPoint, prepare_nodes
from tljax.errors import InputError
from tljax.forward.forward import run_forward
from tljax.hooks.dictionary import HookDictionary, HookEntry
from tljax.hooks.interventions import Replace
from tljax.model.hooked_transformer import HookedTransformer
from tljax.patching.ablation import mean_source, resample_source
from tljax.patching.engine.run import measure_run
from tljax.patching.engine.site_by_site import refuse_late_hooks
from tljax.patching.metrics.evaluation import Measure

AblationKind = Literal["mean", "zero", "resample", "patching"]
ErrorTerms = Literal["default", "keep", "remove"]


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureFaithfulness:
    """The metric with a circuit alone, with the whole model, and with nothing.

    Attributes:
        values: the metric with all nodes outside the circuit ablated (or, for completeness, those inside), ``[batch]``.
        full: the metric of the model, ``[batch]``.
        empty: the metric with every feature and error term ablated, ``[batch]``.
        measured: ``"faithfulness"`` or ``"completeness"``.
        ablation: what ablated nodes carried.
        errors: what happened to error terms.
    """

    values: np.ndarray
    full: np.ndarray
    empty: np.ndarray
    measured: Literal["faithfulness", "completeness"]
    ablation: AblationKind
    errors: ErrorTerms

    @property
    def share(self) -> float:
        """``(m(C) - m(none)) / (m(all) - m(none))``, of means over prompts: 1 for the whole model, 0 for nothing.

        For completeness this is the share that is left without the circuit: near 0, the circuit lacks nothing.
        """
        gap = self.full.mean() - self.empty.mean()
        return float((self.values.mean() - self.empty.mean()) / gap)

    def __repr__(self) -> str:
        means = ", ".join(f"{name} {getattr(self, name).mean():.4g}" for name in ("values", "full", "empty"))
        return f"FeatureFaithfulness({self.measured} {self.share:.3f}; {means}; {self.ablation} ablation)"


class AblationOptions(TypedDict, total=False):
    """What ablated nodes carry, documented at :func:`feature_faithfulness`."""

    source: Any
    ablation: AblationKind
    errors: ErrorTerms
    start_layer: int
    seed: int


def _evaluated(
    model: HookedTransformer,
    circuit: FeatureCircuit,
    prompt: Any,
    metric: Any,
    measured: Literal["faithfulness", "completeness"],
    *,
    source: Any = None,
    ablation: AblationKind = "mean",
    errors: ErrorTerms = "default",
    start_layer: int = 0,
    seed: int = 0,
) -> FeatureFaithfulness:
    circuit.check(model)
    refuse_late_hooks(model)
    start = whole(start_layer, "start_layer", at_least=0, at_most=model.cfg.n_layers - 1)
    values = _ablated_to(model, circuit, source, ablation, seed)
    nodes = prepare_nodes(model, prompt, values, circuit.points)
    if circuit.by_position and not nodes.text.all():
        raise InputError("A circuit by position needs prompts of equally many tokens.")
    measure = metric_of_each(model, nodes, metric)
    points = [point for point in nodes.points if (-1 if point.layer is None else point.layer) >= start or not start]
    inside = {point.name: circuit.mask(point.name, nodes.base.length) for point in points}
    kept = inside if measured == "faithfulness" else {name: ~mask for name, mask in inside.items()}
    if errors != "default":
        for mask in kept.values():
            mask[..., -1] = errors == "keep"
    empty = _measured(model, nodes, measure, points, {name: np.zeros_like(mask) for name, mask in inside.items()})
    full = np.asarray(measure.baseline, np.float64).reshape(-1)
    if np.isclose(full.mean(), empty.mean(), rtol=1e-6, atol=0):
        raise InputError(
            f"The metric is {full.mean():.4g} with every node and with none, so there is nothing to explain. Take a "
            "metric that the ablation changes, or another source."
        )
    return FeatureFaithfulness(_measured(model, nodes, measure, points, kept), full, empty, measured, ablation, errors)


_typed = functools.partial(typed, receiver=_evaluated)


@_typed
def feature_faithfulness(
    model: HookedTransformer,
    circuit: FeatureCircuit,
    prompt: Any,
    metric: Any,
    **options: Unpack[AblationOptions],
) -> FeatureFaithfulness:
    """Measures how much of the model's behaviour a circuit carries: all nodes outside it are ablated in one run.

    Nodes of the circuit take what they compute in that very run.

    Args:
        model: the model with the circuit's dictionaries.
        circuit: the circuit.
        prompt: the prompts.
        metric: takes logits ``[batch, pos, d_vocab]`` and returns a number for each prompt.
        source: prompts that ablated nodes take their values from; needed but for ``"zero"``.
        ablation: ``"mean"``: the mean over the source's prompts at each position. ``"zero"``. ``"resample"``: those of
            a source prompt that is drawn for each prompt. ``"patching"``: those of each prompt's own source.
        errors: ``"default"``: error terms are nodes like others. ``"keep"``: none is ablated. ``"remove"``: all are.
        start_layer: dictionaries below this layer are left alone.
        seed: seed of the draw.

    Raises:
        InputError: a circuit of another model, a source that is missing or too long, or a metric that is the same with
            everything and with nothing.
    """
    return _evaluated(model, circuit, prompt, metric, "faithfulness", **options)


@_typed
def feature_completeness(
    model: HookedTransformer,
    circuit: FeatureCircuit,
    prompt: Any,
    metric: Any,
    **options: Unpack[AblationOptions],
) -> FeatureFaithfulness:
    """Measures how much is left without the circuit: its nodes are ablated, and all others are not.

    Args:
        model, circuit, prompt, metric, **options: as in :func:`feature_faithfulness`.
    """
    return _evaluated(model, circuit, prompt, metric, "completeness", **options)


def _ablated_to(
    model: HookedTransformer, circuit: FeatureCircuit, source: Any, ablation: AblationKind, seed: int
) -> Any:
    """Returns the source of a sweep that ablation amounts to; ``None`` for zeros."""
    if (source is None) != (ablation == "zero"):
        need = "takes no source=" if ablation == "zero" else "needs source=, the prompts that values come from"
        raise InputError(f"ablation={ablation!r} {need}.")
    if ablation in ("zero", "patching"):
        return source
    names = [f"{point}.{end}" for point in circuit.points for end in ("hook_sae_acts_post", "hook_sae_error")]
    there = {spec.name for spec in model.hook_points()}
    _, cache = model.run_with_cache(source, names_filter=[name for name in names if name in there], return_type=None)
    assert isinstance(cache, ActivationCache)
    if cache.token_mask is not None and not np.asarray(cache.token_mask).all():
        raise InputError(f"ablation={ablation!r} takes values by position: give source prompts of equally many tokens.")
    return mean_source(cache, "batch") if ablation == "mean" else resample_source(cache, seed)


def _measured(
    model: HookedTransformer,
    nodes: Nodes,
    measure: Measure,
    points: Sequence[SplicedPoint],
    kept: dict[str, np.ndarray],
) -> np.ndarray:
    """Returns the metric with all nodes ablated that are not kept, ``[batch]``."""
    base, cfg = nodes.base, model.cfg
    hooks = HookDictionary((*model._hooks.entries, *(one for point in points for one in _ablating(nodes, point, kept))))
    final, _ = run_forward(cfg, model.params, base.tokens, base.context, hooks=hooks, stop=cfg.n_layers)
    return np.asarray(measure_run(measure, np.asarray(final)[:, : base.length]), np.float64).reshape(-1)


def _ablating(nodes: Nodes, point: SplicedPoint, kept: dict[str, np.ndarray]) -> list[HookEntry]:
    mask = kept[point.name].reshape(1, -1, kept[point.name].shape[-1])  # [1, pos or 1, d_sae + 1]
    if mask.shape[1] > 1:
        mask = np.pad(mask, [(0, 0), (0, nodes.base.padded_length - mask.shape[1]), (0, 0)])
    entries = [HookEntry(point.features, Replace(nodes.values[point.features], mask=jnp.asarray(~mask[..., :-1])))]
    if point.error is not None:
        wide = mask[..., -1].reshape(1, -1, *(1,) * (nodes.base.activations[point.error].ndim - 2))
        entries.append(HookEntry(point.error, Replace(nodes.values[point.error], mask=jnp.asarray(~wide))))
    return entries
