"""Translating the names that tensors are stored under to the names in a family's table.

A wrapper used in training (``torch.compile``, data parallelism, a trainer's own module) leaves a prefix on all tensor
names; in a multimodal checkpoint the text model's names have a start of their own.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import numpy as np

from tljax.checkpoints.files.reader import Tensors
from tljax.checkpoints.formats.quantized.codes import Codes, codes_of, has_codes
from tljax.checkpoints.slices import Index, PartTensors, reads_parts
from tljax.errors import CheckpointError

WRAPPERS = ("_orig_mod.", "module.")
"""Prefixes that ``torch.compile`` and ``DataParallel`` put before all names of a model."""
_DEEPEST = 3


class Renamed:
    """The tensors of a checkpoint under other names."""

    def __init__(self, stored: Tensors, names: Mapping[str, str]) -> None:
        self._stored, self._names = stored, names
        self.info = {ours: stored.info[theirs] for ours, theirs in names.items()}

    def read(self, key: str) -> np.ndarray:
        """Returns tensor ``key`` in its stored dtype."""
        return self._stored.read(self._names[key])

    def reads_parts(self, key: str) -> bool:
        """Whether a part of tensor ``key`` can be read alone."""
        return reads_parts(self._stored, [self._names[key]])

    def read_part(self, key: str, index: Index) -> np.ndarray:
        """Returns ``tensor[index]`` in its stored dtype."""
        return cast(PartTensors, self._stored).read_part(self._names[key], index)

    def has_codes(self, key: str) -> bool:
        """Whether tensor ``key`` can be read as codes."""
        return has_codes(self._stored, [self._names[key]])

    def codes(self, key: str) -> Codes:
        """Returns a quantised weight as its codes."""
        return codes_of(self._stored, self._names[key])


def known_names(
    tensors: Tensors,
    is_known: Callable[[str], bool],
    renamed: Sequence[tuple[str, str]] = (),
    origin: str = "The checkpoint",
) -> Tensors:
    """Returns ``tensors`` under the names of the table; those that it does not know keep their stored names.

    Args:
        tensors: the stored tensors.
        is_known: whether a name is in the table.
        renamed: pairs of a pattern for the start of a stored name, and its replacement; the first match counts.
        origin: the checkpoint's name in errors.

    Raises:
        CheckpointError: only some names have a wrapper's prefix, or two tensors would have one name.
    """
    wrapper = _wrapper(list(tensors.info), lambda name: is_known(rename(name, renamed)))
    names: dict[str, str] = {}
    for stored in tensors.info:
        ours = rename(stored.removeprefix(wrapper), renamed)
        ours = ours if is_known(ours) else stored
        if ours in names:
            raise CheckpointError(
                f"{origin} stores {ours} twice, as {names[ours]} and as {stored}: it is not clear which one counts. "
                "Remove one of them."
            )
        names[ours] = stored
    _refuse_partly_wrapped([name.removeprefix(wrapper) for name in tensors.info], origin)
    return tensors if all(ours == stored for ours, stored in names.items()) else Renamed(tensors, names)


def _wrapper(stored: Sequence[str], is_known: Callable[[str], bool]) -> str:
    """Returns the prefix that all names share and without which some are known; empty if some are known as is."""
    parts = stored[0].split(".") if stored else []
    for depth in range(min(_DEEPEST + 1, len(parts))):
        prefix = "".join(f"{part}." for part in parts[:depth])
        if not all(name.startswith(prefix) for name in stored):
            break
        if any(is_known(name.removeprefix(prefix)) for name in stored):
            return prefix
    return ""


def rename(name: str, renamed: Sequence[tuple[str, str]]) -> str:
    """Returns ``name`` with its start replaced by the first pattern of ``renamed`` that matches."""
    for pattern, ours in renamed:
        if found := re.match(pattern, name):
            return ours + name[found.end() :]
    return name


def _refuse_partly_wrapped(names: Sequence[str], origin: str) -> None:
    wrapped = [name for name in names if name.startswith(WRAPPERS)]
    if not wrapped:
        return
    bare = next((name for name in names if not name.startswith(WRAPPERS)), None)
    others = f"but {len(names) - len(wrapped)} have none ({bare})" if bare else "and not all have the same"
    raise CheckpointError(
        f"{origin} is wrapped in part: the names of {len(wrapped)} of {len(names)} tensors begin with a prefix of "
        f"torch.compile or DataParallel ({wrapped[0]}), {others}. Save the state of the module inside "
        "(model.module, model._orig_mod), or give all names one prefix."
    )
