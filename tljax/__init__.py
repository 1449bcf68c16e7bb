"""tljax: TransformerLens for JAX. Load a transformer, name any activation, read it, change it, differentiate."""

import importlib
from typing import TYPE_CHECKING, Any

from tljax.cache.activation_cache import ActivationCache
from tljax.cache.derivative_cache import DerivativeCache
from tljax.cache.memory import LargeCacheWarning
from tljax.config import HookedTransformerConfig
from tljax.elsewhere import PACKAGE, missing
from tljax.generation.key_values import HookedTransformerKeyValueCache, KeyValueCache
from tljax.generation.methods import GenerateOutput
from tljax.generation.sampling import sample_logits
from tljax.hooks.dictionary import HookDictionary, UnusedHooksWarning
from tljax.hooks.intervention import Intervention
from tljax.hooks.interventions import (
    Add,
    Chain,
    Mean,
    Noise,
    Project,
    ProjectOut,
    Replace,
    Scale,
    Zero,
)
from tljax.hooks.names import get_act_name
from tljax.hooks.point import HookPoint, hook, run_module_with_hooks
from tljax.hooks.saving import load_interventions, save_interventions
from tljax.model.derivatives import GradOutput, HVPOutput, JVPOutput
from tljax.model.hooked_transformer import HookedTransformer
from tljax.model.losses import lm_accuracy, lm_cross_entropy_loss
from tljax.model.metrics import ZeroGradientWarning
from tljax.model.running import Output
from tljax.text.batch import Batch
from tljax.text.warned import DoubledBosWarning, PaddingWarning, TruncationWarning
from tljax.weights.factored_matrix import FactoredMatrix

if TYPE_CHECKING:
    from tljax.dictionaries import SAE
    from tljax.planning import plan

__version__ = "0.1.0"

__all__ = [
    "SAE",
    "ActivationCache",
    "Add",
    "Batch",
    "Chain",
    "DerivativeCache",
    "DoubledBosWarning",
    "FactoredMatrix",
    "GenerateOutput",
    "GradOutput",
    "HVPOutput",
    "HookDictionary",
    "HookPoint",
    "HookedTransformer",
    "HookedTransformerConfig",
    "HookedTransformerKeyValueCache",
    "Intervention",
    "JVPOutput",
    "KeyValueCache",
    "LargeCacheWarning",
    "Mean",
    "Noise",
    "Output",
    "PaddingWarning",
    "Project",
    "ProjectOut",
    "Replace",
    "Scale",
    "TruncationWarning",
    "UnusedHooksWarning",
    "Zero",
    "ZeroGradientWarning",
    "get_act_name",
    "hook",
    "lm_accuracy",
    "lm_cross_entropy_loss",
    "load_interventions",
    "plan",
    "run_module_with_hooks",
    "sample_logits",
    "save_interventions",
]

_ROOMS = (
    "analysis",
    "attribution",
    "cache",
    "checkpoints",
    "circuits",
    "dictionaries",
    "errors",
    "generation",
    "harvest",
    "hooks",
    "interchange",
    "patching",
    "planning",
    "scale",
    "tasks",
    "text",
    "train",
    "utils",
    "viz",
    "weights",
)
"""Public packages. Those that ``import tljax`` does not load are imported on first access."""


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"tljax.{name}")
    if name == "SAE":  # not imported with the package, which does not need it
        return importlib.import_module("tljax.dictionaries").SAE
    if name == "plan":
        return importlib.import_module("tljax.planning").plan
    raise missing("tljax", name, PACKAGE, [*__all__, *_ROOMS])


def __dir__() -> list[str]:
    return ["__version__", *__all__, *_ROOMS]
