"""Table rows: each says which tensor of a checkpoint becomes which parameters; a family is a list of rows.

A row names the axes of the *checkpoint's* tensor; the axes of ours are known from the config. From these follow the
rearrangement between them, its inverse (for export), the split of a fused tensor, and the shape::

    Row("transformer.h.{l}.attn.c_attn.weight", "d_model (3 n_heads d_head)", "blocks.{l}.attn.W_Q|W_K|W_V")

Parentheses group axes that are stored as one. A number is the axis along which parameters of equal shape are fused. A
sum such as ``n_heads+n_kv+n_kv`` is an axis along which parameters are concatenated. Beside an axis ``n_kv``,
``n_heads/n_kv`` is the axis of the query heads of one key/value head. Two rows may name one tensor, such as a norm that
two of our modules share. If experts are stored one by one, the key contains ``{e}`` and the axes are those of the
stacked experts, ``n_experts`` first; likewise ``{q}`` for query heads, ``{k}`` for key heads.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

EACH = {"{e}": "n_experts", "{q}": "n_heads", "{k}": "n_kv"}
"""Placeholder in a key that stands for several tensors → the axis along which they are stacked."""


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """The dtype and shape of a tensor, from a checkpoint's header."""

    dtype: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor of a checkpoint (per layer if the key has ``{l}``, per expert with ``{e}``) and what it fills.

    Attributes:
        key: the tensor's name; ``{l}`` stands for the layer.
        axes: its axes, outermost first, in the vocabulary of ``axis_sizes``.
        paths: our dotted path; ``a.W_Q|W_K|W_V`` names the parts of a fused tensor in stored order.
        aka: another name older checkpoints use for the same tensor.
        tied_to: the tensor it is tied to: if only one of the two is stored, it is read for both.
        skip: leading rows of the tensor that the model never uses.
        layers: the layers that have it; ``None``: all.
        other: whether this is an alternative way to store what other rows fill, read if it is found, and never written.
            If another row has the same key, the shape decides which of the two applies.
    """

    key: str
    axes: str
    paths: str
    aka: str | None = None
    tied_to: str | None = None
    skip: int = 0
    layers: tuple[int, ...] | None = None
    other: bool = False

    def targets(self, layer: int | None) -> tuple[str, ...]:
        """Returns the full paths this row fills in ``layer``."""
        parent, _, names = self.paths.rpartition(".")
        return tuple(at_layer(f"{parent}.{name}", layer) for name in names.split("|"))

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Returns the shape the checkpoint's tensor must have."""
        shape = [math.prod(_size(axis, sizes) for axis in group) for group in _parse(self.axes)]
        return (shape[0] + self.skip, *shape[1:]) if shape else ()

    def read(self, array: np.ndarray, ours: Sequence[str], sizes: Mapping[str, int]) -> tuple[np.ndarray, ...]:
        """Returns views of a checkpoint tensor in our layout, one for each target.

        Args:
            array: the checkpoint's tensor.
            ours: axes of the first target.
            sizes: axis lengths.
        """
        stored = self._stored()
        whole = (array[self.skip :] if self.skip else array).reshape([_size(axis, sizes) for axis in stored])
        joined = self._joined()
        if joined is None:
            axes = _cut_axes(stored, ours)
            order = self._order(stored, axes)
            turned = whole.transpose(order)
            parts = tuple(turned) if len(order) > len(axes) else (turned,)
        else:
            ends = np.cumsum([_size(name, sizes) for name in joined])[:-1]
            pieces = np.split(whole, ends, axis=stored.index("+".join(joined)))
            axes = _cut_axes(self._stored(joined[0]), ours)
            parts = [piece.transpose(self._order(self._stored(joined[0]), axes)) for piece in pieces]
        return tuple(merge_axes(part, axes, ours) for part in parts)

    def write(self, parts: Sequence[np.ndarray], ours: Sequence[str], sizes: Mapping[str, int]) -> np.ndarray:
        """Returns the checkpoint tensor that :meth:`read` would split into ``parts``; rows it skips are zeros."""
        joined = self._joined()
        stored = self._stored(joined[0] if joined else None)
        axes = _cut_axes(stored, ours)
        order = self._order(stored, axes)
        back = np.argsort(order)
        parts = [_cut(part, axes, ours, sizes) for part in parts]
        if joined is None:
            whole = (np.stack(parts) if len(order) > len(axes) else parts[0]).transpose(back)
        else:
            axis = self._stored().index("+".join(joined))
            whole = np.concatenate([part.transpose(back) for part in parts], axis=axis)
        shape = self.shape(sizes)
        if not self.skip:
            return np.asarray(whole.reshape(shape), order="C")
        whole = whole.reshape(shape[0] - self.skip, *shape[1:])
        return np.pad(whole, [(self.skip, 0)] + [(0, 0)] * (whole.ndim - 1))

    def layout(self, ours: Sequence[str], part: int, sizes: Mapping[str, int]) -> "StoredLayout":
        """Returns how the tensor holds target number ``part``.

        Args:
            ours: axes of the first target.
            part: number of the target.
            sizes: axis lengths.
        """
        joined, whole = self._joined(), self._stored()
        stored = self._stored(joined[0] if joined else None)
        axes = _cut_axes(stored, ours)
        order = self._order(stored, axes)
        cut = {axis.partition("/")[0]: axis for axis in stored if "/" in axis}
        lengths, offset = [_size(axis, sizes) for axis in whole], [0] * len(whole)
        own = list(lengths)
        if joined:
            place = whole.index("+".join(joined))
            own[place] = _size(joined[part], sizes)
            offset[place] = sum(_size(name, sizes) for name in joined[:part])
        return StoredLayout(
            groups=_parse(self.axes), stored=tuple(stored), lengths=tuple(own), whole=tuple(lengths),
            offset=tuple(offset), axes=tuple(axes), order=tuple(order),
            number=order[0] if len(order) > len(axes) else None,
            cut={axis: one.partition("/")[2] for axis, one in cut.items() if axis in ours}, group=cut,
        )  # fmt: skip

    def _joined(self) -> list[str] | None:
        """Returns the axes along which the parts are concatenated, one for each part, or ``None``."""
        return next((axis.split("+") for axis in self._stored() if "+" in axis), None)

    def _stored(self, part: str | None = None) -> list[str]:
        """Returns the tensor's axes; with ``part``, those of the part whose concatenated axis has that name."""
        axes = [axis for group in _parse(self.axes) for axis in group]
        return [part if part and "+" in axis else axis for axis in axes]

    def _order(self, stored: list[str], axes: list[str]) -> list[int]:
        wanted = [axis for axis in stored if axis.isdigit() and axis not in axes] + axes
        if sorted(stored) != sorted(wanted):
            raise ValueError(f"Row {self.key!r} stores {self.axes!r}, but {self.paths!r} has axes {axes}.")
        return [stored.index(axis) for axis in wanted]


