"""tljax's own format: ``config.json`` with our field names, ``model.safetensors`` with our dotted paths."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tljax.checkpoints.layout import flatten, parameter_axes, parameter_shapes
from tljax.checkpoints.mapping import Row
from tljax.checkpoints.reader import CONFIG, SINGLE
from tljax.config import HookedTransformerConfig
from tljax.errors import CheckpointError, UnsupportedModelError
from tljax.safetensors_files import replace_file, write_safetensors
from tljax.typing import Params

FORMAT = "tljax_format"
VERSION = 1


def read_config(attributes: Mapping[str, Any], origin: str) -> HookedTransformerConfig:
    """Returns the config in a config.json of ours."""
    fields = dict(attributes)
    if (version := fields.pop(FORMAT)) != VERSION:
        raise UnsupportedModelError(
            f"{origin} has {FORMAT}={version!r}, but this version of tljax reads {VERSION}: update tljax."
        )
    return HookedTransformerConfig.from_dict(fields)


def rows(cfg: HookedTransformerConfig) -> list[Row]:
    """Returns the table of our own format: every parameter under its own path, as it is."""
    return [Row(path, " ".join(axes), path) for path, axes in parameter_axes(cfg).items()]


def save_native(
    params: Params, cfg: HookedTransformerConfig, tokenizer: Any, directory: str | os.PathLike[str]
) -> None:
    """Writes a checkpoint that :func:`load_checkpoint` reads back bit for bit.

    Files are written under a temporary name and renamed when complete, config.json last.

    Args:
        params: nested parameters.
        cfg: their config.
        tokenizer: a Hugging Face tokenizer to save with them, or ``None``.
        directory: created if it does not exist.

    Raises:
        CheckpointError: the parameters do not have the shapes of ``cfg``.
    """
    flat, expected = flatten(params), parameter_shapes(cfg)
    shapes = {path: tuple(leaf.shape) for path, leaf in flat.items()}
    wrong = [
        f"{path} is {shapes.get(path, 'absent')}, should be {expected.get(path, 'absent')}"
        for path in sorted(shapes.keys() | expected.keys())
        if shapes.get(path) != expected.get(path)
    ]
    if wrong:
        raise CheckpointError(f"The parameters do not fit the config, nothing was saved. {'; '.join(wrong[:12])}.")
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    headers = {path: (np.dtype(leaf.dtype), shapes[path]) for path, leaf in flat.items()}
    write_safetensors(target / SINGLE, headers, lambda path: np.asarray(jax.device_get(flat[path])))
    write_side_files(target, {FORMAT: VERSION, **cfg.to_dict()}, tokenizer)


def write_side_files(directory: Path, config: Mapping[str, Any], tokenizer: Any) -> None:
    """Writes the tokenizer's files and, last of all, config.json."""
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    write_json(directory / CONFIG, config)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object under a temporary name and renames it when complete."""
    with replace_file(file) as stream:
        stream.write((json.dumps(content, indent=2) + "\n").encode())
