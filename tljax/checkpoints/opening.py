"""A checkpoint that was found, before anything of it is understood: on disk, or a model in memory."""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tljax.checkpoints.files import hub
from tljax.checkpoints.files.reader import CONFIG, Tensors, open_tensors, read_json
from tljax.checkpoints.files.sources import Sources
from tljax.checkpoints.formats.adapter_config import AdapterConfig
from tljax.checkpoints.formats.memory import read_hf_model
from tljax.checkpoints.formats.mxfp4 import unpacked
from tljax.checkpoints.stop_tokens import declared_tokens, read_stop_tokens
from tljax.errors import InputError
from tljax.text.tokenizer_files import has_tokenizer_files


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint that was found: where it is, and what it says of itself.

    Attributes:
        named: the short name for the config, given the one that the config has.
        origin: what errors call it; a directory, if it is one.
        attributes: its config.json.
        config_name: what errors call that.
        tensors: opens its tensors; another call returns the same.
        stop_tokens: which tokens end a text, as fields of our config.
        tokenizer: a directory with its tokenizer's files, or ``None``.
        repo: its hub id, when it came from the hub.
        tokenizer_repo: that of the tokenizer, likewise.
        adapter: directory of the adapter to merge into it.
        adapter_config: the config of that.
    """

    named: Callable[[str], str]
    origin: str
    attributes: Mapping[str, Any]
    config_name: str
    tensors: Callable[[], Tensors]
    stop_tokens: Callable[[], dict[str, Any]] = dict
    tokenizer: Path | None = None
    repo: str | None = None
    tokenizer_repo: str | None = None
    adapter: Path | None = None
    adapter_config: AdapterConfig | None = None


def name_unless_given(own: str) -> Callable[[str], str]:
    """Returns what names a config ``own`` that has no name."""
    return lambda name: own if name == "custom" else name


def in_files(sources: Sources) -> Checkpoint:
    """Returns a checkpoint on disk, with the adapter that goes on it."""
    base = sources.base
    attributes, named = read_json(base.directory / CONFIG), name_unless_given(base.model_name)
    tokenizer = sources.tokenizer()
    return Checkpoint(
        named=lambda name: sources.named(named(name)),
        origin=str(base.directory),
        attributes=attributes,
        config_name=CONFIG,
        tensors=functools.cache(lambda: unpacked(open_tensors(base.directory, base.weights))),
        stop_tokens=lambda: read_stop_tokens(base.directory, attributes),
        tokenizer=None if tokenizer is None else tokenizer.directory,
        repo=base.repo,
        tokenizer_repo=None if tokenizer is None else tokenizer.repo,
        adapter=None if sources.adapter is None else sources.adapter.directory,
        adapter_config=sources.settings,
    )


def in_memory(name: str | os.PathLike[str], hf_model: Any, refused: Mapping[str, Any]) -> Checkpoint:
    """Returns a transformers model that is in memory; its tokenizer is that of ``name`` where this is a directory.

    Args:
        name: what to call it.
        hf_model: the model.
        refused: options that say which files to read, by name; all must be ``None``.

    Raises:
        InputError: one of them is not, or ``hf_model`` is no transformers model.
    """
    for option, value in refused.items():
        if value is not None:
            raise InputError(f"{option}={value!r} chooses files, and hf_model= reads none. Drop one of the two.")
    attributes, tensors, generation = read_hf_model(hf_model)
    path = Path(name).expanduser()
    path = path.resolve() if path.is_dir() else path
    return Checkpoint(
        named=name_unless_given(path.name),
        origin="hf_model",
        attributes=attributes,
        config_name="config",
        tensors=lambda: unpacked(tensors),
        stop_tokens=lambda: declared_tokens(attributes if generation is None else generation, "hf_model"),
        tokenizer=path if has_tokenizer_files(path) else None,
    )


def of_state_dict(tensors: Tensors, name: str, origin: str, tokenizer: str | None) -> Checkpoint:
    """Returns a state dict without a config.json; its tokenizer is in ``tokenizer``, where that is a directory."""
    directory = Path(tokenizer).expanduser() if tokenizer else None
    return Checkpoint(
        named=name_unless_given(name),
        origin=origin,
        attributes={},
        config_name="cfg",
        tensors=lambda: tensors,
        tokenizer=directory if directory is not None and directory.is_dir() else None,
    )


def locate_tokenizer(checkpoint: Checkpoint, repo: str | None, **access: Any) -> Callable[[], Path] | None:
    """Returns what fetches a tokenizer that is in repository ``repo``, where the checkpoint itself is of the hub."""
    if checkpoint.repo is None or repo is None or checkpoint.tokenizer is not None:
        return None
    return functools.partial(hub.tokenizer_directory, repo, **access)
