"""The metrics of one run: where in the logits they read, with positions counted in the text of padded prompts."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from tljax.checks import is_traced
from tljax.model.metrics import InText, Metric, ReadsOnePosition, metrics_by_name
from tljax.text.inputs import ModelInput


@dataclasses.dataclass(frozen=True)
class Measured:
    """The metrics of a run, by name, as they are evaluated on its logits.

    Attributes:
        metrics: the metrics, their positions counted in the text.
        several: whether they were given by name.
        text: the run's padding mask, if a metric may read padding.
        places: the positions that they read, one for each of them, ``[batch, metric]``; ``None`` means all positions.
    """

    metrics: dict[str, Metric]
    several: bool
    text: Any
    places: np.ndarray | None

    @classmethod
    def of(cls, metric: Any, prepared: ModelInput, head_is_named: bool) -> "Measured":
        """Reads what was given as ``metric=``. Logits are cut to what is read, unless the head's points are used."""
        metrics, several = metrics_by_name(metric)
        text = prepared.text
        if text is not None:
            metrics = {name: one.in_text(text) if isinstance(one, InText) else one for name, one in metrics.items()}
        places = None if head_is_named else _places(list(metrics.values()), *prepared.batch_and_pos)
        if places is None:
            return cls(metrics, several, text, None)
        return cls({name: _alone(one, n) for n, (name, one) in enumerate(metrics.items())}, several, None, places)

    def by_name(self, values: Mapping[str, Any]) -> Any:
        """Returns values by the metrics' names as the caller gave these: a dict, or the only one."""
        return dict(values) if self.several else values[""]


def _places(metrics: Sequence[Metric], batch: int, pos: int) -> np.ndarray | None:
    """Returns the position of each prompt that each metric reads ``[batch, metric]``, if each reads a known one."""
    read = []
    for metric in metrics:
        if not isinstance(metric, ReadsOnePosition) or metric.read_at is None or is_traced(metric.read_at):
            return None
        places = np.asarray(metric.read_at)
        if places.shape not in ((), (batch,)) or ((places < -pos) | (places >= pos)).any():
            return None  # on all logits the metric says what is wrong
        read.append(np.broadcast_to(places % pos, (batch,)))
    return np.stack(read, axis=1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _AtPlace:
    """A metric that reads one of the positions that were kept."""

    metric: Any
    place: int = dataclasses.field(metadata={"static": True})

    def __call__(self, logits: Any) -> Any:
        return self.metric(logits[:, self.place : self.place + 1])


def _alone(metric: Any, place: int) -> Metric:
    return _AtPlace(metric.of_one_position(), place)
