"""The text model in a multimodal checkpoint: where its config is, and how its tensors are named.

Only the text model is read. Its prompts hold no image, so whatever makes, places or counts image tokens is ignored.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from tljax.checkpoints.formats.hf_config import SWITCHED_OFF, HFConfig
from tljax.errors import CheckpointError

TEXT, VISION = "text_config", "vision_config"
_IMAGES = (
    # the vision tower, and the layers between it and the text model
    VISION, "multimodal_projector_bias", "projector_hidden_act", "spatial_merge_size", "vision_feature_layer",
    "vision_feature_select_strategy",
    # ids and counts of image tokens, which to the text model are ids like any other
    "image_token_id", "image_token_index", "video_token_id", "video_token_index", "vision_token_id",
    "vision_start_token_id", "vision_end_token_id", "image_start_token_id", "image_end_token_id",
    "video_start_token_id", "video_end_token_id", "boi_token_index", "eoi_token_index", "boi_token_id", "eoi_token_id",
    "mm_tokens_per_image", "image_seq_length", "ignore_index",
)  # fmt: skip
"""Attributes that say nothing about text."""
_OF_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
RENAMED = (
    (r"(?:model\.)?language_model\.lm_head\.", "lm_head."),
    (r"(?:model\.)?language_model\.(?:model\.)?", "model."),
)
"""Patterns for the starts of names in a multimodal checkpoint, old (``language_model.model.``) and new
(``model.language_model.``), and the starts that the text model alone has instead."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tower:
    """How to get the text model's config from a multimodal one.

    Attributes:
        text_architecture: the class that transformers has for the text model alone.
        text_types: the ``model_type`` that ``text_config`` may have; empty where transformers does not look at it.
        flat: whether older files have no ``text_config``, but its attributes beside those of images.
        mrope: whether positions have three parts: time, height and width (``mrope_section`` says which dimensions
            rotate by which). In text all three are the token's position, which gives the ordinary rotation.
        tied: default of ``tie_word_embeddings`` in the whole config.
        tied_by_text: whether ``tie_word_embeddings`` in ``text_config`` ties, too; if not, transformers ignores it.
        only: attributes of the text family that the text model here ignores, and the value they must have.
    """

    text_architecture: str
    text_types: tuple[str, ...] = ()
    flat: bool = False
    mrope: bool = False
    tied: bool = False
    tied_by_text: bool = True
    only: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def text_config(self, hf: HFConfig) -> HFConfig:
        """Returns the text model's config, in the form that its family reads.

        Raises:
            CheckpointError: there is no ``text_config``.
            UnsupportedModelError: the whole config has an attribute that is neither the text model's nor known, or the
                text model has a type or a setting that transformers does not accept for this family.
        """
        for name in _IMAGES:
            hf(name, None)
        nested = hf(TEXT, None)
        if nested is None and self.flat:
            text = hf.changed(**self._completed(hf, hf.attributes))
        elif isinstance(nested, Mapping):
            for name in nested.keys() - SWITCHED_OFF.keys():
                hf(name, None)  # transformers reads text_config and ignores attributes of that name beside it
            tokens = {name: hf(name) for name in _OF_TOKENS if hf(name, None) is not None}
            completed = self._completed(hf, {**nested, **tokens})
            hf.refuse_unread()
            text = hf.inner(completed, TEXT)
            for name in _IMAGES:
                text(name, None)
        else:
            raise CheckpointError(
                f"{hf.origin} has {TEXT}={nested!r}: expected the attributes of the text model there."
            )
        if self.text_types and text("model_type", self.text_types[0]) not in self.text_types:
            raise text.unsupported("model_type", text("model_type"), ", ".join(self.text_types))
        text.only(**self.only)
        return text

    def _completed(self, hf: HFConfig, text: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the text model's attributes, completed from the whole config and from defaults."""
        tied = bool(hf("tie_word_embeddings", self.tied) or (self.tied_by_text and text.get("tie_word_embeddings")))
        ropes = [name for name in ("rope_scaling", "rope_parameters") if self.mrope and name in text]
        of_text = {name: _of_text(text[name]) for name in ropes}
        return {**text, **of_text, "tie_word_embeddings": tied}


def _of_text(rope: Any) -> Any:
    """Returns rotary parameters without those that matter to images alone."""
    if not isinstance(rope, Mapping):
        return rope
    kept = {name: value for name, value in rope.items() if name not in ("mrope_section", "mrope_interleaved")}
    kinds = {name: "default" for name in ("type", "rope_type") if kept.get(name) == "mrope"}
    return {**kept, **kinds}
