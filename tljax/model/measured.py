"""The metrics of one run: evaluated on its logits, or on its final residual stream where all of them can be."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from tljax.config import HookedTransformerConfig
from tljax.model.metrics import InText, Metric, OfStream, ReadsStream, metrics_by_name
from tljax.modules.readout import Readout
from tljax.text.inputs import ModelInput


@dataclasses.dataclass(frozen=True)
class Measured:
    """The metrics of a run, by name, as they are evaluated on what the run returns.

    Attributes:
        metrics: the metrics, their positions counted in the text.
        several: whether they were given by name.
        text: the run's padding mask.
        on_stream: whether the metrics take the final residual stream ``[batch, pos, d_model]``, not the logits.
    """

    metrics: dict[str, Metric]
    several: bool
    text: Any
    on_stream: bool

    @classmethod
    def of(
        cls, metric: Any, prepared: ModelInput, cfg: HookedTransformerConfig, params: Any, head_is_named: bool
    ) -> "Measured":
        """Reads what was given as ``metric=``; it takes logits only if a metric or a named point needs them."""
        metrics, several = metrics_by_name(metric)
        text = prepared.text
        if text is not None:
            metrics = {name: one.in_text(text) if isinstance(one, InText) else one for name, one in metrics.items()}
        streamed = {name: one for name, one in metrics.items() if isinstance(one, ReadsStream) and one.reads_stream}
        if head_is_named or len(streamed) < len(metrics):
            return cls(metrics, several, text, False)
        readout = Readout.of(cfg, params)
        return cls({name: OfStream(one, readout) for name, one in streamed.items()}, several, text, True)

    def by_name(self, values: Mapping[str, Any]) -> Any:
        """Returns values by the metrics' names as the caller gave these: a dict, or the only one."""
        return dict(values) if self.several else values[""]
