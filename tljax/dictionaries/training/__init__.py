"""Training of dictionaries on harvested activations."""

from tljax.dictionaries.training.config import TrainingConfig
from tljax.dictionaries.training.gradients import Losses, dictionary_loss
from tljax.dictionaries.training.initial import initial_parameters

__all__ = ["Losses", "TrainingConfig", "dictionary_loss", "initial_parameters"]
