"""Goodfire's autoencoders (and others of the layout): a pickle with ``encoder_linear`` and ``decoder_linear``."""

import re
from pathlib import Path
from typing import Any

from tljax.dictionaries.formats.points import tap_of
from tljax.dictionaries.formats.read import Format, Read
from tljax.dictionaries.formats.tensors import open_pickle, read_rows
from tljax.dictionaries.maths.config import DictionaryConfig
from tljax.errors import DictionaryError

ROWS = {
    "W_enc": [("encoder_linear.weight", "d_sae d_in")],
    "W_dec": [("decoder_linear.weight", "d_out d_sae")],
    "b_enc": [("encoder_linear.bias", "d_sae")],
    "b_dec": [("decoder_linear.bias", "d_out")],
}
_TEAMS = {"Llama-": "meta-llama", "DeepSeek-": "deepseek-ai"}
_NAME = re.compile(r"(.+)-SAE-l(\d+)", re.IGNORECASE)


def read(path: Path, **facts: Any) -> Read:
    """Reads ``Llama-3.1-8B-Instruct-SAE-l19.pth``, or the directory that holds it; its name says model and layer.

    Raises:
        DictionaryError: the file is damaged or of another format.
        UnsupportedModelError: torch is not installed.
    """
    file = path if path.is_file() else next(iter(_files_in(path)), None)
    if file is None:
        raise DictionaryError(f"{path} holds no file named like 'Llama-3.1-8B-Instruct-SAE-l19.pth'.")
    stored, _ = open_pickle(file)
    params = read_rows(stored, ROWS)
    stored.finish()
    named, layer = _NAME.fullmatch(file.stem), facts.get("layer")
    layer = int(named[2]) if named and layer is None else layer
    model_name = named[1] if named else None
    team = next((team for start, team in _TEAMS.items() if model_name and model_name.startswith(start)), None)
    model_name = f"{team}/{model_name}" if team else model_name
    d_in, d_sae = params["W_enc"].shape
    point = None if layer is None else f"blocks.{layer}.hook_resid_post"
    tap = tap_of(point, facts=facts, model_name=model_name)
    return Read(params, DictionaryConfig(d_in=d_in, d_sae=d_sae, apply_b_dec_to_input=False, tap=tap))


def _files_in(path: Path) -> list[Path]:
    files = (path.glob(pattern) for pattern in ("*.pt", "*.pth"))
    return sorted(file for found in files for file in found if _NAME.fullmatch(file.stem))


def _detects(path: Path) -> bool:
    if path.is_file():
        return path.suffix in (".pt", ".pth") and _NAME.fullmatch(path.stem) is not None
    return path.is_dir() and len(_files_in(path)) == 1


FORMAT = Format(
    name="goodfire",
    looks_for="one pickle named like Llama-3.1-8B-Instruct-SAE-l19.pth",
    detects=_detects,
    reads=read,
    files=lambda sae_id: (sae_id,) if sae_id else ("*.pt", "*.pth"),
)
