"""Runs sets of patched runs, evaluates metrics on them and reports the cost."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import numpy as np

from tljax.config import HookedTransformerConfig
from tljax.errors import InputError
from tljax.memory import batch_budget, how_many
from tljax.model.hooked_transformer import HookedTransformer
from tljax.model.metrics import InText
from tljax.patching.engine.base_run import BaseRun
from tljax.patching.engine.edits import Edits
from tljax.patching.engine.engine import Engine, Reach, reach_of
from tljax.patching.engine.packing import BatchLimits, Rows
from tljax.patching.engine.report import SweepReport, blocks_flops, forward_flops
from tljax.patching.engine.site_by_site import SiteBySite
from tljax.patching.engine.sites import Sites, find_rows, place
from tljax.patching.metrics.evaluation import Measure, PositionNotKept
from tljax.processes import as_numpy
from tljax.progress import Progress
from tljax.scale.batch import n_groups
from tljax.typing import Params

Reduce = Literal["mean", "none"]
Metrics = Callable[..., Any] | Mapping[str, Callable[..., Any]]


@dataclasses.dataclass(frozen=True)
class Measured:
    """Metrics of every site.

    Attributes:
        values: for each metric, ``[site]`` or ``[site, batch]``.
        baseline: for each metric, its value on the unpatched run, ``[]`` or ``[batch]``.
        clean: the same on the run that values come from; ``None`` if that is unknown.
        several: whether metrics were given by name.
        report: what the sweep did and spent.
    """

    values: dict[str, np.ndarray]
    baseline: dict[str, np.ndarray]
    clean: dict[str, np.ndarray] | None
    several: bool
    report: SweepReport


def measure_sites(
    model: HookedTransformer,
    base: BaseRun,
    sites: Sites,
    metric: Metrics,
    clean_final: Any = None,
    *,
    max_batch: int | Literal["auto"] = "auto",
    progress: bool | None = None,
) -> Measured:
    """Measures every site, each patched alone."""
    alone = bool(model._hooks.entries) or not sites.enter_stream
    edits = sites if alone else place(model.cfg, base, sites)

    def rows_before(end: int) -> Rows:
        return find_rows(model.cfg, base, sites, end)

    return measure_edits(model, base, len(sites), rows_before, edits, metric, clean_final, max_batch, progress)


def measure_edits(
    model: HookedTransformer,
    base: BaseRun,
    n_sites: int,
    rows_before: Callable[[int], Rows],
    edits: Edits | Sites,
    metric: Metrics,
    clean_final: Any = None,
    max_batch: int | Literal["auto"] = "auto",
    progress: bool | None = None,
) -> Measured:
    """Measures every site of some edits.

    Args:
        model, base: the model and its unpatched run.
        n_sites: number of sites.
        rows_before: function from a position to the rows that differ from the base run before it.
        edits: what the rows change. If these are :class:`Sites`, each runs alone, with the hooks the model carries.
        metric: one metric, or several by name.
        clean_final: final residual stream of the run that values come from, ``[batch, pos, d_model]``.
        max_batch, progress: as in :func:`sweep`.
    """
    measures = prepare_metrics(metric, model, base)
    read = [measure.positions for measure in measures.values()]
    everything = any(positions is None for positions in read)
    positions = None if everything else tuple(sorted({p for some in read for p in some or ()}))
    try:
        reach = reach_of(model.cfg, base.length, positions)
        values, rows, engine = _run(model, base, n_sites, rows_before, edits, measures, reach, max_batch, progress)
    except PositionNotKept:
        reach = reach_of(model.cfg, base.length, None)
        values, rows, engine = _run(model, base, n_sites, rows_before, edits, measures, reach, max_batch, progress)
    clean = None
    if clean_final is not None:
        clean = {name: measure_run(measure, clean_final) for name, measure in measures.items()}
    report = _report(model.cfg, base, n_sites, rows, reach, measures, engine)
    baseline = {name: as_numpy(measure.baseline) for name, measure in measures.items()}
    return Measured(values, baseline, clean, isinstance(metric, Mapping), report)


def prepare_metrics(metric: Metrics, model: HookedTransformer, base: BaseRun) -> dict[str, Measure]:
    """Prepares metrics to be evaluated on runs of the base run's prompts; one without a name is ``"metric"``."""
    if isinstance(metric, Mapping) and not metric:
        raise InputError("The mapping of metrics is empty: name at least one.")
    metrics = metric if isinstance(metric, Mapping) else {"metric": metric}
    return {name: prepare_metric(one, model, base) for name, one in metrics.items()}


def measure_run(measure: Measure, final: Any) -> np.ndarray:
    """Returns a metric of one run, ``[]`` or ``[batch]``, from its final residual stream ``[batch, pos, d_model]``."""
    return as_numpy(_measure_all(measure, as_numpy(final)[None])[0])


def prepare_metric(metric: Any, model: HookedTransformer, base: BaseRun) -> Measure:
    """Prepares a metric for runs of the base run's prompts, with its positions counted in each prompt's text."""
    final = as_numpy(base.final)[:, : base.length]
    if base.text is None:
        return Measure(metric, model.cfg.computation, model.params, final)
    counted = metric.in_text(base.text) if isinstance(metric, InText) else metric
    measure = Measure(counted, model.cfg.computation, model.params, final)
    measure.check_padding(base.text)
    return measure


def _measure_all(measure: Measure, finals: np.ndarray) -> jax.Array:
    """Measures runs given at every position, so that the metric may read any."""
    try:
        return measure(finals)
    except PositionNotKept:  # it read what it had not read of the base run, and expects any position from now on
        return measure(finals)


