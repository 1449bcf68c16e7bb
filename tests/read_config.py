"""tljax's config of a Hugging Face one, every attribute of which must be known."""

from typing import Any

from hf_models import hf_config

from tljax import HookedTransformerConfig
from tljax.checkpoints.families import family_of
from tljax.checkpoints.formats.quantized.settings import read_settings, without_settings


def read(variant: str, without: tuple[str, ...] = (), **changes: Any) -> HookedTransformerConfig:
    """The config of a variant, with some attributes left out or changed."""
    attributes = hf_config(variant).to_dict() | changes
    return read_attributes({key: value for key, value in attributes.items() if key not in without})


def read_attributes(attributes: dict[str, Any]) -> HookedTransformerConfig:
    """The config of these attributes."""
    family = family_of(attributes)
    read_settings(attributes, "config.json")
    hf = family.config(without_settings(attributes))
    cfg = family.read_config(hf)
    family.rows(hf)
    hf.refuse_unread()
    return cfg
