"""The table machinery: a family is a list of rows, and a row says which tensor becomes which parameters.

A row names the axes of the *checkpoint's* tensor; the axes of ours are known from the config. The
rearrangement between them, its inverse (for export), the split of a fused tensor and the shape follow::

    Row("transformer.h.{l}.attn.c_attn.weight", "d_model (3 n_heads d_head)", "blocks.{l}.attn.W_Q|W_K|W_V")

Parentheses group axes that are stored as one; a number is the axis along which parameters of equal shape are
fused, and a sum such as ``n_heads+n_kv+n_kv`` joins the axis of one parameter to those of the next. Two rows may
name one tensor: a norm that two of our modules share.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from tljax.checkpoints.hf_config import HFConfig
from tljax.checkpoints.layout import axis_sizes, parameter_axes, stage_of
from tljax.config import HookedTransformerConfig
from tljax.errors import CheckpointError, UnsupportedModelError

FLOATS = ("F64", "F32", "F16", "BF16")
SHOWN = 12


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """What a checkpoint's header says about one tensor, without reading it."""

    dtype: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor of a checkpoint (one a layer when the key holds ``{l}``) and the parameters it fills.

    Attributes:
        key: the tensor's name; ``{l}`` stands for the layer.
        axes: its axes, outermost first, in the vocabulary of ``layout.axis_sizes``.
        paths: our dotted path; ``a.W_Q|W_K|W_V`` names the parts of a fused tensor in stored order.
        aka: another name older checkpoints use for the same tensor.
        tied_to: the tensor to read instead when this one is not stored.
        skip: leading rows of the tensor that the model never uses.
    """

    key: str
    axes: str
    paths: str
    aka: str | None = None
    tied_to: str | None = None
    skip: int = 0

    def targets(self, layer: int | None) -> tuple[str, ...]:
        """Returns the full paths this row fills in ``layer``."""
        parent, _, names = self.paths.rpartition(".")
        return tuple(at_layer(f"{parent}.{name}", layer) for name in names.split("|"))

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Returns the shape the checkpoint's tensor must have."""
        first, *rest = (math.prod(_size(axis, sizes) for axis in group) for group in _parse(self.axes))
        return (first + self.skip, *rest)

    def read(self, array: np.ndarray, ours: Sequence[str], sizes: Mapping[str, int]) -> tuple[np.ndarray, ...]:
        """Returns views of a checkpoint tensor in our layout, one for each target.

        Args:
            array: the checkpoint's tensor.
            ours: axes of the first target.
            sizes: axis lengths.
        """
        stored = self._stored()
        whole = array[self.skip :].reshape([_size(axis, sizes) for axis in stored])
        joined = self._joined()
        if joined is None:
            order = self._order(stored, ours)
            parts = whole.transpose(order)
            return tuple(parts) if len(order) > len(ours) else (parts,)
        ends = np.cumsum([sizes[name] for name in joined])[:-1]
        pieces = np.split(whole, ends, axis=stored.index("+".join(joined)))
        order = self._order(self._stored(joined[0]), ours)
        return tuple(piece.transpose(order) for piece in pieces)

    def write(self, parts: Sequence[np.ndarray], ours: Sequence[str], sizes: Mapping[str, int]) -> np.ndarray:
        """Returns the checkpoint tensor that :meth:`read` would split into ``parts``; rows it skips are zeros."""
        joined = self._joined()
        if joined is None:
            order = self._order(self._stored(), ours)
            whole = np.stack(parts) if len(order) > len(ours) else parts[0]
            whole = whole.transpose(np.argsort(order))
        else:
            back = np.argsort(self._order(self._stored(joined[0]), ours))
            axis = self._stored().index("+".join(joined))
            whole = np.concatenate([part.transpose(back) for part in parts], axis=axis)
        shape = self.shape(sizes)
        whole = whole.reshape(shape[0] - self.skip, *shape[1:])
        return np.ascontiguousarray(np.pad(whole, [(self.skip, 0)] + [(0, 0)] * (whole.ndim - 1)))

    def _joined(self) -> list[str] | None:
        """The axes of the parts, where they are joined along one."""
        return next((axis.split("+") for axis in self._stored() if "+" in axis), None)

    def _stored(self, part: str | None = None) -> list[str]:
        """The tensor's axes; of one part, where parts are joined and ``part`` names its own axis."""
        axes = [axis for group in _parse(self.axes) for axis in group]
        return [part if part and "+" in axis else axis for axis in axes]

    def _order(self, stored: list[str], ours: Sequence[str]) -> list[int]:
        wanted = [axis for axis in stored if axis.isdigit()] + list(ours)
        if sorted(stored) != sorted(wanted):
            raise ValueError(f"Row {self.key!r} stores {self.axes!r}, but {self.paths!r} has axes {list(ours)}.")
        return [stored.index(axis) for axis in wanted]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """Everything tljax knows about one architecture, in both directions.

    Attributes:
        architecture: class name in config.json's ``architectures``.
        model_type: ``model_type`` in config.json.
        read_config: HF config → ours; it must read every attribute that changes the function.
        write_config: our config, and which biases are not all zero (such as ``"attn.b_Q"``) → HF config.
        rows: HF config → the table.
        prefix: may be missing from a checkpoint's keys (checkpoints of the bare model without its head).
        ignored: patterns of stored buffers that are not parameters.
    """

    architecture: str
    model_type: str
    read_config: Callable[[HFConfig], HookedTransformerConfig]
    write_config: Callable[[HookedTransformerConfig, frozenset[str]], dict[str, Any]]
    rows: Callable[[HFConfig], Sequence[Row]]
    prefix: str = ""
    ignored: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Entry:
    """A row bound to one layer and to the tensor found for it."""

    row: Row
    key: str
    targets: tuple[str, ...]


