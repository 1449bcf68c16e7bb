"""Names of sites in other projects, as hook points."""

import re
from typing import Any, Literal

from tljax.dictionaries.maths.config import Tap

RAW: tuple[str, ...] = ()
"""The weight processing of activations taken from Hugging Face's own models: none."""

_LAYER = re.compile(r"(?:.*\.)?(?:layers|h|blocks)[.\[](\d+)\]?(?:\.(.+))?")
_EMBEDDINGS = {"embed_tokens": "hook_embed", "wte": "hook_embed", "embed_in": "hook_embed", "wpe": "hook_pos_embed"}
_MLP, _ATTENTION = ("mlp", "feed_forward", "ffn"), ("attn", "self_attn", "attention")
_OUTPUTS = {
    "": "hook_resid_post",
    **dict.fromkeys(_MLP, "hook_mlp_out"),
    **dict.fromkeys(_ATTENTION, "hook_attn_out"),
    "post_feedforward_layernorm": "hook_mlp_out",
    "pre_feedforward_layernorm": "mlp.hook_in",
}
_INPUTS = {
    "": "hook_resid_pre",
    **dict.fromkeys(_MLP, "mlp.hook_in"),
    **dict.fromkeys(("self_attn.o_proj", "attn.c_proj", "attention.dense"), "attn.hook_z"),
    **dict.fromkeys(("mlp.down_proj", "mlp.c_proj", "mlp.dense_4h_to_h"), "mlp.hook_post"),
}
"""A module within a block, by Hugging Face's name → the point that holds its output, or its input."""

_GAINS = {"ln1.hook_normalized": False, "ln2.hook_normalized": False, "mlp.hook_in": True}
"""Points that hold a normalised activation → whether it is multiplied by the norm's weight there."""


def point_of(module: str, side: Literal["input", "output"] = "output") -> str | None:
    """Returns the full name of the hook point at a Hugging Face module, or ``None`` if there is none.

    >>> point_of("layers.10")
    'blocks.10.hook_resid_post'
    >>> point_of("model.layers.3.mlp", "input")
    'blocks.3.mlp.hook_in'
    """
    if module.rpartition(".")[2] in _EMBEDDINGS:
        return _EMBEDDINGS[module.rpartition(".")[2]] if side == "output" else None
    match = _LAYER.fullmatch(module)
    point = (_OUTPUTS if side == "output" else _INPUTS).get(match[2] or "") if match else None
    return f"blocks.{match[1]}.{point}" if match and point else None


def tap_of(
    reads: str | None,
    writes: str | None = None,
    *,
    facts: dict[str, Any] | None = None,
    model_name: str | None = None,
    processing: tuple[str, ...] | None = RAW,
) -> Tap:
    """Returns the tap at a point, where facts that the caller or a release knows win over those of the files.

    Args:
        reads: full name of the point read.
        writes: full name of the point written, if another.
        facts: see :attr:`tljax.dictionaries.formats.read.Format.reads`.
        model_name: the model, as the files name it.
        processing: the weight processing that the activations were taken under.
    """
    known = {name: value for name, value in (facts or {}).items() if value is not None}
    reads = known.get("reads", reads)
    steps = known.get("processing", processing)
    return Tap(
        reads=reads,
        writes=known.get("writes", writes),
        model_name=known.get("model_name", model_name),
        merged_heads=reads is not None and reads.endswith("attn.hook_z"),
        processing=None if steps is None else tuple(steps),
        gain=next((gain for point, gain in _GAINS.items() if reads is not None and reads.endswith("." + point)), None),
    )
