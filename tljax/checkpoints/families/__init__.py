"""The model families tljax reads and writes: one small file each, listed once here."""

from collections.abc import Mapping
from typing import Any

from tljax.checkpoints.families.gpt2 import GPT2
from tljax.checkpoints.families.llama import LLAMA
from tljax.checkpoints.families.neox import NEOX
from tljax.checkpoints.mapping import Family
from tljax.errors import UnsupportedModelError, nearest

FAMILIES: tuple[Family, ...] = (GPT2, NEOX, LLAMA)


def family_of(attributes: Mapping[str, Any], origin: str = "config.json") -> Family:
    """Returns the family of a Hugging Face config, by ``architectures`` or, without it, by ``model_type``.

    Raises:
        UnsupportedModelError: no family implements it; lists those that exist.
    """
    architectures = attributes.get("architectures") or []
    for family in FAMILIES:
        if family.architecture in architectures or (
            not architectures and family.model_type == attributes.get("model_type")
        ):
            return family
    got = ", ".join(architectures) or str(attributes.get("model_type"))
    supported = [family.architecture for family in FAMILIES]
    raise UnsupportedModelError(
        f"{origin} describes {got}, which tljax does not implement. Supported: {', '.join(supported)}."
        f"{nearest(got, supported)}"
    )
