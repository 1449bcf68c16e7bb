"""Matching a family's table with the tensors that a checkpoint stores."""

import dataclasses
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from tljax.checkpoints.layout import parameter_axes
from tljax.checkpoints.rows import EACH, Entry, Row, TensorInfo, bind, keys_of, may_be_absent
from tljax.config import HookedTransformerConfig
from tljax.errors import CheckpointError, UnsupportedModelError
from tljax.hooks.points import stage_of
from tljax.modules.parameters import axis_sizes

FLOATS = ("F64", "F32", "F16", "BF16")
SHOWN = 12


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
    """Matches the table with the stored tensors, in both directions, before any is read.

    Args:
        rows: the family's table.
        cfg: the config the checkpoint claims.
        tensors: name → dtype and shape of every stored tensor.
        prefix: start of the table's names that stored names may lack.
        ignored: patterns of stored names that are not parameters.
        computed: paths of parameters that are not stored.
        origin: the checkpoint's name in errors.
        config_name: the config's name in errors.

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
        stages.setdefault(stage_of(entry.targets[0])[0], []).append(entry)
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
class StoredTensor:
    """The stored name and layout of one tensor of the table.

    Attributes:
        key: its name in the checkpoint, or its name in the table if it is tied and not stored itself.
        tied_to: the stored name of the tensor it is tied to, which is read if it is not stored itself.
        input_first: whether it is a matrix (or one per expert) stored with the contracted axis first, as ``Conv1D``
            and embeddings are.
        of_vocabulary: whether its first axis is the vocabulary.
    """

    key: str
    tied_to: str | None
    input_first: bool
    of_vocabulary: bool


def stored_tensors(
    rows: Sequence[Row], cfg: HookedTransformerConfig, tensors: Mapping[str, TensorInfo], prefix: str = ""
) -> dict[str, StoredTensor]:
    """Returns where each tensor of the table is stored, under each name it may have; arguments as in :func:`match`."""
    sizes, axes = axis_sizes(cfg), parameter_axes(cfg)
    entries = bind(rows, cfg.n_layers)
    tied = _tied(entries)
    found: dict[str, StoredTensor] = {}
    for entry in entries:
        stored = _stored_name(entry, tied.get(entry.key), sizes, prefix, tensors)
        if stored is None:
            continue
        names = _names(entry, prefix)
        own = entry.key if stored not in names else stored
        others = (entry.row.tied_to or "", (entry.row.tied_to or "").removeprefix(prefix))
        tied_to = stored if own != stored else next((name for name in others if name in tensors), None)
        first = entry.input_first(axes[entry.targets[0]])
        of_vocabulary = entry.row.axes.split()[0] in ("d_vocab", "d_vocab_out")
        for name in names:
            for known, key in zip(keys_of(name, sizes), keys_of(own, sizes), strict=True):
                found.setdefault(known, StoredTensor(key, tied_to, first, of_vocabulary))
    return found


def stored_apart(stages: Mapping[str, Sequence[Entry]]) -> list[tuple[Entry, Entry]]:
    """Returns pairs of tied entries that are stored as two tensors; the one that may be absent comes first."""
    entries = [entry for stage in stages.values() for entry in stage]
    by_row = {entry.row.key: entry for entry in entries}
    pairs = [(entry, by_row[entry.row.tied_to]) for entry in entries if entry.row.tied_to in by_row]
    return [(one, other) for one, other in pairs if one.key != other.key]


def is_stored_name(
    rows: Iterable[Row], cfg: HookedTransformerConfig, prefix: str = "", ignored: Sequence[str] = ()
) -> Callable[[str], bool]:
    """Returns a predicate: whether a tensor of ``rows`` may be stored under a name, or ``ignored`` matches it."""
    sizes, skip = axis_sizes(cfg), _pattern(ignored)
    names = {
        key for entry in bind(rows, cfg.n_layers) for name in _names(entry, prefix) for key in keys_of(name, sizes)
    }
    return lambda name: name in names or skip.fullmatch(name) is not None


def check_counts(
    rows: Sequence[Row], cfg: HookedTransformerConfig, tensors: Mapping[str, TensorInfo], origin: str
) -> None:
    """Raises CheckpointError, before listing names, if ``cfg`` has more layers, experts or heads than tensors exist."""
    sizes, counts = axis_sizes(cfg), {"layers": cfg.n_layers}
    ends = tuple(row.key.rpartition("{l}")[2] for row in rows if row.other)  # of experts stored in one tensor
    together = any(key.endswith(ends) for key in tensors)
    for each, axis in EACH.items():
        if any(each in row.key for row in rows) and not (axis == "n_experts" and together):
            counts[axis.removeprefix("n_")] = sizes[axis]
    for name, count in counts.items():
        if count > len(tensors):
            raise CheckpointError(
                f"{origin} stores {len(tensors)} tensors, fewer than the {count} {name} that its config.json claims. "
                "Nothing was loaded. Either the download is incomplete or config.json belongs to another model."
            )


def _as_stored(
    entries: Sequence[Entry], sizes: Mapping[str, int], prefix: str, tensors: Mapping[str, TensorInfo]
) -> list[Entry]:
    """Returns entries with their stored names, or their own if not stored; of alternative entries, those found."""
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
    """Returns the names that an entry's tensor may be stored under, its own first."""
    names = [name for name in (entry.key, entry.row.aka) if name]
    return [*names, *(name.removeprefix(prefix) for name in names)]


def _tied(entries: Sequence[Entry]) -> dict[str, str]:
    """Maps the name of a tensor to the name of the one tied to it."""
    return {entry.row.tied_to: entry.row.key for entry in entries if entry.row.tied_to}


def _stored_name(
    entry: Entry, tied: str | None, sizes: Mapping[str, int], prefix: str, tensors: Mapping[str, TensorInfo]
) -> str | None:
    """Returns the first stored name of: the entry's own, its other name, the tensor it is tied to, and ``tied``."""
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
