"""The table of formats of quantised weights, and which of them a checkpoint's config.json names."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from tljax.checkpoints.formats.hf_config import HFConfig, shortened
from tljax.checkpoints.formats.quantized import awq, bitsandbytes, compressed_tensors, fp8, gptq, mxfp4
from tljax.checkpoints.formats.quantized.layout import Quantization
from tljax.errors import CheckpointError, UnsupportedModelError, nearest


@dataclasses.dataclass(frozen=True)
class Format:
    """One ``quant_method``.

    Attributes:
        read: its ``quantization_config`` → what that says.
        inert: names of attributes, separated by spaces, that do not change the weights.
        mark: end of the name of a tensor that only such files have; ``None``: there is none.
    """

    read: Callable[[HFConfig], Quantization]
    inert: str
    mark: str | None


FORMATS: dict[str, Format] = {
    "gptq": Format(gptq.read, gptq.INERT, ".qweight"),
    "awq": Format(awq.read, awq.INERT, ".qweight"),
    "bitsandbytes": Format(bitsandbytes.read, bitsandbytes.INERT, ".absmax"),
    "fp8": Format(fp8.read, fp8.INERT, "_scale_inv"),
    "fbgemm_fp8": Format(fp8.read, fp8.INERT, None),
    "compressed-tensors": Format(compressed_tensors.read, compressed_tensors.INERT, ".weight_packed"),
    "mxfp4": Format(mxfp4.read, mxfp4.INERT, "_blocks"),
}
"""``quant_method`` → its format."""
KEYS = ("quantization_config", "compression_config")
"""Attributes of config.json that describe quantised weights; the second is what compressed-tensors once wrote."""
_TEXT = "text_config"
_EVERYWHERE = "quant_method provider"


def read_settings(attributes: Mapping[str, Any], origin: str) -> Quantization | None:
    """Returns what config.json says of quantised weights; ``None`` if it says nothing.

    Args:
        attributes: the attributes in config.json; those of a multimodal model may have it in ``text_config``.
        origin: the file's name in errors.

    Raises:
        CheckpointError: two places in the file contradict each other, or an attribute has the wrong type.
        UnsupportedModelError: a ``quant_method``, or one of its attributes, that tljax does not implement.
    """
    found = {}
    text = attributes.get(_TEXT)
    for start, inside in (("", attributes), (f"{_TEXT}.", text if isinstance(text, Mapping) else {})):
        found |= {start + key: inside[key] for key in KEYS if inside.get(key) is not None}
    if not found:
        return None
    name, settings = next(iter(found.items()))
    if any(other != settings for other in found.values()):
        raise CheckpointError(f"{origin} contradicts itself: {' and '.join(found)} differ. Keep the one that is right.")
    method = settings.get("quant_method") if isinstance(settings, Mapping) else None
    form = FORMATS.get(method) if isinstance(method, str) else None
    if form is None:
        close = nearest(method, FORMATS) if isinstance(method, str) else ""
        raise UnsupportedModelError(
            f"{origin} sets {name}={shortened(settings)}, whose quant_method tljax does not read (it reads "
            f"{', '.join(FORMATS)}).{close} Load the full-precision original."
        )
    inert = f"{form.inert} {_EVERYWHERE}".split()
    hf = HFConfig({name: settings}, origin, inert=inert).inner(settings, name)
    said = form.read(hf)
    hf.refuse_unread()
    return dataclasses.replace(said, method=method)


def without_settings(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns config.json's attributes without those that describe quantised weights, as of the float model."""
    left = {key: value for key, value in attributes.items() if key not in KEYS}
    text = left.get(_TEXT)
    if isinstance(text, Mapping):
        left[_TEXT] = {key: value for key, value in text.items() if key not in KEYS}
    return left