def bind(rows: Iterable[Row], n_layers: int) -> list[Entry]:
    """Returns one entry for each tensor that ``rows`` expect of a model with ``n_layers`` layers."""
    entries = []
    for row in rows:
        for layer in range(n_layers) if "{l}" in row.key else (None,):
            entries.append(Entry(row, at_layer(row.key, layer), row.targets(layer)))
    return entries


def match(
    rows: Sequence[Row],
    cfg: HookedTransformerConfig,
    tensors: Mapping[str, TensorInfo],
    *,
    prefix: str = "",
    ignored: Sequence[str] = (),
    origin: str = "The checkpoint",
) -> dict[str, list[Entry]]:
    """Pairs the table with what is stored, both ways, before anything is read.

    Args:
        rows: the family's table.
        cfg: the config the checkpoint claims.
        tensors: name → dtype and shape of every stored tensor.
        prefix: may be missing from stored names.
        ignored: patterns of stored names that are not parameters.
        origin: named in the error.

    Returns:
        Stage (``"head"``, ``"embed"``, ``"blocks.0"``, …) → entries whose ``key`` is the stored name.

    Raises:
        CheckpointError: tensors are missing, unexpected or of the wrong shape; lists all of them.
        UnsupportedModelError: a needed tensor is stored in a quantized or integer format.
    """
    sizes, axes = axis_sizes(cfg), parameter_axes(cfg)
    stages: dict[str, list[Entry]] = {}
    missing, misshapen, used = [], [], set()
    for entry in bind(rows, cfg.n_layers):
        expected = entry.row.shape(sizes)
        key = _stored_name(entry, prefix, tensors)
        if key is None:
            missing.append(f"{entry.key} {list(expected)}")
            continue
        used.add(key)
        if tensors[key].dtype not in FLOATS:
            raise UnsupportedModelError(
                f"{origin} stores {key} as {tensors[key].dtype}. tljax reads {', '.join(FLOATS)}: dequantize "
                "the checkpoint first, or load its full-precision original."
            )
        if tensors[key].shape != expected:
            misshapen.append(f"{key} is {list(tensors[key].shape)}, config.json says {list(expected)}")
        stages.setdefault(stage_of(entry.targets[0]), []).append(dataclasses.replace(entry, key=key))
    skip = re.compile("|".join(f"(?:{pattern})" for pattern in ignored) or r"(?!)")
    extra = [f"{key} {list(tensors[key].shape)}" for key in tensors if key not in used and not skip.fullmatch(key)]
    _report(origin, {"missing": missing, "unexpected": extra, "of another shape": misshapen})
    unfilled = set(axes) - {path for entries in stages.values() for entry in entries for path in entry.targets}
    if weights := sorted(path for path in unfilled if not is_bias(path)):
        raise ValueError(f"The table fills no {weights}: every weight needs a row.")
    return stages


def at_layer(template: str, layer: int | None) -> str:
    """Returns ``template`` with ``{l}`` filled in."""
    return template if layer is None else template.replace("{l}", str(layer))


def is_bias(path: str) -> bool:
    """Whether a parameter is zero where an architecture lacks it: ``b_Q``, ``b_U``, … but no norm's ``b``."""
    return path.rpartition(".")[2].startswith("b_")


def _stored_name(entry: Entry, prefix: str, tensors: Mapping[str, TensorInfo]) -> str | None:
    for name in (entry.key, entry.row.aka, entry.row.tied_to):
        for candidate in (name, name.removeprefix(prefix)) if name else ():
            if candidate in tensors:
                return candidate
    return None


def _report(origin: str, problems: Mapping[str, list[str]]) -> None:
    lines = []
    for kind, names in problems.items():
        if names:
            rest = [f"… and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
            lines.append(f"  {len(names)} {kind}: " + "; ".join(names[:SHOWN] + rest))
    if lines:
        raise CheckpointError(
            f"{origin} does not hold the tensors its config.json describes:\n" + "\n".join(lines) + "\n"
            "Nothing was loaded. Either the download is incomplete or config.json belongs to another model."
        )


@functools.cache
def _parse(axes: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(token.strip("()").split()) for token in re.findall(r"\([^)]*\)|\S+", axes))


def _size(axis: str, sizes: Mapping[str, int]) -> int:
    return int(axis) if axis.isdigit() else sum(sizes[name] for name in axis.split("+"))
