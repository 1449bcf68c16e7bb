"""Gemma Scope (Gemma 2): ``layer_L/width_W/average_l0_N/params.npz``. Only the path says where a dictionary belongs."""

import math
import re
from pathlib import Path
from typing import Any

from tljax.dictionaries.formats.points import tap_of
from tljax.dictionaries.formats.read import Format, Read
from tljax.dictionaries.formats.tensors import open_npz, read_rows
from tljax.dictionaries.maths.config import DictionaryConfig

FILE = "params.npz"
ROWS = {
    "W_enc": [("W_enc", "d_in d_sae"), ("w_enc", "d_in d_sae")],
    "W_dec": [("W_dec", "d_sae d_out"), ("w_dec", "d_sae d_out")],
    "b_enc": [("b_enc", "d_sae")],
    "b_dec": [("b_dec", "d_out")],
    "threshold": [("threshold", "d_sae")],
}
_REPOSITORY = re.compile(r"gemma-scope-(\d+b)-(pt|it)-(res|mlp|att|transcoder)s?")
_SITES = {
    "res": ("hook_resid_post", None),
    "mlp": ("hook_mlp_out", None),
    "att": ("attn.hook_z", None),
    "transcoder": ("ln2.hook_normalized", "hook_mlp_out"),
}
"""Site → the points that are read and written."""


def read(path: Path, **facts: Any) -> Read:
    """Reads a directory with ``params.npz``, or the file.

    ``b_dec`` is not subtracted from the input. Dictionaries of the embedding were trained before Gemma multiplies it by
    ``sqrt(d)``, and are rescaled to read and write ``hook_embed``, which holds the product. Transcoders read
    ``ln2.hook_normalized``, before the norm's gain.

    Raises:
        DictionaryError: the file is damaged or holds another format.
    """
    file = path if path.is_file() else path / FILE
    reads, writes, model_name = _site(file.absolute(), facts.get("layer"))
    tap = tap_of(reads, writes, facts=facts, model_name=model_name)
    stored = open_npz(file)
    params = read_rows(stored, ROWS, autoencoder=tap.writes is None)
    stored.finish()
    d_in, d_sae = params["W_enc"].shape
    if tap.reads == "hook_embed":
        scale = 1 / math.sqrt(d_in)
        params |= {"W_enc": params["W_enc"] * scale, "W_dec": params["W_dec"] / scale}
    cfg = DictionaryConfig(
        architecture="jumprelu",
        d_in=d_in,
        d_sae=d_sae,
        d_out=params["W_dec"].shape[1],
        apply_b_dec_to_input=False,
        transcoder=tap.writes is not None,
        tap=tap,
    )
    return Read(params, cfg)


def _site(file: Path, layer: int | None) -> tuple[str | None, str | None, str | None]:
    """Returns the points that are read and written, and the model, as far as the path tells."""
    parts = [part.lower() for part in file.parts[::-1]]
    repository = next((found for part in parts if (found := _REPOSITORY.search(part))), None)
    instructed = "-it" if repository and repository[2] == "it" else ""
    model_name = f"gemma-2-{repository[1]}{instructed}" if repository else None
    if any(part.startswith("embedding") for part in parts[:4]):
        return "hook_embed", None, model_name
    site = (
        repository[3] if repository else next((part.rstrip("s") for part in parts if part.rstrip("s") in _SITES), None)
    )
    if site is None and "res" in parts:
        site = "res"
    if layer is None:
        layer = next((int(found[1]) for part in parts if (found := re.fullmatch(r"layer_(\d+)", part))), None)
    if site is None or layer is None:
        return None, None, model_name
    reads, writes = _SITES[site]
    return f"blocks.{layer}.{reads}", writes and f"blocks.{layer}.{writes}", model_name


def _detects(path: Path) -> bool:
    return (path.is_file() and path.name.endswith(".npz")) or (path / FILE).is_file()


FORMAT = Format(name="gemma_scope", looks_for=FILE, detects=_detects, reads=read)
