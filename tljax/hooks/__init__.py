"""Hook points, hooks and interventions."""

from tljax.hooks.dictionary import HookDictionary, UnusedHooksWarning
from tljax.hooks.intervention import Intervention
from tljax.hooks.interventions import Add, Chain, Mean, Noise, Project, ProjectOut, Replace, Scale, Zero
from tljax.hooks.listing import HookPointList
from tljax.hooks.names import get_act_name
from tljax.hooks.point import HookPoint, hook, run_module_with_hooks
from tljax.hooks.points import HookPointSpec
from tljax.hooks.saving import load_interventions, save_interventions

__all__ = [
    "Add",
    "Chain",
    "HookDictionary",
    "HookPoint",
    "HookPointList",
    "HookPointSpec",
    "Intervention",
    "Mean",
    "Noise",
    "Project",
    "ProjectOut",
    "Replace",
    "Scale",
    "UnusedHooksWarning",
    "Zero",
    "get_act_name",
    "hook",
    "load_interventions",
    "run_module_with_hooks",
    "save_interventions",
]
