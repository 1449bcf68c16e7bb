"""The table machinery: a family is a list of rows, and a row says which tensor becomes which parameters.

A row names the axes of the *checkpoint's* tensor; the axes of ours are known from the config. The
rearrangement between them, its inverse (for export), the split of a fused tensor and the shape follow::

    Row("transformer.h.{l}.attn.c_attn.weight", "d_model (3 n_heads d_head)", "blocks.{l}.attn.W_Q|W_K|W_V")

Parentheses group axes that are stored as one; a number is the axis along which parameters of equal shape are
fused, and a sum such as ``n_heads+n_kv+n_kv`` joins the axis of one parameter to those of the next. ``n_heads/n_kv``
is what is left of ``n_heads`` next to an axis ``n_kv``: the heads are cut into so many runs. Two rows may name one
tensor: a norm that two of our modules share. Where experts are stored one by one, the key holds ``{e}`` and the axes
are those of all of them stacked, ``n_experts`` first; likewise ``{q}`` for query heads, ``{k}`` for key heads.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from tljax.checkpoints.hf_config import HFConfig
from tljax.checkpoints.layout import axis_sizes, parameter_axes, stage_of
from tljax.checkpoints.tower import Tower
from tljax.config import HookedTransformerConfig
from tljax.errors import CheckpointError, UnsupportedModelError

FLOATS = ("F64", "F32", "F16", "BF16")
SHOWN = 12
_EACH = {"{e}": "n_experts", "{q}": "n_heads", "{k}": "n_kv"}
"""What a key holds that stands for several tensors, and the axis they are stacked along."""


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """What a checkpoint's header says about one tensor, without reading it."""

    dtype: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor of a checkpoint (one a layer if the key holds ``{l}``, one an expert with ``{e}``) and what it fills.

    Attributes:
        key: the tensor's name; ``{l}`` stands for the layer.
        axes: its axes, outermost first, in the vocabulary of ``layout.axis_sizes``.
        paths: our dotted path; ``a.W_Q|W_K|W_V`` names the parts of a fused tensor in stored order.
        aka: another name older checkpoints use for the same tensor.
        tied_to: the tensor that is the same: where only one of the two is stored, it is read for both.
        skip: leading rows of the tensor that the model never uses.
        layers: the layers that have it; ``None``: all.
        other: a second way to store what other rows fill, used where it is found, and never written. If another row
            has the same key, the shape tells which of the two is meant.
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
        return tuple(_merge(part, axes, ours) for part in parts)

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

    def _joined(self) -> list[str] | None:
        """The axes of the parts, where they are joined along one."""
        return next((axis.split("+") for axis in self._stored() if "+" in axis), None)

    def _stored(self, part: str | None = None) -> list[str]:
        """The tensor's axes; of one part, where parts are joined and ``part`` names its own axis."""
        axes = [axis for group in _parse(self.axes) for axis in group]
        return [part if part and "+" in axis else axis for axis in axes]

    def _order(self, stored: list[str], axes: list[str]) -> list[int]:
        wanted = [axis for axis in stored if axis.isdigit() and axis not in axes] + axes
        if sorted(stored) != sorted(wanted):
            raise ValueError(f"Row {self.key!r} stores {self.axes!r}, but {self.paths!r} has axes {axes}.")
        return [stored.index(axis) for axis in wanted]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """Everything tljax knows about one architecture, in both directions.

    Attributes:
        architecture: class name in config.json's ``architectures``.
        aka: another name for it in checkpoints that were published with code of their own.
        model_type: ``model_type`` in config.json.
        read_config: HF config → ours; it must read every attribute that changes the function.
        write_config: our config, and which biases are not all zero (such as ``"attn.b_Q"``) → HF config.
        rows: HF config → the table.
        prefix: may be missing from a checkpoint's keys (checkpoints of the bare model without its head).
        ignored: patterns of stored buffers that are not parameters.
        renamed: patterns of starts of stored names, and what the table has instead.
        tower: for a multimodal architecture, where its config holds that of the text model, which the rest describes.
        computed: our config → by path, what makes a parameter that follows from a formula and is not stored.
        defaults: what transformers' class takes for an attribute that config.json lacks: all sizes, and what differs
            from the default of a reader that families share. These are the attributes no caller can have ignored.
        aliases: other name → name, as in the class's ``attribute_map``.
        inert: why some attributes do not change this family's logits → their names, separated by spaces.
        own_code: pattern of the modules in which the publishers' own code was, before transformers took it over.
    """

    architecture: str
    model_type: str
    read_config: Callable[[HFConfig], HookedTransformerConfig]
    write_config: Callable[[HookedTransformerConfig, frozenset[str]], dict[str, Any]]
    rows: Callable[[HFConfig], Sequence[Row]]
    prefix: str = ""
    ignored: tuple[str, ...] = ()
    computed: Callable[[HookedTransformerConfig], Mapping[str, Callable[[], np.ndarray]]] = lambda cfg: {}
    aka: str | None = None
    renamed: tuple[tuple[str, str], ...] = ()
    tower: Tower | None = None
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    inert: Mapping[str, str] = dataclasses.field(default_factory=dict)
    own_code: str = ""

    def config(self, attributes: Mapping[str, Any], origin: str = "config.json") -> HFConfig:
        """Returns config.json's ``attributes`` as this family reads them.

        Raises:
            UnsupportedModelError: the checkpoint brings code of its own that transformers does not have.
        """
        inert = [name for names in self.inert.values() for name in names.split()]
        hf = HFConfig(attributes, origin, defaults=self.defaults, aliases=self.aliases, inert=inert)
        hf.check_own_code(self.own_code)
        return hf if self.tower is None else self.tower.text_config(hf)


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
        return self.row.shape(sizes)[1 if _each(self.key) else 0 :]

    def input_first(self, ours: Sequence[str]) -> bool:
        """Whether each of its tensors is a matrix, or one an expert, whose first axis is the one that ours contracts.

        An embedding contracts its vocabulary. ``ours``: axes of the first target.
        """
        groups = _parse(self.row.axes)
        start = 1 if len(groups) == 3 else 0
        return len(groups) == 2 + start and groups[start][0] == ours[start]

    def read(
        self, read: Callable[[str], np.ndarray], ours: Sequence[str], sizes: Mapping[str, int]
    ) -> tuple[np.ndarray, ...]:
        """Returns the parameters it fills, reading its tensors with ``read``."""
        stored = [read(key) for key in self.keys(sizes)]
        return self.row.read(np.stack(stored) if _each(self.key) else stored[0], ours, sizes)

    def write(self, key: str, parts: Sequence[Any], ours: Sequence[str], sizes: Mapping[str, int]) -> np.ndarray:
        """Returns the tensor named ``key``, one of its own, of the parameters it fills (on any device)."""
        if (each := _each(self.key)) is None:
            return self.row.write([np.asarray(part) for part in parts], ours, sizes)
        index = self.keys(sizes).index(key)
        alone = [np.asarray(part[index : index + 1]) for part in parts]
        return self.row.write(alone, ours, {**sizes, _EACH[each]: 1})[0]


