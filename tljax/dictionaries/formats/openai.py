"""OpenAI's autoencoders of GPT-2 small: one PyTorch pickle, ``…/resid_post_mlp_v5_32k/autoencoders/8.pt``."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from tljax.dictionaries.formats.points import tap_of
from tljax.dictionaries.formats.read import Format, Read
from tljax.dictionaries.formats.tensors import open_pickle, read_rows, whole
from tljax.dictionaries.maths.config import DictionaryConfig
from tljax.errors import DictionaryError

ROWS = {
    "W_enc": [("encoder.weight", "d_sae d_in")],
    "W_dec": [("decoder.weight", "d_out d_sae"), ("decoder.linear.weight", "d_sae d_out")],
    "b_enc": [("latent_bias", "d_sae")],
    "b_dec": [("pre_bias", "d_out")],
}
"""``decoder.linear.weight`` is the encoder's own matrix, of tied weights."""

_STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")
_SITES = {
    "resid_delta_attn": "hook_attn_out", "resid_post_attn": "hook_resid_mid", "resid_delta_mlp": "hook_mlp_out",
    "resid_post_mlp": "hook_resid_post", "mlp_post_act": "mlp.hook_post",
}  # fmt: skip


def read(path: Path, **facts: Any) -> Read:
    """Reads an autoencoder. The activation ``TopK`` implies a LayerNorm of the input, which the output undoes.

    Raises:
        DictionaryError: the file is damaged, or its activation is not ReLU, nor TopK followed by ReLU.
        UnsupportedModelError: torch is not installed.
    """
    file = path if path.is_file() else pickle_in(path) or path
    stored, rest = open_pickle(file)
    activation, state = rest.get("activation", "ReLU"), rest.get("activation_state_dict") or {}
    if activation not in ("ReLU", "TopK") or (activation == "TopK" and state.get("postact_fn", "ReLU") != "ReLU"):
        raise DictionaryError(
            f"{file}: its activation is {activation!r} with {dict(state)}; expected 'ReLU', or 'TopK' with "
            "postact_fn='ReLU'."
        )
    params = read_rows(stored, ROWS)
    rates = stored.take(_STATISTICS[1]) if _STATISTICS[1] in stored else None
    stored.ignore(*_STATISTICS)
    stored.finish()
    d_in, d_sae = params["W_enc"].shape
    named = re.search(rf"({'|'.join(_SITES)})", str(file.absolute()))
    layer = facts.get("layer")
    if layer is None and file.stem.isdecimal():
        layer = int(file.stem)
    point = f"blocks.{layer}.{_SITES[named[1]]}" if named and layer is not None else None
    top_k = activation == "TopK"
    cfg = DictionaryConfig(
        architecture="topk" if top_k else "standard",
        d_in=d_in,
        d_sae=d_sae,
        k=whole(file, {"k": int(state["k"])} if "k" in state else {}, "k") if top_k else None,
        normalize_activations="layer_norm" if top_k else "none",
        tap=tap_of(point, facts=facts, model_name="gpt2-small"),
    )
    known = rates is not None and rates.shape == (d_sae,) and not np.all(rates == 1)  # ones: never counted
    return Read(params, cfg, np.log10(rates.astype(np.float32) + 1e-10) if known and rates is not None else None)


def pickle_in(directory: Path) -> Path | None:
    """Returns the one pickle in a directory, if there is one and no JSON file beside it."""
    if not directory.is_dir() or any(directory.glob("*.json")):
        return None
    files = sorted(file for pattern in ("*.pt", "*.pth") for file in directory.glob(pattern))
    return files[0] if len(files) == 1 else None


def _detects(path: Path) -> bool:
    """Whether it is a pickle by a name that OpenAI gave it: what is inside cannot be known without unpickling it."""
    file = path if path.is_file() else pickle_in(path)
    if file is None or file.suffix != ".pt":
        return False
    return file.stem.isdecimal() or file.parent.name == "autoencoders" or file.stem == "autoencoder"


FORMAT = Format(
    name="openai",
    looks_for="one pickle: a number or autoencoder.pt",
    detects=_detects,
    reads=read,
    files=lambda sae_id: (sae_id or "*.pt",),
)