@dataclasses.dataclass(frozen=True)
class StoredLayout:
    """How a stored tensor holds one parameter: what :meth:`Row.read` does, as data.

    Attributes:
        groups: the axes that lie in each of its dimensions.
        stored: all of them, outermost first, with the name that the first target has for a shared axis.
        lengths: how many entries along each belong to the parameter.
        whole: the axes' lengths as stored.
        offset: where the parameter's entries start along each.
        axes: the parameter's axes, with an axis that is stored in groups as two.
        order: places of these among ``stored``; that of the number of the part, if there is one, first.
        number: place of the axis that numbers fused parts, or ``None``.
        cut: axis that is stored in groups → the axis of groups.
        group: the same axis → the axis within a group.
    """

    groups: tuple[tuple[str, ...], ...]
    stored: tuple[str, ...]
    lengths: tuple[int, ...]
    whole: tuple[int, ...]
    offset: tuple[int, ...]
    axes: tuple[str, ...]
    order: tuple[int, ...]
    number: int | None
    cut: Mapping[str, str]
    group: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Entry:
    """A row bound to one layer and to the tensor found for it."""

    row: Row
    key: str
    targets: tuple[str, ...]

    def keys(self, sizes: Mapping[str, int]) -> tuple[str, ...]:
        """Returns the names of its tensors: one, or one for each expert or head."""
        return keys_of(self.key, sizes)

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Returns the shape of each of its tensors."""
        return self.row.shape(sizes)[1 if each_of(self.key) else 0 :]

    def input_first(self, ours: Sequence[str]) -> bool:
        """Whether each tensor is a matrix (or one per expert) whose first axis is the one that ours contracts.

        An embedding contracts its vocabulary. ``ours`` are the axes of the first target.
        """
        groups = _parse(self.row.axes)
        start = 1 if len(groups) == 3 else 0
        return len(groups) == 2 + start and groups[start][0] == ours[start]

    def read(
        self, read: Callable[[str], np.ndarray], ours: Sequence[str], sizes: Mapping[str, int]
    ) -> tuple[np.ndarray, ...]:
        """Returns the parameters it fills, reading its tensors with ``read``."""
        stored = [read(key) for key in self.keys(sizes)]
        return self.row.read(np.stack(stored) if each_of(self.key) else stored[0], ours, sizes)

    def write(self, key: str, parts: Sequence[Any], ours: Sequence[str], sizes: Mapping[str, int]) -> np.ndarray:
        """Returns the entry's tensor named ``key``, made from the parameters ``parts`` (on any device)."""
        if (each := each_of(self.key)) is None:
            return self.row.write([np.asarray(part) for part in parts], ours, sizes)
        index = self.keys(sizes).index(key)
        alone = [np.asarray(part[index : index + 1]) for part in parts]
        return self.row.write(alone, ours, {**sizes, EACH[each]: 1})[0]


