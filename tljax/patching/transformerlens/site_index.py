"""The index of a sweep in TransformerLens's terms: one row a site, spanned by named axes or listed in a table."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from tljax.config import HookedTransformerConfig
from tljax.errors import InputError, nearest
from tljax.hooks.names import layer_in
from tljax.hooks.point import POSITION_AXES
from tljax.hooks.points import layer_of
from tljax.hooks.selectors import AXIS_ALIASES
from tljax.patching import tables
from tljax.patching.sweep import SITE_AXES, Setup, places_in_text

AXIS_NAMES = ("layer", *SITE_AXES, *(alias for alias, axis in AXIS_ALIASES.items() if axis in SITE_AXES))


@dataclasses.dataclass(frozen=True)
class SiteIndex:
    """The index of a sweep, with one row for each site.

    Attributes:
        names: names of the columns, as given.
        rows: the rows, as a setter takes them.
        axes: axes of the result.
        sizes: sizes of the axes.
        listed: the DataFrame that listed the sites; ``None`` if named axes span them.
    """

    names: tuple[str, ...]
    rows: list[list[Any]]
    axes: tuple[str, ...]
    sizes: tuple[int, ...]
    listed: Any = None

    @property
    def table(self) -> Any:
        """The index as a DataFrame."""
        return self.listed if self.listed is not None else data_frame(self.rows, self.names)

    def whole_numbers(self, number: int, size: int, what: str, counted: bool = True) -> np.ndarray:
        """Returns a column of indices along an axis; negative ones are made to count from the start if ``counted``.

        Raises:
            InputError: the column holds something other than indices of that axis.
        """
        column = [row[number] for row in self.rows]
        for row, entry in enumerate(column):
            if not isinstance(entry, int | np.integer) or not -size <= entry < size:
                raise InputError(
                    f"The index has {self.names[number]} {entry!r} in row {row}; {what} has 0 to {size - 1} there, or "
                    "negative numbers from the end."
                )
        return np.asarray(column, int) % size if counted else np.asarray(column, int)


def layers_of(index: SiteIndex, n_layers: int) -> np.ndarray | None:
    """Returns the layer of each row; ``None`` if the index has no layer column."""
    if "layer" not in index.names:
        return None
    return index.whole_numbers(index.names.index("layer"), n_layers, "the model")


def data_frame(rows: Sequence[Sequence[Any]], names: Sequence[str]) -> Any:
    """Returns a pandas DataFrame of some rows."""
    return tables.load_pandas().DataFrame(list(rows), columns=list(names))


def listed_index(index_df: Any) -> SiteIndex:
    """Returns the sites listed in a DataFrame; the result has one entry for each row.

    Raises:
        InputError: ``index_df`` is not a DataFrame, or has no rows.
    """
    if not hasattr(index_df, "columns"):
        raise InputError(
            "index_df is a pandas DataFrame with one row for each site and columns such as layer and pos; got "
            f"{type(index_df).__name__}. make_df_from_ranges makes one."
        )
    names = tuple(str(name) for name in index_df.columns)
    columns = [[_as_python(entry) for entry in index_df[name]] for name in index_df.columns]
    rows = [list(row) for row in zip(*columns, strict=True)]
    if not rows:
        raise InputError("index_df has no rows: list at least one site.")
    return SiteIndex(names, rows, ("row",), (len(rows),), index_df)


def _as_python(entry: Any) -> Any:
    return entry.item() if isinstance(entry, np.generic) else entry


def spanned_index(names: Sequence[str], setup: Setup) -> SiteIndex:
    """Returns the sites of all combinations of the entries of some axes, the last axis varying fastest.

    Raises:
        InputError: an axis does not exist or is named twice.
    """
    if isinstance(names, str):
        raise InputError(f"index_axis_names is a sequence of names: ({names!r},) instead of {names!r}.")
    entries = [_entries(name, setup) for name in names]
    if len(set(names)) < len(names) or not names:
        raise InputError(f"index_axis_names={tuple(names)} must name at least one axis, and each once.")
    full = tuple(axis_name(name) for name in names)
    axes = full if len(set(full)) == len(full) else tuple(names)
    rows = [list(row) for row in itertools.product(*entries)]
    return SiteIndex(tuple(names), rows, axes, tuple(map(len, entries)))


def axis_name(name: str) -> str:
    """Returns tljax's name of an axis."""
    return AXIS_ALIASES.get(name, name)


def _entries(name: str, setup: Setup) -> Sequence[int]:
    full = axis_name(name)
    if full == "layer":
        return setup.layers
    if full not in SITE_AXES:
        raise InputError(f"index_axis_names has {name!r}; axes are {', '.join(AXIS_NAMES)}.{nearest(name, AXIS_NAMES)}")
    return range(setup.base.n_positions if full in POSITION_AXES else dict(setup.spec.sizes)[full])


def site_layers(setup: Setup, activation_name: str, index: SiteIndex, cfg: HookedTransformerConfig) -> np.ndarray:
    """Returns the layer of each site.

    Raises:
        InputError: the index has no layer, or has one although the activation is that of one layer or the embedding.
    """
    if layer_in(activation_name) is not None or layer_of(setup.names[0]) is None:
        if "layer" in index.names:
            raise InputError(
                f"{activation_name!r} exists once, and the index {index.names} has a layer: leave it out, or give the "
                "short name of an activation that every layer has, such as 'resid_pre'."
            )
        return np.full(len(index.rows), setup.layers[0])
    layer = layers_of(index, cfg.n_layers)
    if layer is None:
        raise InputError(
            f"The index has {index.names} and no layer, and every layer has {activation_name!r}: add 'layer', or give "
            f"the full name of one layer's, such as {setup.names[0]!r}."
        )
    return layer


def site_entries(index: SiteIndex, axes: Sequence[str], setup: Setup, setter: str) -> dict[str, np.ndarray]:
    """Returns the entry of each site along each axis of a known setter; one for each prompt if prompts are padded.

    Columns named like the axes are matched by name, in any order; columns of a DataFrame with other names, by order.

    Raises:
        InputError: the index does not fit the setter, or names an entry that does not exist.
    """
    numbers = [number for number, name in enumerate(index.names) if name != "layer"]
    full = [axis_name(index.names[number]) for number in numbers]
    if "pos" not in axes:
        full = ["query_pos" if name == "pos" else name for name in full]
    if sorted(full) == sorted(axes):
        numbers = [numbers[full.index(axis)] for axis in axes]
    elif len(full) != len(axes) or any(
        name != axis and (index.listed is None or name in SITE_AXES) for name, axis in zip(full, axes, strict=True)
    ):
        raise InputError(f"{setter} takes an index of {('layer', *axes)}; this one has {index.names}.")
    spec, base = setup.spec, setup.base
    sizes = dict(zip(spec.axes, spec.shape(1, base.length), strict=True))
    entries = {}
    for axis, number in zip(axes, numbers, strict=True):
        if axis in POSITION_AXES and base.text is not None:
            entries[axis] = places_in_text(base, index.whole_numbers(number, base.n_positions, spec.name, False))
        else:
            entries[axis] = index.whole_numbers(number, sizes[axis], spec.name)
    return entries