def bind(rows: Iterable[Row], n_layers: int) -> list[Entry]:
    """Returns one entry for each tensor that ``rows`` expect of a model with ``n_layers`` layers."""
    entries = []
    for row in rows:
        layers = range(n_layers) if row.layers is None else row.layers
        for layer in layers if "{l}" in row.key else (None,):
            own = dataclasses.replace(row, aka=at_layer(row.aka, layer)) if row.aka else row
            entries.append(Entry(own, at_layer(row.key, layer), row.targets(layer)))
    return entries


def match(
    rows: Sequence[Row],
    cfg: HookedTransformerConfig,
    tensors: Mapping[str, TensorInfo],
    *,
    prefix: str = "",
    ignored: Sequence[str] = (),
    computed: Collection[str] = (),
    origin: str = "The checkpoint",
    config_name: str = "config.json",
) -> dict[str, list[Entry]]:
    """Pairs the table with what is stored, both ways, before anything is read.

    Args:
        rows: the family's table.
        cfg: the config the checkpoint claims.
        tensors: name → dtype and shape of every stored tensor.
        prefix: may be missing from stored names.
        ignored: patterns of stored names that are not parameters.
        computed: paths of parameters that are not stored.
        origin: named in the error.
        config_name: what the error calls the config.

    Returns:
        Stage (``"head"``, ``"embed"``, ``"blocks.0"``, …) → entries whose ``key`` is the stored name.

    Raises:
        CheckpointError: tensors are missing, unexpected or of the wrong shape; lists all of them.
        UnsupportedModelError: a needed tensor is stored in a quantized or integer format.
    """
    sizes, axes = axis_sizes(cfg), parameter_axes(cfg)
    stages: dict[str, list[Entry]] = {}
    missing, misshapen, used = [], [], set()
    for entry in _as_stored(bind(rows, cfg.n_layers), sizes, prefix, tensors):
        expected = entry.shape(sizes)
        for key in entry.keys(sizes):
            if key not in tensors:
                missing.append(f"{key} {list(expected)}")
                continue
            used.add(key)
            if tensors[key].dtype not in FLOATS:
                raise UnsupportedModelError(
                    f"{origin} stores {key} as {tensors[key].dtype}. tljax reads {', '.join(FLOATS)}: dequantize "
                    "the checkpoint first, or load its full-precision original."
                )
            if tensors[key].shape != expected:
                misshapen.append(f"{key} is {list(tensors[key].shape)}, {config_name} says {list(expected)}")
        stages.setdefault(stage_of(entry.targets[0]), []).append(entry)
    skip = _pattern(ignored)
    extra = [f"{key} {list(tensors[key].shape)}" for key in tensors if key not in used and not skip.fullmatch(key)]
    _report(origin, config_name, {"missing": missing, "unexpected": extra, "of another shape": misshapen})
    unfilled = (
        set(axes) - set(computed) - {path for entries in stages.values() for entry in entries for path in entry.targets}
    )
    if weights := sorted(path for path in unfilled if not may_be_absent(path)):
        raise ValueError(f"The table fills no {weights}: every weight needs a row.")
    return stages


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a tensor that the table knows is stored.

    Attributes:
        key: its name in the checkpoint; its own name where it is not stored, because it is tied.
        tied_to: the stored name of the tensor that stands for it, or that transformers takes in its place.
        input_first: whether it is a matrix (or one an expert) stored with the axis it contracts first, as ``Conv1D``
            and embeddings are.
        of_vocabulary: whether its first axis is the vocabulary.
    """

    key: str
    tied_to: str | None
    input_first: bool
    of_vocabulary: bool


def places(
    rows: Sequence[Row], cfg: HookedTransformerConfig, tensors: Mapping[str, TensorInfo], prefix: str = ""
) -> dict[str, Place]:
    """Returns where each tensor of the table is stored, by every name that it goes by (see :func:`match`)."""
    sizes, axes = axis_sizes(cfg), parameter_axes(cfg)
    entries = bind(rows, cfg.n_layers)
    tied = _tied(entries)
    found: dict[str, Place] = {}
    for entry in entries:
        stored = _stored_name(entry, tied.get(entry.key), sizes, prefix, tensors)
        if stored is None:
            continue
        names = _names(entry, prefix)
        own = entry.key if stored not in names else stored
        others = (entry.row.tied_to or "", (entry.row.tied_to or "").removeprefix(prefix))
        tied_to = stored if own != stored else next((name for name in others if name in tensors), None)
        first = entry.input_first(axes[entry.targets[0]])
        of_vocabulary = _parse(entry.row.axes)[:1] in ((("d_vocab",),), (("d_vocab_out",),))
        for name in names:
            for known, key in zip(keys_of(name, sizes), keys_of(own, sizes), strict=True):
                found.setdefault(known, Place(key, tied_to, first, of_vocabulary))
    return found


def stored_apart(stages: Mapping[str, Sequence[Entry]]) -> list[tuple[Entry, Entry]]:
    """Returns tied entries each of which found a tensor of its own, the one that may be absent first."""
    entries = [entry for stage in stages.values() for entry in stage]
    by_row = {entry.row.key: entry for entry in entries}
    pairs = [(entry, by_row[entry.row.tied_to]) for entry in entries if entry.row.tied_to in by_row]
    return [(one, other) for one, other in pairs if one.key != other.key]


def is_stored_name(
    rows: Iterable[Row], cfg: HookedTransformerConfig, prefix: str = "", ignored: Sequence[str] = ()
) -> Callable[[str], bool]:
    """Returns whether a name is one that a tensor of ``rows`` may be stored under, or one of those to pass over."""
    sizes, skip = axis_sizes(cfg), _pattern(ignored)
    names = {
        key for entry in bind(rows, cfg.n_layers) for name in _names(entry, prefix) for key in keys_of(name, sizes)
    }
    return lambda name: name in names or skip.fullmatch(name) is not None


def check_counts(
    rows: Sequence[Row], cfg: HookedTransformerConfig, tensors: Mapping[str, TensorInfo], origin: str
) -> None:
    """Raises where more layers, experts or heads are claimed than tensors are stored, before any of them is named."""
    sizes, counts = axis_sizes(cfg), {"layers": cfg.n_layers}
    ends = tuple(row.key.rpartition("{l}")[2] for row in rows if row.other)  # of experts that are stored together
    together = any(key.endswith(ends) for key in tensors)
    for each, axis in _EACH.items():
        if any(each in row.key for row in rows) and not (axis == "n_experts" and together):
            counts[axis.removeprefix("n_")] = sizes[axis]
    for name, count in counts.items():
        if count > len(tensors):
            raise CheckpointError(
                f"{origin} stores {len(tensors)} tensors, fewer than the {count} {name} that its config.json claims. "
                "Nothing was loaded. Either the download is incomplete or config.json belongs to another model."
            )


def at_layer(template: str, layer: int | None) -> str:
    """Returns ``template`` with ``{l}`` filled in."""
    return template if layer is None else template.replace("{l}", str(layer))


def is_bias(path: str) -> bool:
    """Whether a parameter is the bias of a matrix: ``b_Q``, ``b_U``, …"""
    return path.rpartition(".")[2].startswith("b_")


def may_be_absent(path: str) -> bool:
    """Whether a parameter is zero where an architecture lacks it: a bias, also that of a layer norm (``b``)."""
    return is_bias(path) or path.endswith(".b")


def keys_of(key: str, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Returns the names that ``key`` stands for: itself, or one for each expert or head."""
    each = _each(key)
    return (key,) if each is None else tuple(key.replace(each, str(index)) for index in range(sizes[_EACH[each]]))


