"""Gemma Scope 2 (Gemma 3): ``params.safetensors`` with a ``config.json`` that names Hugging Face's modules."""

from pathlib import Path
from typing import Any

from tljax.dictionaries.formats.points import point_of, tap_of
from tljax.dictionaries.formats.read import Format, Read
from tljax.dictionaries.formats.tensors import (
    expect_sizes,
    has_keys,
    metadata_of,
    open_safetensors,
    read_config,
    read_rows,
    shapes_in,
)
from tljax.dictionaries.maths.config import DictionaryConfig, Tap
from tljax.errors import DictionaryError

FILE, CONFIG = "params.safetensors", "config.json"
ROWS = {
    "W_enc": [("w_enc", "d_in d_sae")],
    "W_dec": [("w_dec", "d_sae d_out")],
    "b_enc": [("b_enc", "d_sae")],
    "b_dec": [("b_dec", "d_out")],
    "threshold": [("threshold", "d_sae")],
    "W_skip": [("affine_skip_connection", "d_in d_out")],
}
"""The affine skip is used as ``x @ A``, so that ``W_skip`` is its transpose."""


def read(path: Path, **facts: Any) -> Read:
    """Reads a sparse autoencoder or a transcoder, with or without affine skip.

    Raises:
        DictionaryError: the files are damaged, of another format or architecture, or config and arrays disagree.
    """
    directory = path.parent if path.is_file() else path
    config = config_of(directory, facts)
    tap = tap_at(config, facts)
    stored = open_safetensors(path if path.is_file() else directory / FILE)
    transcoder = tap.writes is not None or config.get("type") == "transcoder" or "affine_skip_connection" in stored
    params = read_rows(stored, ROWS, optional=("W_skip",), autoencoder=not transcoder)
    stored.finish()
    if config.get("affine_connection", "W_skip" in params) != ("W_skip" in params):
        raise DictionaryError(
            f"{directory}: the config says affine_connection={config['affine_connection']}, and the arrays "
            f"{'have' if 'W_skip' in params else 'lack'} affine_skip_connection: the files are of two dictionaries."
        )
    d_in, d_sae = params["W_enc"].shape
    expect_sizes(directory, width=(config.get("width"), d_sae))
    cfg = DictionaryConfig(
        architecture="jumprelu",
        d_in=d_in,
        d_sae=d_sae,
        d_out=params["W_dec"].shape[1],
        apply_b_dec_to_input=False,
        transcoder=transcoder,
        tap=tap,
        metadata=metadata_of(config),
    )
    return Read(params, cfg)


def config_of(directory: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Reads ``config.json``, and refuses an architecture that is not JumpReLU."""
    config = read_config(directory / CONFIG, facts)
    if config.get("architecture", "jump_relu") not in ("jump_relu", "jumprelu"):
        raise DictionaryError(
            f"{directory}: architecture is {config['architecture']!r}; Gemma Scope 2 dictionaries are 'jump_relu'."
        )
    return config


def tap_at(config: dict[str, Any], facts: dict[str, Any], layer: int | None = None) -> Tap:
    """Returns the tap that ``hf_hook_point_in`` and ``hf_hook_point_out`` name.

    Args:
        config: the contents of ``config.json``.
        facts: what the caller knows.
        layer: the layer to put for ``{…}`` in the names, for dictionaries of several.
    """
    points = []
    for key in ("hf_hook_point_in", "hf_hook_point_out"):
        name = config.get(key)
        head, brace, tail = name.partition("{") if isinstance(name, str) else ("", "", "")
        name = f"{head}{layer}{tail.partition('}')[2]}" if brace else head
        module, _, side = name.rpartition(".")
        points.append(point_of(module, side) if side in ("input", "output") else None)
    reads, writes = points
    return tap_of(reads, None if writes == reads else writes, facts=facts, model_name=config.get("model_name"))


def _detects(path: Path) -> bool:
    file = path if path.is_file() else path / FILE
    shape = shapes_in(file).get("w_enc") if file.name == FILE else None
    return shape is not None and len(shape) == 2 and has_keys(file.parent / CONFIG)


FORMAT = Format(name="gemma_scope_2", looks_for=f"{FILE} with w_enc, and {CONFIG}", detects=_detects, reads=read)
