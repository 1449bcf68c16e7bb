"""Training of dictionaries on harvested activations, or on what the model does with their reconstructions."""

from tljax.dictionaries.training.config import TrainingConfig
from tljax.dictionaries.training.end_to_end import train_dictionary_end_to_end
from tljax.dictionaries.training.gradients import Losses, dictionary_loss
from tljax.dictionaries.training.initial import initial_parameters
from tljax.dictionaries.training.loop import TrainingResult
from tljax.dictionaries.training.preparation import Preparation, prepare
from tljax.dictionaries.training.trainer import train_dictionaries, train_dictionary

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
    "train_dictionary_end_to_end",
]