def _each(key: str) -> str | None:
    return next((each for each in _EACH if each in key), None)


def _as_stored(
    entries: Sequence[Entry], sizes: Mapping[str, int], prefix: str, tensors: Mapping[str, TensorInfo]
) -> list[Entry]:
    """Entries under their stored names (their own, where nothing is stored), of two ways to store one the one found."""
    tied = _tied(entries)
    keys = {entry.key for entry in entries if not entry.row.other}
    found: dict[int, str] = {}
    for entry in entries:
        name = _stored_name(entry, tied.get(entry.key), sizes, prefix, tensors)
        by_shape = entry.row.other and entry.key in keys
        if name is not None and not (by_shape and tensors[name].shape != entry.shape(sizes)):
            found[id(entry)] = name
    filled = {path for entry in entries if entry.row.other and id(entry) in found for path in entry.targets}
    return [
        dataclasses.replace(entry, key=found.get(id(entry), entry.key))
        for entry in entries
        if (id(entry) in found if entry.row.other else not filled.issuperset(entry.targets))
    ]


def _names(entry: Entry, prefix: str) -> list[str]:
    """The names that an entry's tensor may be stored under, its own first."""
    names = [name for name in (entry.key, entry.row.aka) if name]
    return [*names, *(name.removeprefix(prefix) for name in names)]


