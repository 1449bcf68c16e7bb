"""Finding the base checkpoint and the adapter that a name stands for."""

import dataclasses
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from tljax.checkpoints.files import hub
from tljax.checkpoints.files.reader import INDEX, PICKLE, PICKLE_INDEX, SINGLE
from tljax.checkpoints.formats.adapter_config import ADAPTER_CONFIG, AdapterConfig, read_adapter_config
from tljax.errors import CheckpointError, InputError, UnsupportedModelError
from tljax.text.tokenizer_files import has_tokenizer_files


@dataclasses.dataclass(frozen=True)
class Sources:
    """The locations of a model's checkpoint and adapter.

    Attributes:
        base: the checkpoint.
        adapter: the adapter to merge into it, if any.
        settings: the adapter's config.
    """

    base: hub.Location
    adapter: hub.Location | None = None
    settings: AdapterConfig | None = None

    def named(self, base: str) -> str:
        """Returns the short name ``base``, followed by a plus sign and the adapter's name if there is an adapter."""
        if self.adapter is None:
            return base
        beside = self.adapter.directory == self.base.directory
        return f"{base}+{'adapter' if beside else self.adapter.model_name}"

    def tokenizer(self) -> hub.Location | None:
        """Returns where the tokenizer's files are: at the adapter if it has any, since it may have added tokens."""
        places = (place for place in (self.adapter, self.base) if place is not None)
        return next((place for place in places if has_tokenizer_files(place.directory)), None)


def find(
    name: str | os.PathLike[str],
    adapter: Any = None,
    *,
    adapter_revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    ignore: Collection[str] = (),
    **revision: Any,
) -> Sources:
    """Finds a checkpoint, and the adapter to merge into it, by name.

    Args:
        name: directory, bundled model, alias or hub id of a checkpoint, or of an adapter whose config names its base.
        adapter: directory or hub id of an adapter for the checkpoint ``name``; ``False``: none, even if one is beside
            the weights. By default an adapter beside the weights in a local directory is used, as transformers does.
        adapter_revision: revision of ``adapter`` on the hub.
        token, cache_dir: as for :func:`tljax.checkpoints.files.hub.locate`.
        ignore: unknown keys of the adapter's config to accept.
        **revision: other options of :func:`tljax.checkpoints.files.hub.locate`, for ``name``.

    Raises:
        CheckpointError: the checkpoint or the adapter is missing or incomplete.
        InputError: ``adapter`` is neither a name nor ``False``, or ``name`` has an adapter of its own.
        UnsupportedModelError: an adapter that tljax cannot merge, or a repository that holds weights and an adapter.
    """
    _check(adapter, adapter_revision)
    access: dict[str, Any] = {"token": token, "cache_dir": cache_dir}
    found = hub.locate(name, **access, **revision)
    beside = _holds(found.directory, ADAPTER_CONFIG)
    weights = _holds(found.directory, SINGLE, INDEX, PICKLE, PICKLE_INDEX)
    if adapter is False:
        if beside and not weights:
            raise InputError(f"{name} holds an adapter and no weights, so there is nothing to load with adapter=False.")
        return Sources(found)
    if adapter is not None:
        return Sources(found, *_given(name, adapter, adapter_revision, found if beside else None, access, ignore))
    if not beside:
        return Sources(found)
    if weights and found.repo is not None:
        raise UnsupportedModelError(
            f"{name} holds whole weights and an adapter ({ADAPTER_CONFIG}) side by side, and does not say whether the "
            f"weights have the adapter in them. adapter=False loads the weights as they are; "
            f"from_pretrained(base, adapter={os.fspath(name)!r}) loads the adapter on its base."
        )
    settings = read_adapter_config(found.directory, ignore)
    return Sources(found if weights else _base_of(settings, access), found, settings)


def _check(adapter: Any, adapter_revision: str | None) -> None:
    if adapter is True or not isinstance(adapter, str | os.PathLike | bool | None):
        raise InputError(
            f"adapter={adapter!r}: expected the directory or hub id of one adapter, or False for none. To merge "
            "several: load with one by from_pretrained_no_processing, save_hf the model, and load that with the next."
        )
    if adapter_revision is not None and not adapter:
        raise InputError(
            "adapter_revision= goes with adapter=; of an adapter that is the model's name, give revision=."
        )


def _given(
    name: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    revision: str | None,
    beside: hub.Location | None,
    access: dict[str, Any],
    ignore: Collection[str],
) -> tuple[hub.Location, AdapterConfig]:
    """Returns the adapter that the caller names, and its config."""
    place = hub.locate(adapter, revision=revision, adapter=True, **access)
    if beside is not None and beside.directory.resolve() != place.directory.resolve():
        raise InputError(
            f"{name} has an adapter of its own ({ADAPTER_CONFIG}), and adapter={os.fspath(adapter)!r} is another. "
            "Name a checkpoint without one: its base, or a directory from which the adapter's files are taken away."
        )
    if not _holds(place.directory, ADAPTER_CONFIG):
        held = sorted(entry.name for entry in place.directory.iterdir())[:8]
        raise CheckpointError(
            f"adapter={os.fspath(adapter)!r} has no {ADAPTER_CONFIG}; it holds {held or 'nothing'}. An adapter is what "
            "peft's save_pretrained writes; a whole model is the first argument."
        )
    return place, read_adapter_config(place.directory, ignore)


def _base_of(settings: AdapterConfig, access: dict[str, Any]) -> hub.Location:
    """Returns the checkpoint that an adapter's config names."""
    way_out = "Give the base yourself: from_pretrained(base, adapter=...)."
    if settings.base is None:
        raise CheckpointError(f"{settings.origin} does not say which model it belongs to. {way_out}")
    try:
        directory = Path(settings.base).expanduser().is_dir()
        base = hub.locate(settings.base, revision=None if directory else settings.revision, **access)
    except (CheckpointError, InputError) as error:
        raise CheckpointError(f"{settings.origin} names the base {settings.base!r}: {error} {way_out}") from error
    if _holds(base.directory, ADAPTER_CONFIG):
        raise UnsupportedModelError(
            f"{settings.origin} names the base {settings.base!r}, which holds an adapter itself. {way_out}"
        )
    return base


def _holds(directory: Path, *names: str) -> bool:
    return any((directory / name).is_file() for name in names)
