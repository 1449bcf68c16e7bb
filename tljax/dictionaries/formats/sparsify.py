"""sparsify: ``cfg.json`` and ``sae.safetensors`` in a folder named after the Hugging Face module it was trained on."""

from pathlib import Path
from typing import Any, Literal

from tljax.dictionaries.formats.points import point_of, tap_of
from tljax.dictionaries.formats.read import Format, Read
from tljax.dictionaries.formats.tensors import (
    expect_sizes,
    has_keys,
    metadata_of,
    open_safetensors,
    read_config,
    read_rows,
    whole,
    without_input_bias,
)
from tljax.dictionaries.maths.config import DictionaryConfig
from tljax.errors import DictionaryError

FILE, CONFIG = "sae.safetensors", "cfg.json"
ROWS = {
    "W_enc": [("encoder.weight", "d_sae d_in")],
    "W_dec": [("W_dec", "d_sae d_out")],
    "b_enc": [("encoder.bias", "d_sae")],
    "b_dec": [("b_dec", "d_out")],
    "W_skip": [("W_skip", "d_out d_in")],
}


def read(path: Path, **facts: Any) -> Read:
    """Reads a sparse autoencoder or a transcoder.

    ``b_dec`` is subtracted from the input unless ``transcode``. ``multi_topk`` and ``normalize_decoder`` change only
    training. The folder's name says the site: ``layers.10`` is the residual stream after block 10; a transcoder reads
    the module's input.

    Raises:
        DictionaryError: the files are damaged, config and arrays disagree, or the activation is unknown.
    """
    config = read_config(path / CONFIG, facts)
    activation = config.get("activation", "topk")
    if activation not in ("topk", "groupmax") or (activation == "groupmax" and config.get("signed")):
        raise DictionaryError(f"{path}: activation is {activation!r}, expected 'topk' or 'groupmax'.")
    stored = open_safetensors(path / FILE)
    transcode, skip = bool(config.get("transcode")), bool(config.get("skip_connection"))
    optional = () if skip else ("W_skip",)
    params = read_rows(stored, ROWS, optional=optional, autoencoder=False)
    stored.finish()
    if "W_skip" in params and not skip:
        raise DictionaryError(f"{path}: it holds W_skip, and {CONFIG} says skip_connection={skip}.")
    d_in, d_sae = params["W_enc"].shape
    latents = config.get("num_latents") or d_in * whole(path, config, "expansion_factor")
    expect_sizes(path, d_in=(config.get("d_in"), d_in), num_latents=(latents, d_sae))
    if skip and not transcode:  # a skip needs a transcoder: the same function without the bias on its input
        params = without_input_bias(params)
    architecture: Literal["topk", "abstopk", "groupmax"] = "abstopk" if config.get("signed") else activation
    side = "input" if transcode or skip else "output"
    reads, writes = point_of(path.absolute().name, side), point_of(path.absolute().name)
    run = path.absolute().parent / "config.json"
    model = read_config(run).get("model") if has_keys(run, "model") else None
    cfg = DictionaryConfig(
        architecture=architecture,
        d_in=d_in,
        d_sae=d_sae,
        d_out=params["W_dec"].shape[1],
        k=whole(path, config, "k"),
        apply_b_dec_to_input=not (transcode or skip),
        transcoder=transcode or skip,
        tap=tap_of(reads, writes if transcode or skip else None, facts=facts, model_name=model),
        metadata=metadata_of(config),
    )
    return Read(params, cfg)


def _detects(path: Path) -> bool:
    return (path / FILE).is_file()


FORMAT = Format(name="sparsify", looks_for=f"{FILE} and {CONFIG}", detects=_detects, reads=read)