def bind(rows: Iterable[Row], n_layers: int) -> list[Entry]:
    """Returns one entry for each tensor that ``rows`` expect of a model with ``n_layers`` layers."""
    entries = []
    for row in rows:
        layers = range(n_layers) if row.layers is None else row.layers
        for layer in layers if "{l}" in row.key else (None,):
            own = dataclasses.replace(row, aka=at_layer(row.aka, layer)) if row.aka else row
            entries.append(Entry(own, at_layer(row.key, layer), row.targets(layer)))
    return entries


def at_layer(template: str, layer: int | None) -> str:
    """Returns ``template`` with ``{l}`` filled in."""
    return template if layer is None else template.replace("{l}", str(layer))


def is_bias(path: str) -> bool:
    """Whether a parameter is the bias of a matrix: ``b_Q``, ``b_U``, …"""
    return path.rpartition(".")[2].startswith("b_")


def may_be_absent(path: str) -> bool:
    """Whether a parameter is zero if an architecture lacks it: a bias, also that of a layer norm (``b``)."""
    return is_bias(path) or path.endswith(".b")


def keys_of(key: str, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Returns the names that ``key`` stands for: itself, or one for each expert or head."""
    each = each_of(key)
    return (key,) if each is None else tuple(key.replace(each, str(index)) for index in range(sizes[EACH[each]]))


def each_of(key: str) -> str | None:
    return next((each for each in EACH if each in key), None)


@functools.cache
def _parse(axes: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(token.strip("()").split()) for token in re.findall(r"\([^)]*\)|\S+", axes))


def _size(axis: str, sizes: Mapping[str, int]) -> int:
    if "+" in axis:
        return sum(_size(name, sizes) for name in axis.split("+"))
    name, _, runs = axis.partition("/")
    whole = int(name) if name.isdigit() else sizes[name]
    return whole // _size(runs, sizes) if runs else whole


def _cut_axes(stored: list[str], ours: Sequence[str]) -> list[str]:
    """Returns our axes, with an axis that is stored in groups as two: ``n_kv``, then ``n_heads/n_kv``."""
    cut = {axis.partition("/")[0]: axis for axis in stored if "/" in axis}
    pairs = ([cut[axis].partition("/")[2], cut[axis]] if axis in cut else [axis] for axis in ours)
    return [axis for pair in pairs for axis in pair]


def _cut(part: np.ndarray, axes: list[str], ours: Sequence[str], sizes: Mapping[str, int]) -> np.ndarray:
    """Reshapes ``part`` from the axes ``ours`` to ``axes``."""
    lengths: list[int] = []
    for axis, length in zip(ours, part.shape, strict=True):
        runs = 1 if axis in axes else _size(axes[len(lengths)], sizes)
        lengths += [length] if axis in axes else [runs, length // runs]
    return part.reshape(lengths)


def merge_axes(part: np.ndarray, axes: Sequence[str], ours: Sequence[str]) -> np.ndarray:
    """Inverts :func:`_cut`; copies only if an axis was cut."""
    lengths = iter(part.shape)
    return part.reshape([next(lengths) * (1 if axis in axes else next(lengths)) for axis in ours])
