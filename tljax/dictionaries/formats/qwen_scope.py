"""Qwen Scope: ``layer5.sae.pt`` for each layer, with one ``config.json`` beside them."""

import re
from pathlib import Path
from typing import Any

from tljax.dictionaries.formats.points import tap_of
from tljax.dictionaries.formats.read import Format, Read
from tljax.dictionaries.formats.tensors import expect_sizes, metadata_of, open_pickle, read_config, read_rows, whole
from tljax.dictionaries.maths.config import DictionaryConfig
from tljax.errors import DictionaryError

CONFIG = "config.json"
ROWS = {
    "W_enc": [("W_enc", "d_sae d_in")],
    "W_dec": [("W_dec", "d_out d_sae")],
    "b_enc": [("b_enc", "d_sae")],
    "b_dec": [("b_dec", "d_out")],
}
_NAME = re.compile(r"layer(\d+)\.sae\.pt")


def read(path: Path, **facts: Any) -> Read:
    """Reads ``layer5.sae.pt``, or a directory that holds one such file or that of ``layer``.

    ``b_dec`` is not subtracted from the input. The matrices lie the other way round than their names say elsewhere:
    ``W_enc [F, d]``, ``W_dec [d, F]``.

    Raises:
        DictionaryError: a file is missing or damaged, or config and arrays disagree.
        UnsupportedModelError: torch is not installed.
    """
    files = {int(found[1]): file for file in _files_in(path) if (found := _NAME.fullmatch(file.name))}
    layer = facts.get("layer")
    if layer is None and len(files) == 1:
        layer = next(iter(files))
    if layer not in files:
        raise DictionaryError(f"{path} holds layers {sorted(files)}: choose one, by layer= or the path of its file.")
    file = files[layer]
    config = read_config(file.parent / CONFIG, facts)
    stored, _ = open_pickle(file)
    params = read_rows(stored, ROWS)
    stored.finish()
    d_in, d_sae = params["W_enc"].shape
    expect_sizes(file, d_model=(config.get("d_model"), d_in), d_sae=(config.get("d_sae"), d_sae))
    point = f"blocks.{layer}.hook_{config.get('hook_point', 'resid_post')}"
    cfg = DictionaryConfig(
        architecture="topk",
        d_in=d_in,
        d_sae=d_sae,
        k=whole(file.parent, config, "k"),
        apply_b_dec_to_input=False,
        tap=tap_of(point, facts=facts, model_name=config.get("base_model")),
        metadata=metadata_of(config),
    )
    return Read(params, cfg)


def _files_in(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(path.glob("layer*.sae.pt"))


def _detects(path: Path) -> bool:
    return any(_NAME.fullmatch(file.name) for file in _files_in(path))


FORMAT = Format(
    name="qwen_scope",
    looks_for=f"layer5.sae.pt and {CONFIG}",
    detects=_detects,
    reads=read,
    files=lambda sae_id: (sae_id or "layer*.sae.pt", CONFIG),
)
