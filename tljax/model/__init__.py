"""``HookedTransformer``, with its methods, its losses and the views of its parts."""

from tljax.model.hooked_transformer import HookedTransformer
from tljax.model.losses import lm_accuracy, lm_cross_entropy_loss
from tljax.model.running import Output

__all__ = [
    "HookedTransformer",
    "Output",
    "lm_accuracy",
    "lm_cross_entropy_loss",
]