def _tied(entries: Sequence[Entry]) -> dict[str, str]:
    """What is tied to a tensor, by its name."""
    return {entry.row.tied_to: entry.row.key for entry in entries if entry.row.tied_to}


def _stored_name(
    entry: Entry, tied: str | None, sizes: Mapping[str, int], prefix: str, tensors: Mapping[str, TensorInfo]
) -> str | None:
    """The first of an entry's names that is stored: its own, then that of the tensor it is tied to, or is ``tied``."""
    for name in (entry.key, entry.row.aka, entry.row.tied_to, tied):
        for candidate in (name, name.removeprefix(prefix)) if name else ():
            if any(key in tensors for key in keys_of(candidate, sizes)):
                return candidate
    return None


def _pattern(patterns: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(f"(?:{pattern})" for pattern in patterns) or r"(?!)")


def _report(origin: str, config_name: str, problems: Mapping[str, list[str]]) -> None:
    lines, incomplete = [], "the download" if config_name == "config.json" else "it"
    for kind, names in problems.items():
        if names:
            rest = [f"… and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
            lines.append(f"  {len(names)} {kind}: " + "; ".join(names[:SHOWN] + rest))
    if lines:
        raise CheckpointError(
            f"{origin} does not hold the tensors its {config_name} describes:\n" + "\n".join(lines) + "\n"
            f"Nothing was loaded. Either {incomplete} is incomplete or {config_name} belongs to another model."
        )


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
    """Our axes, each that is stored in runs as two: the runs, and what is left (``n_heads/n_kv``)."""
    cut = {axis.partition("/")[0]: axis for axis in stored if "/" in axis}
    pairs = ([cut[axis].partition("/")[2], cut[axis]] if axis in cut else [axis] for axis in ours)
    return [axis for pair in pairs for axis in pair]


def _cut(part: np.ndarray, axes: list[str], ours: Sequence[str], sizes: Mapping[str, int]) -> np.ndarray:
    """``part`` with ``axes`` instead of ``ours``."""
    lengths: list[int] = []
    for axis, length in zip(ours, part.shape, strict=True):
        runs = 1 if axis in axes else _size(axes[len(lengths)], sizes)
        lengths += [length] if axis in axes else [runs, length // runs]
    return part.reshape(lengths)


def _merge(part: np.ndarray, axes: list[str], ours: Sequence[str]) -> np.ndarray:
    """The inverse of :func:`_cut`; copies only where an axis was cut."""
    lengths = iter(part.shape)
    return part.reshape([next(lengths) * (1 if axis in axes else next(lengths)) for axis in ours])
