"""What every reader of dictionary files returns, and what a format of such files is."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tljax.dictionaries.maths.config import CrosscoderConfig, CrossLayerConfig, DictionaryConfig


@dataclasses.dataclass(frozen=True)
class Read:
    """A dictionary's files, read.

    Attributes:
        params: arrays by the names and in the orientation of :class:`~tljax.dictionaries.Dictionary` or
            :class:`~tljax.dictionaries.Crosscoder`; for a cross-layer transcoder one such mapping for each layer.
        cfg: what they compute, and where they belong.
        sparsity: ``[d_sae]``, log10 of how often each feature fires; ``None`` if the files do not say.
    """

    params: dict[str, np.ndarray] | tuple[dict[str, np.ndarray], ...]
    cfg: DictionaryConfig | CrosscoderConfig | CrossLayerConfig
    sparsity: Any = None


def all_in_folder(sae_id: str | None) -> tuple[str, ...]:
    """Returns glob patterns of the files right in the folder ``sae_id`` of a repository (``None``: its top folder)."""
    return (f"{sae_id}/*",) if sae_id else ("*",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """A way in which dictionaries are published: a row of :mod:`tljax.dictionaries.formats.table`.

    Attributes:
        name: what ``format=`` calls it.
        looks_for: what :attr:`detects` looks for, in words; errors list it.
        detects: whether a path holds a dictionary in this format. The path is a directory, or a file where the user or
            a release names one. Must not load arrays nor fail: names of files, JSON, and headers of safetensors only.
        reads: reads such a path: ``reads(path, **facts)``. Facts are what a release or the caller knows beside the
            files, all optional: ``model_name``, ``reads`` and ``writes`` (full names of hook points), ``layer``,
            ``processing``, ``norm_scaling_factor``, ``config_overrides`` (keys of the files' own config). A reader
            takes those it has a use for and ignores the rest (``**_``).
        files: glob patterns, relative to a repository, of the files that a dictionary needs, given the path within the
            repository (``None``: its top folder).
        holds: what the files make.
        named: names of files that mean this format wherever all of them are: from a repository that nobody has said
            the format of, only the files of such a format are fetched.
    """

    name: str
    looks_for: str
    detects: Callable[[Path], bool]
    reads: Callable[..., Read]
    files: Callable[[str | None], tuple[str, ...]] = all_in_folder
    holds: Literal["dictionary", "crosscoder", "cross-layer transcoder"] = "dictionary"
    named: tuple[str, ...] = ()
