"""Activations of many prompts, to disk or to a buffer, and readers that shuffle them.

``harvest(model, prompts, points, directory)`` runs prompts once and stores the activations at any points;
``store.reader(batch_size)`` gives shuffled batches, each a function of the seed and the step. ``ActivationBuffer``
gives the same without a disk.
"""

from tljax.harvest.buffer import ActivationBuffer
from tljax.harvest.codes import CodeStore, FeatureActivations, harvest_codes
from tljax.harvest.estimate import HarvestEstimate, estimate_harvest
from tljax.harvest.harvest import harvest
from tljax.harvest.moments import Statistics
from tljax.harvest.reader import Reader
from tljax.harvest.store import ActivationStore, Example
from tljax.harvest.stored import StoredArray

__all__ = [
    "ActivationBuffer",
    "ActivationStore",
    "CodeStore",
    "Example",
    "FeatureActivations",
    "HarvestEstimate",
    "Reader",
    "Statistics",
    "StoredArray",
    "estimate_harvest",
    "harvest",
    "harvest_codes",
]
