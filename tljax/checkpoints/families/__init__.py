"""The model families tljax reads and writes: one small file each, listed once here."""

from collections.abc import Mapping
from typing import Any

from tljax.checkpoints.families.apertus import APERTUS
from tljax.checkpoints.families.arcee import ARCEE
from tljax.checkpoints.families.bloom import BLOOM
from tljax.checkpoints.families.codegen import CODEGEN
from tljax.checkpoints.families.cohere import COHERE
from tljax.checkpoints.families.cohere2 import COHERE2
from tljax.checkpoints.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from tljax.checkpoints.families.exaone4 import EXAONE4
from tljax.checkpoints.families.falcon import FALCON
from tljax.checkpoints.families.gemma import GEMMA
from tljax.checkpoints.families.gemma2 import GEMMA2
from tljax.checkpoints.families.gemma3 import GEMMA3
from tljax.checkpoints.families.glm import GLM
from tljax.checkpoints.families.glm4 import GLM4
from tljax.checkpoints.families.glm4_moe import GLM4_MOE
from tljax.checkpoints.families.glm4_moe_lite import GLM4_MOE_LITE
from tljax.checkpoints.families.gpt2 import GPT2
from tljax.checkpoints.families.gpt_bigcode import GPT_BIGCODE
from tljax.checkpoints.families.gpt_neo import GPT_NEO
from tljax.checkpoints.families.gpt_oss import GPT_OSS
from tljax.checkpoints.families.gptj import GPTJ
from tljax.checkpoints.families.granite import GRANITE
from tljax.checkpoints.families.granitemoe import GRANITE_MOE
from tljax.checkpoints.families.hunyuan import HUNYUAN
from tljax.checkpoints.families.llama import LLAMA
from tljax.checkpoints.families.mistral import MINISTRAL, MISTRAL
from tljax.checkpoints.families.mixtral import MIXTRAL
from tljax.checkpoints.families.mpt import MPT
from tljax.checkpoints.families.nemotron import NEMOTRON
from tljax.checkpoints.families.neox import NEOX
from tljax.checkpoints.families.olmo import OLMO
from tljax.checkpoints.families.olmo2 import OLMO2
from tljax.checkpoints.families.olmo3 import OLMO3
from tljax.checkpoints.families.olmoe import OLMOE
from tljax.checkpoints.families.openai_gpt import OPENAI_GPT
from tljax.checkpoints.families.opt import OPT
from tljax.checkpoints.families.phi import PHI
from tljax.checkpoints.families.phi3 import PHI3
from tljax.checkpoints.families.phimoe import PHIMOE
from tljax.checkpoints.families.qwen2 import QWEN2
from tljax.checkpoints.families.qwen3 import QWEN3
from tljax.checkpoints.families.qwen_moe import QWEN2_MOE, QWEN3_MOE
from tljax.checkpoints.families.seed_oss import SEED_OSS
from tljax.checkpoints.families.smollm3 import SMOLLM3
from tljax.checkpoints.families.stablelm import STABLELM
from tljax.checkpoints.families.starcoder2 import STARCODER2
from tljax.checkpoints.families.towers import TEXT_ARCHITECTURES as TEXT_ARCHITECTURES
from tljax.checkpoints.families.towers import TOWERS as TOWERS
from tljax.checkpoints.families.xglm import XGLM
from tljax.checkpoints.family import Family
from tljax.checkpoints.formats.hf_config import shortened
from tljax.errors import CheckpointError, UnsupportedModelError, nearest

FAMILIES: tuple[Family, ...] = (
    GPT2,
    NEOX,
    LLAMA,
    GPT_NEO,
    PHI,
    STABLELM,
    FALCON,
    GPTJ,
    QWEN2,
    QWEN3,
    SMOLLM3,
    GEMMA,
    GEMMA2,
    GEMMA3,
    GRANITE,
    MISTRAL,
    MINISTRAL,
    PHI3,
    ARCEE,
    SEED_OSS,
    GLM,
    OPT,
    GPT_BIGCODE,
    STARCODER2,
    OLMO2,
    COHERE,
    COHERE2,
    OLMO,
    GLM4,
    NEMOTRON,
    EXAONE4,
    HUNYUAN,
    APERTUS,
    OLMO3,
    BLOOM,
    MPT,
    CODEGEN,
    XGLM,
    OPENAI_GPT,
    MIXTRAL,
    GPT_OSS,
    QWEN2_MOE,
    QWEN3_MOE,
    GRANITE_MOE,
    PHIMOE,
    OLMOE,
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    GLM4_MOE,
    GLM4_MOE_LITE,
)


_GENERATE = ("forcausallm", "lmheadmodel", "forconditionalgeneration")
"""Endings, in lower case, of the names of classes with a language model's head; the last also takes images."""


def family_of(attributes: Mapping[str, Any], origin: str = "config.json") -> Family:
    """Returns the family of a Hugging Face config.

    The class named in ``architectures`` decides. If tljax does not know it, or none is named, ``model_type`` decides as
    in transformers, which covers other spellings, the bare model, and custom classes with the same head. A class with
    another head is refused, since without that head it would be another model.

    Raises:
        CheckpointError: the class and ``model_type`` are of different families.
        UnsupportedModelError: no family implements it; lists those that exist.
    """
    architectures, model_type = attributes.get("architectures") or [], attributes.get("model_type")
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise CheckpointError(f"{origin} sets architectures={shortened(architectures)}: expected a list of names.")
    known = (*FAMILIES, *TOWERS)
    by_type = next((family for family in known if family.model_type == model_type), None)
    named = {name: family for family in known for name in (family.architecture, family.aka) if name}
    family = next((named[name] for name in architectures if name in named), None)
    if family is not None and by_type is not None and family.read_config is not by_type.read_config:
        raise CheckpointError(
            f"{origin} contradicts itself: architectures={architectures}, but model_type={model_type!r} is "
            f"{by_type.architecture}. Set the one that is wrong right."
        )
    if family is None and by_type is not None and all(_has_its_head(name, by_type) for name in architectures):
        family = by_type
    if family is not None:
        return family
    got = ", ".join(architectures) or str(model_type)
    supported = [family.architecture for family in known]
    other_head = f", a {model_type!r} with another head than {by_type.architecture}'s" if by_type else ""
    raise UnsupportedModelError(
        f"{origin} describes {got}{other_head}, which tljax does not implement. Supported: {', '.join(supported)}."
        f"{nearest(got, supported)}"
    )


def _has_its_head(name: str, family: Family) -> bool:
    """Whether class ``name`` is a language model, or the bare model of ``family``, whose head may be tied."""
    stem = family.architecture.lower()
    bare = next(stem.removesuffix(end) for end in _GENERATE if stem.endswith(end)) + "model"
    ends = _GENERATE if family.tower is not None else _GENERATE[:-1]
    return name.lower().endswith(ends) or name.lower() == bare
