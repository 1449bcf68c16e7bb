"""Checkpoints on disk or in memory, opened but not yet interpreted."""

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
from tljax.checkpoints.stop_tokens import declared_tokens, read_stop_tokens
from tljax.errors import InputError
from tljax.text.tokenizer_files import has_tokenizer_files


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint that was found, with its config and tensors as they are stored.

    Attributes:
        named: returns the short name for our config, given the name that the config has.
        origin: the checkpoint's name in errors; its directory if it is on disk.
        attributes: the contents of its config.json.
        config_name: the config's name in errors.
        tensors: opens its tensors; repeated calls return the same object.
        stop_tokens: returns the tokens that end, start and pad a text, as fields of our config.
        tokenizer: a directory with its tokenizer's files, or ``None``.
        repo: its hub id, when it came from the hub.
        tokenizer_repo: the tokenizer's hub id, when that came from the hub.
        adapter: directory of the adapter to merge into it.
        adapter_config: the adapter's config.
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
    """Returns a function that replaces the default name ``"custom"`` by ``own`` and keeps any other."""
    return lambda name: own if name == "custom" else name


def in_files(sources: Sources) -> Checkpoint:
    """Returns a checkpoint on disk, with its adapter if there is one."""
    base = sources.base
    attributes, named = read_json(base.directory / CONFIG), name_unless_given(base.model_name)
    tokenizer = sources.tokenizer()
    return Checkpoint(
        named=lambda name: sources.named(named(name)),
        origin=str(base.directory),
        attributes=attributes,
        config_name=CONFIG,
        tensors=functools.cache(lambda: open_tensors(base.directory, base.weights)),
        stop_tokens=lambda: read_stop_tokens(base.directory, attributes),
        tokenizer=None if tokenizer is None else tokenizer.directory,
        repo=base.repo,
        tokenizer_repo=None if tokenizer is None else tokenizer.repo,
        adapter=None if sources.adapter is None else sources.adapter.directory,
        adapter_config=sources.settings,
    )


def in_memory(name: str | os.PathLike[str], hf_model: Any, refused: Mapping[str, Any]) -> Checkpoint:
    """Returns the checkpoint of a transformers model in memory, with the tokenizer in directory ``name``, if any.

    Args:
        name: the model's name, or a directory.
        hf_model: the model.
        refused: options that choose files to read, by name; all must be ``None``.

    Raises:
        InputError: an option is not ``None``, or ``hf_model`` is not a transformers model.
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
        tensors=lambda: tensors,
        stop_tokens=lambda: declared_tokens(attributes if generation is None else generation, "hf_model"),
        tokenizer=path if has_tokenizer_files(path) else None,
    )


def of_state_dict(tensors: Tensors, name: str, origin: str, tokenizer: str | None) -> Checkpoint:
    """Returns the checkpoint of a state dict, without config.json; ``tokenizer`` is used if it is a directory."""
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
    """Returns a function that downloads ``repo``'s tokenizer, if a checkpoint of the hub has none of its own."""
    if checkpoint.repo is None or repo is None or checkpoint.tokenizer is not None:
        return None
    return functools.partial(hub.tokenizer_directory, repo, **access)
