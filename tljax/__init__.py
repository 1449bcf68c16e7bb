"""tljax: TransformerLens for JAX. Load a transformer, name any activation, read it, change it, differentiate."""

from tljax.cache.activation_cache import ActivationCache
from tljax.cache.memory import LargeCacheWarning
from tljax.config import HookedTransformerConfig
from tljax.hooked_transformer import HookedTransformer, UnusedHooksWarning
from tljax.hooks.dictionary import HookDictionary
from tljax.hooks.interventions import (
    Add,
    Chain,
    Intervention,
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
from tljax.losses import lm_accuracy, lm_cross_entropy_loss
from tljax.running import Output
from tljax.text.tokens import TruncationWarning

__version__ = "0.1.0"

__all__ = [
    "ActivationCache",
    "Add",
    "Chain",
    "HookDictionary",
    "HookPoint",
    "HookedTransformer",
    "HookedTransformerConfig",
    "Intervention",
    "LargeCacheWarning",
    "Mean",
    "Noise",
    "Output",
    "Project",
    "ProjectOut",
    "Replace",
    "Scale",
    "TruncationWarning",
    "UnusedHooksWarning",
    "Zero",
    "get_act_name",
    "hook",
    "lm_accuracy",
    "lm_cross_entropy_loss",
    "load_interventions",
    "run_module_with_hooks",
    "save_interventions",
]
