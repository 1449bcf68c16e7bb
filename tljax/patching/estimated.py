"""Sweeps whose effects are estimated from gradients, in the same result as exact ones."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tljax.attribution.estimates import Estimated, estimate_sites
from tljax.attribution.options import Estimate, Verify
from tljax.attribution.verification import Verification, named, verify
from tljax.errors import InputError
from tljax.model.hooked_transformer import HookedTransformer
from tljax.patching.assembly import as_result
from tljax.patching.engine.base_run import BaseRun
from tljax.patching.engine.engine import floor_flops, reach_of
from tljax.patching.engine.report import SweepReport, blocks_flops, forward_flops
from tljax.patching.engine.run import Measured, Metrics, Reduce, measure_run, prepare_metrics
from tljax.patching.engine.sites import Sites, find_rows
from tljax.patching.metrics.evaluation import Measure
from tljax.patching.result import PatchingResult
from tljax.patching.sources import Source
from tljax.patching.tables import entry_name
from tljax.processes import as_numpy

if TYPE_CHECKING:
    from tljax.patching.sweep import SiteGrid


def estimated_sweeps(
    model: HookedTransformer,
    base: BaseRun,
    kinds: Mapping[str, "SiteGrid"],
    source: Source,
    metric: Metrics,
    how: Estimate,
    reduce: Reduce,
    max_batch: int | Literal["auto"],
    progress: bool | None,
) -> list[PatchingResult]:
    """Estimates the sites of some activations, from one backward pass if the method needs no more.

    Args:
        model, base: the model and its unpatched run.
        kinds: for each activation's name, its sites.
        source: the values that patches write.
        how: the method.
        metric, reduce, max_batch, progress: as in :func:`~tljax.patching.sweep`.

    Raises:
        InputError: the source does not have what the method needs, or there is no gradient.
    """
    if how.verify is not None and not callable(metric):
        raise InputError("verify= ranks sites by one metric, and several were given by name: pass one alone.")
    if how.method == "ig" and how.along != "activation" and not source.everywhere:
        raise InputError(
            f"along={how.along!r} moves other activations than the patched one, and the source is an array for "
            "that one alone: pass the source prompt or its cache, or along='activation'."
        )
    measures = prepare_metrics(metric, model, base)
    at_run = None if how.gradient_at == "base" else _run_of(source, base)
    estimated = estimate_sites(
        model, base, [swept.sites for swept in kinds.values()], measures, how,
        values=source.values, at_run=at_run,
        at_measures=None if at_run is None else prepare_metrics(metric, model, at_run),
        each_prompt=reduce == "none",
    )  # fmt: skip
    clean = None
    if source.final is not None:
        clean = {name: measure_run(measure, source.final) for name, measure in measures.items()}
    baseline = {name: as_numpy(measure.baseline) for name, measure in measures.items()}
    results = []
    for (name, swept), found in zip(kinds.items(), estimated, strict=True):
        values = {key: baseline[key] + change for key, change in found.change.items()}
        report = _report(model, base, swept.sites, found, measures)
        measured = Measured(values, baseline, clean, not callable(metric), report)
        result = as_result(measured, swept.sizes, swept.names, reduce, name, swept.labels, change=found.change)
        result = dataclasses.replace(result, convention=found.convention, completeness=found.completeness)
        if how.verify is not None:
            checked = _verified(
                model, base, swept, measures["metric"], metric, result, how.verify, max_batch, progress
            )  # fmt: skip
            result = dataclasses.replace(result, verified=checked)
        results.append(result)
    return results


def _run_of(source: Source, base: BaseRun) -> BaseRun:
    if source.run is None:
        raise InputError(
            "gradient_at='source' differentiates the run that values come from: pass it as a prompt (text or tokens), "
            "or swap the two prompts and take gradient_at='base'."
        )
    here, there = base.text, source.run.text
    if here is not None and there is not None and not (here == there).all():
        raise InputError("gradient_at='source' needs both prompts padded alike: pad them on the same side.")
    return source.run


def _report(
    model: HookedTransformer, base: BaseRun, sites: Sites, estimated: Estimated, measures: Mapping[str, Measure]
) -> SweepReport:
    cfg, n_sites = model.cfg, len(sites)
    rows = find_rows(cfg, base, sites, base.length)
    positions = [measure.positions for measure in measures.values()]
    known = None if None in positions else tuple(sorted({p for some in positions for p in some or ()}))
    return SweepReport(
        n_sites,
        n_sites - len(np.unique(rows.site)),
        ("estimated from gradients",),
        ", ".join(dict.fromkeys(measure.how for measure in measures.values())),
        float((1 + estimated.passes) * blocks_flops(cfg, base.batch, base.padded_length)),
        floor_flops(cfg, rows, reach_of(cfg, base.length, known)),
        float(n_sites * forward_flops(cfg, base.batch, base.length)),
    )


def _verified(
    model: HookedTransformer,
    base: BaseRun,
    swept: "SiteGrid",
    measure: Measure,
    metric: Any,
    result: PatchingResult,
    how: Verify,
    max_batch: int | Literal["auto"],
    progress: bool | None,
) -> Verification:
    assert result.convention is not None
    has_sign = result.convention.has_sign
    best, fields = verify(
        model, base, swept.sites, measure, metric, result.site_effect().astype(np.float64).ravel(), how,
        has_sign=has_sign, max_batch=max_batch, progress=progress,
    )  # fmt: skip
    sites = named(best, swept.sizes)
    labels = [
        ", ".join(entry_name(result, axis, n) for axis, n in zip(swept.names, site, strict=True)) for site in sites
    ]
    return Verification(sites=sites, labels=tuple(labels), **fields)
