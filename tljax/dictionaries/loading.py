"""Finding a dictionary by name, in a directory, in a release or on the hub, and reading it in whatever format."""

import dataclasses
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from tljax.checkpoints.files import hub
from tljax.dictionaries.formats.dtypes import dtype_named, in_dtype
from tljax.dictionaries.formats.read import Format, Read
from tljax.dictionaries.formats.releases import RELEASES, find_release
from tljax.dictionaries.formats.table import FORMATS, detected, format_named, format_of, wrong_kind
from tljax.dictionaries.maths.config import DictionaryConfig
from tljax.errors import CheckpointError, DictionaryError, nearest


class UnscaledDictionaryWarning(UserWarning):
    """A dictionary was trained on activations times a number that its files do not hold."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a dictionary is, and what is known of it beside its files.

    Attributes:
        path: the directory or file.
        format: its format, if that is known.
        facts: for :attr:`tljax.dictionaries.formats.read.Format.reads`.
        l0: number of active features for each token, as its release states it.
        repo: the hub repository that it came from; ``None`` if it is local.
    """

    path: Path
    format: Format | None
    facts: Mapping[str, Any]
    l0: float | None = None
    repo: str | None = None


def find(
    name: str | os.PathLike[str],
    sae_id: str | None = None,
    *,
    format: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> Source:
    """Finds a dictionary, downloading its files if they are on the hub and not in the local cache.

    Args:
        name: a directory or file, which never touches the network; the bundled ``"tljax-tiny-res"``; a release of
            SAELens's; or a hub id.
        sae_id: which dictionary of a release, or the folder or file within a directory or repository.
        format: the format, where the files do not tell.
        revision, token, cache_dir: as in :meth:`tljax.HookedTransformer.from_pretrained`.

    Raises:
        DictionaryError: there is no such directory, release or dictionary.
        CheckpointError: the download fails.
    """
    row = None if format is None else format_named(format)
    if local := _local(name, sae_id):
        if revision is not None:
            raise DictionaryError(f"{os.fspath(name)} is a directory, which has one revision; got {revision!r}.")
        return Source(local, row, {})
    if bundled := _bundled(os.fspath(name), sae_id):
        return Source(bundled, row, {})
    text = os.fspath(name)
    options: dict[str, Any] = {"revision": revision, "token": token, "cache_dir": cache_dir}
    if text in RELEASES:
        release = find_release(text, sae_id)
        row = row or (None if release.format is None else format_named(release.format))
        return Source(
            _downloaded(release.repo, release.path, row, options), row, release.facts, release.l0, release.repo
        )
    if text.count("/") == 1 and all(text.split("/")):
        try:
            return Source(_downloaded(text, sae_id, row, options), row, {"repo": text}, repo=text)
        except CheckpointError as error:
            raise CheckpointError(f"{error} There is no directory {text} here either.") from error
    raise DictionaryError(
        f"{text!r} is neither a directory, nor a release, nor a hub id of the form 'owner/name'."
        f"{nearest(text, RELEASES)} Releases: tljax.dictionaries.releases()."
    )


def _local(name: str | os.PathLike[str], sae_id: str | None) -> Path | None:
    """Returns the local path that a name means, or ``None`` if it means none."""
    text, path = os.fspath(name), Path(name).expanduser()
    named = path if sae_id is None else path / sae_id
    bare = os.sep not in text and "/" not in text
    if path.exists() and not (bare and text in RELEASES and not detected(named)):
        if named.exists():
            return named
        inside = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
        raise DictionaryError(
            f"{path} has no {sae_id}; it holds {', '.join(inside[:12]) or 'nothing'}.{nearest(str(sae_id), inside)}"
        )
    looks_local = isinstance(name, os.PathLike) or path.is_absolute() or text.startswith((".", "~"))
    if looks_local or text.endswith(("/", os.sep)) or text.count("/") > 1 or "\\" in text:
        parent = next((one for one in path.parents if one.is_dir()), Path())
        inside = [entry.name for entry in parent.iterdir()]
        wanted = path.relative_to(parent).parts[0] if path.is_relative_to(parent) else path.name
        raise DictionaryError(
            f"There is no directory {text} ({parent.resolve()} exists).{nearest(wanted, inside)} Nothing was looked up "
            "on the hub: a hub id has the form 'owner/name', and the folder in it is sae_id."
        )
    return None


def _bundled(name: str, sae_id: str | None) -> Path | None:
    """Returns the directory of a dictionary inside the package, or ``None`` if the name means none.

    Raises:
        DictionaryError: there is none of this ``sae_id``.
    """
    directory = hub.MODELS / name.lower()
    if os.sep in name or "/" in name or not directory.is_dir() or (directory / hub.CONFIG).is_file():
        return None
    inside = sorted(entry.name for entry in directory.iterdir() if entry.is_dir())
    if sae_id is None and len(inside) == 1:
        return directory / inside[0]
    if sae_id not in inside:
        raise DictionaryError(
            f"{name} has no dictionary {sae_id!r}; it has {', '.join(inside)}.{nearest(str(sae_id), inside)}"
        )
    return directory / sae_id


def _downloaded(repo: str, path: str | None, row: Format | None, options: Mapping[str, Any]) -> Path:
    """Returns the local copy of a path in a repository."""
    start = "" if path is None else f"{path}/"

    def patterns(files: Sequence[str]) -> Sequence[str]:
        rows = FORMATS if row is None else (row,)
        told = [one for one in rows if one.named and {f"{start}{name}" for name in one.named} <= {*files}]
        return tuple(dict.fromkeys(pattern for one in told[:1] or rows for pattern in one.files(path)))

    directory = hub.download(repo, patterns, what=path, **options)
    return directory if path is None else directory / path


def read(source: Source, *, holds: str = "dictionary", dtype: Any = None, **facts: Any) -> Read:
    """Reads a dictionary's files.

    Args:
        source: where they are.
        holds: what they must make: see :attr:`tljax.dictionaries.formats.read.Format.holds`.
        dtype: of the parameters; by default the one that the files name or hold.
        **facts: as in :attr:`tljax.dictionaries.formats.read.Format.reads`; they go before those of the source.

    Raises:
        DictionaryError: the format is unknown, or the files make something else.
    """
    if not source.path.exists():
        raise DictionaryError(f"There is no directory {source.path}.")
    row = source.format or format_of(source.path, holds)
    if row.holds != holds:
        raise wrong_kind(source.path, row, holds)
    found = row.reads(source.path, **{**source.facts, **facts})
    if source.l0 is not None and isinstance(found.cfg, DictionaryConfig):
        stated = (*found.cfg.metadata, ("l0", json.dumps(source.l0)))
        found = dataclasses.replace(found, cfg=found.cfg.replace(metadata=stated))
    if dtype is None:
        return found
    target = dtype_named(jnp.dtype(dtype).name, "dtype=")
    cast = jax.tree_util.tree_map_with_path(
        lambda keys, array: in_dtype(array, target, keys[-1].key, str(source.path)), found.params
    )
    return dataclasses.replace(found, params=cast)


def warn_unscaled(name: str) -> None:
    """Warns of a dictionary whose activations' scale is unknown."""
    warnings.warn(
        f"The dictionary of {name} was trained on activations times a number that neither its files nor its release "
        "hold: its features are those of unscaled activations, as in SAELens. Pass norm_scaling_factor= if you know it "
        "(sqrt(d_in) over the mean norm of the activations).",
        UnscaledDictionaryWarning,
        stacklevel=4,
    )
