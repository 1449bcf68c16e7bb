"""Training of dictionaries on harvested activations."""

from tljax.dictionaries.training.config import TrainingConfig
from tljax.dictionaries.training.gradients import Losses, dictionary_loss
from tljax.dictionaries.training.initial import initial_parameters
from tljax.dictionaries.training.preparation import Preparation, prepare
from tljax.dictionaries.training.trainer import TrainingResult, train_dictionaries, train_dictionary

__all__ = [
    "Losses",
    "Preparation",
    "TrainingConfig",
    "TrainingResult",
    "dictionary_loss",
    "initial_parameters",
    "prepare",
    "train_dictionaries",
    "train_dictionary",
]
