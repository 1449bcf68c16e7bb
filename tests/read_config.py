"""tljax's config of a Hugging Face one, every attribute of which must be known."""

from typing import Any

from hf_models import hf_config

from tljax import HookedTransformerConfig
from tljax.checkpoints.families import family_of
from tljax.checkpoints.hf_config import HFConfig


def read(variant: str, without: tuple[str, ...] = (), **changes: Any) -> HookedTransformerConfig:
    """The config of a variant, with some attributes left out or changed."""
    attributes = hf_config(variant).to_dict() | changes
    return read_attributes({key: value for key, value in attributes.items() if key not in without})


def read_attributes(attributes: dict[str, Any]) -> HookedTransformerConfig:
    """The config of these attributes."""
    family, hf = family_of(attributes), HFConfig(attributes)
    cfg = family.read_config(hf)
    family.rows(hf)
    hf.refuse_unread()
    return cfg
