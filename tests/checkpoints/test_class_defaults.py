"""An attribute that config.json lacks means what transformers' class takes for it, in every family."""

import copy
from typing import Any

import pytest
from hf_models import VARIANTS, hf_config

from tljax import HookedTransformerConfig
from tljax.checkpoints.families import FAMILIES, family_of
from tljax.checkpoints.family import Family
from tljax.checkpoints.formats.quantized.settings import read_settings, without_settings
from tljax.checkpoints.rows import Row

BY_TYPE = {family.model_type: family for family in FAMILIES}
IMPOSSIBLE = {
    "deepseek_v2": "num_experts_per_tok",  # no number by default
    "glm4_moe": "rotary_dim",  # a rotated fraction of an odd width
}
"""Model type → what keeps the class's defaults alone from being a model; transformers cannot run them either."""


def read(attributes: dict[str, Any]) -> tuple[HookedTransformerConfig, list[Row]]:
    """Our config and table, with every attribute accounted for."""
    family = family_of(attributes)
    read_settings(attributes, "config.json")
    hf = family.config(without_settings(copy.deepcopy(attributes)))
    cfg, rows = family.read_config(hf), list(family.rows(hf))
    hf.refuse_unread()
    return cfg, rows


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_equals_its_default_may_be_absent(variant: str) -> None:
    config = hf_config(variant)
    full, defaults = config.to_dict(), type(config)().to_dict()
    missing = object()
    kept = {name: value for name, value in full.items() if value != defaults.get(name, missing)}
    assert len(kept) < len(full)
    assert read(kept | {"model_type": full["model_type"]}) == read(full)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_transformers_derives_is_derived(variant: str) -> None:
    model_type, attributes = VARIANTS[variant]
    assert read(attributes | {"model_type": model_type}) == read(hf_config(variant).to_dict())


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_an_empty_config_is_the_class_without_arguments(family: Family) -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model(family.model_type)
    empty = {"model_type": family.model_type, "architectures": [family.architecture]}
    if family.model_type in IMPOSSIBLE:
        with pytest.raises(ValueError, match=IMPOSSIBLE[family.model_type]):
            read(empty)
        return
    assert read(empty) == read(config.to_dict())


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_other_names_are_those_of_the_class(family: Family) -> None:
    from transformers import AutoConfig

    known = {name for name, own in AutoConfig.for_model(family.model_type).attribute_map.items()}
    inert = {name for names in family.inert.values() for name in names.split()}
    assert known <= family.aliases.keys() | inert
