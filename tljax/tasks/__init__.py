"""Tasks: prompts with corruptions, answers and labelled positions, generated offline or read from public files."""

from tljax.tasks.behaviour import Behaviour
from tljax.tasks.files.faithfulness import load_faithfulness
from tljax.tasks.files.mib import load_mib
from tljax.tasks.files.pairs import load_ravel, load_sfc
from tljax.tasks.generators.agreement import subject_verb_agreement
from tljax.tasks.generators.docstring import docstring
from tljax.tasks.generators.facts import capitals, hypernymy
from tljax.tasks.generators.gender import gender_bias, gendered_pronouns
from tljax.tasks.generators.induction import induction
from tljax.tasks.generators.ioi import ioi
from tljax.tasks.generators.numbers import arithmetic, greater_than
from tljax.tasks.generators.questions import coloured_objects, mcqa
from tljax.tasks.prompts import DroppedPromptsWarning, from_prompts
from tljax.tasks.task import Task

__all__ = [
    "Behaviour",
    "DroppedPromptsWarning",
    "Task",
    "arithmetic",
    "capitals",
    "coloured_objects",
    "docstring",
    "from_prompts",
    "gender_bias",
    "gendered_pronouns",
    "greater_than",
    "hypernymy",
    "induction",
    "ioi",
    "load_faithfulness",
    "load_mib",
    "load_ravel",
    "load_sfc",
    "mcqa",
    "subject_verb_agreement",
]