def _run(
    model: HookedTransformer,
    base: BaseRun,
    n_sites: int,
    rows_before: Callable[[int], Rows],
    edits: Edits | Sites,
    measures: Mapping[str, Measure],
    reach: Reach,
    max_batch: int | Literal["auto"],
    progress: bool | None,
) -> tuple[dict[str, np.ndarray], Rows, Engine | SiteBySite]:
    rows = rows_before(reach.end)
    with Progress(len(rows), progress) as bar:
        if isinstance(edits, Sites):
            engine = SiteBySite(model, base, reach, bar.advance)
            run = functools.partial(engine.run, sites=edits)
        else:
            engine = Engine(model, base, reach, batch_limits(model.cfg, model.params, base, max_batch), bar.advance)
            run = functools.partial(engine.run, edits=edits)
        values = measure_rows(run, rows, n_sites, measures, base, reach)
    return values, rows, engine


def measure_rows(
    run: Callable[..., np.ndarray],
    rows: Rows,
    n_sites: int,
    measures: Mapping[str, Measure],
    base: BaseRun,
    reach: Reach,
) -> dict[str, np.ndarray]:
    """Runs rows and measures them, as many sites at a time as final residual streams of them fit in memory.

    Args:
        run: function of ``rows``, ``first`` and ``n_sites`` that returns final streams, as :meth:`Engine.run` does.
        rows: the rows.
        n_sites: number of sites.
        measures: the metrics.
        base, reach: the unpatched run, and the positions that ``run`` returns.

    Returns:
        For each metric, ``[site]`` or ``[site, batch]``. A site without rows measures as the base run does.
    """
    positions = base.length if reach.only is None else 1
    group = how_many(base.batch * positions * base.final.shape[-1] * base.final.dtype.itemsize)
    values: dict[str, list[np.ndarray]] = {name: [] for name in measures}
    for first in range(0, n_sites, group):
        count = min(group, n_sites - first)
        part = rows.take(np.flatnonzero((rows.site >= first) & (rows.site < first + count)))
        finals = run(part, first=first, n_sites=count)
        live = np.unique(part.site) - first
        finals = finals[live] if len(live) < count else finals
        for name, measure in measures.items():
            measured = np.repeat(as_numpy(measure.baseline)[None], count, axis=0)
            measured[live] = as_numpy(measure(finals, reach.only))
            values[name].append(measured)
    return {name: np.concatenate(parts) for name, parts in values.items()}


def batch_limits(
    cfg: HookedTransformerConfig, params: Params, base: BaseRun, max_batch: int | Literal["auto"]
) -> BatchLimits:
    """Returns how much may run at once, by ``max_batch`` and the free memory.

    Each group of devices that prompts are spread over has a lane; ``max_batch`` counts the rows of all.
    """
    if max_batch != "auto" and (not isinstance(max_batch, int) or max_batch < 1):
        raise InputError(f'max_batch={max_batch!r} must be a positive number or "auto".')
    device = next(iter(base.final.devices()))
    limits = limits_within(cfg, base.padded_length, batch_budget(device), device.platform == "cpu")
    lanes = n_groups(params)
    filled = lanes if max_batch == "auto" else min(lanes, max_batch)
    rows = limits.rows if max_batch == "auto" else min(limits.rows, max_batch // filled)
    return dataclasses.replace(limits, rows=rows, lanes=lanes, filled=filled)


def limits_within(cfg: HookedTransformerConfig, length: int, budget: int, on_cpu: bool) -> BatchLimits:
    """Returns how much may run at once of prompts of a padded ``length``, where a kind of array may take ``budget``."""
    width = cfg.jnp_dtype.itemsize
    token_bytes = width * (12 * cfg.d_model + 4 * (cfg.d_mlp or 0) + 4 * cfg.n_heads * cfg.d_head)
    row_bytes = width * length * (4 * cfg.n_heads * length + 4 * cfg.n_heads * cfg.d_head)
    tokens = int(np.clip(budget // token_bytes, 64, 2048 if on_cpu else 65536))
    rows = int(np.clip(budget // row_bytes, 1, 256 if on_cpu else 8192))
    return BatchLimits(tokens, rows)


def _report(
    cfg: HookedTransformerConfig,
    base: BaseRun,
    n_sites: int,
    rows: Rows,
    reach: Reach,
    measures: Mapping[str, Measure],
    engine: Engine | SiteBySite,
) -> SweepReport:
    skipped = n_sites - len(np.unique(rows.site))
    reductions = []
    by_batches = isinstance(engine, Engine)
    if by_batches and len(rows) and int(rows.layer.max()) > 0:
        reductions.append("layer skip")
    if by_batches and cfg.attention_dir == "causal" and len(rows) and int(rows.start.max()) > 0:
        reductions.append("causal suffix")
    if skipped:
        reductions.append("sites without effect skipped")
    if reach.only is not None:
        reductions.append("one position unembedded")
    full = forward_flops(cfg, base.batch, base.length)
    unembedding = sum(measure.flops for measure in measures.values())
    spent = engine.spent.flops + blocks_flops(cfg, base.batch, base.padded_length) + (n_sites - skipped) * unembedding
    how = ", ".join(dict.fromkeys(measure.how for measure in measures.values()))
    return SweepReport(
        n_sites, skipped, tuple(reductions), how, float(spent), engine.spent.floor, float(n_sites * full)
    )
