"""Text and tables that describe a patching result."""

import itertools
from typing import Any

import jax
import numpy as np
from jax.core import Tracer


def describe(result: Any) -> str:
    """Describes a result in one line: axes, baseline, the site that moves the metric most, and the report."""
    axes = " × ".join(f"{axis} {size}" for axis, size in result.sizes.items()) or "one site"
    parts = [f"{result.activation_name}: {axes}" if result.activation_name else axes]
    if result.has_metric_axis:
        parts.append(f"metrics {', '.join(result.metric_names)}")
    if all(isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer) for leaf in jax.tree.leaves(result)):
        parts += _in_numbers(result)
    said = (result.convention, result.completeness, result.verified, result.report)
    parts += [str(part) for part in said if part is not None]
    return f"PatchingResult({'; '.join(parts)})"


def _in_numbers(result: Any) -> list[str]:
    if result.has_metric_axis or result.baseline is None:
        return []
    runs = f"baseline {np.asarray(result.baseline, np.float64).mean():.4g}"
    if result.clean is not None:
        runs += f", clean {np.asarray(result.clean, np.float64).mean():.4g}"
    effect = result.site_effect()
    if not effect.size or np.isnan(effect).all():
        return [runs]
    site = np.unravel_index(np.nanargmax(np.abs(effect)), effect.shape)
    where = ", ".join(entry_name(result, axis, int(n)) for axis, n in zip(result.site_axes, site, strict=True))
    return [runs, f"largest effect {effect[site]:+.4g}" + (f" at {where}" if where else "")]


def entry_name(result: Any, axis: str, number: int) -> str:
    """Names an entry of an axis, with its label if that says more than its number: ``pos 9 ' Mary'``."""
    texts = result.metric_names if axis == "metric" else result.labels.get(axis)
    if texts is None or texts[number].lstrip("LH") == str(number):
        return f"{axis} {number}"
    return f"{axis} {number} {texts[number]!r}"


def site_frame(result: Any) -> Any:
    """Returns the sites as a DataFrame: one row a site, in the order of ``values``; one column an axis."""
    if result.rows is not None:
        return result.rows
    sites = itertools.product(*(range(result.sizes[axis]) for axis in result.site_axes))
    return load_pandas().DataFrame(list(sites), columns=list(result.site_axes))


def value_frame(result: Any) -> Any:
    """Returns a DataFrame with one row for each metric, site and prompt."""
    shape = result.shape
    entries = dict(zip(result.axis_names, np.indices(shape).reshape(len(shape), -1), strict=True))
    metric = entries.get("metric", np.zeros(result.values.size, int))
    columns: dict[str, Any] = {"metric": np.asarray(result.metric_names, object)[metric]}
    for axis in result.site_axes:
        if axis == "row" and result.rows is not None:
            columns |= {name: result.rows[name].to_numpy()[entries["row"]] for name in result.rows.columns}
        else:
            columns[axis] = entries[axis]
    if "patch_type" in entries and result.patch_type_names:
        columns["patch_type_name"] = np.asarray(result.patch_type_names, object)[entries["patch_type"]]
    if not result.reduced:
        columns["example"] = entries["batch"]
    return load_pandas().DataFrame(columns | {"value": np.asarray(result.values).ravel()})


def load_pandas() -> Any:
    try:
        import pandas
    except ImportError as error:
        raise ImportError("Tables of results are pandas DataFrames: pip install pandas.") from error
    return pandas


class Same:
    """A DataFrame as static data of a pytree: equal only to itself, since DataFrames cannot be hashed or compared."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)
