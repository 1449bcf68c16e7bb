"""What every reader of dictionary files returns."""

import dataclasses
from typing import Any

import numpy as np

from tljax.dictionaries.maths.config import CrosscoderConfig, CrossLayerConfig, DictionaryConfig


@dataclasses.dataclass(frozen=True)
class Read:
    """A dictionary's files, read.

    Attributes:
        params: arrays by the names and in the orientation of :class:`~tljax.dictionaries.Dictionary` or
            :class:`~tljax.dictionaries.Crosscoder`; for a cross-layer transcoder one such mapping for each layer.
        cfg: what they compute, and where they belong.
        sparsity: ``[d_sae]``, log10 of how often each feature fires; ``None`` if the files do not say.
    """

    params: dict[str, np.ndarray] | tuple[dict[str, np.ndarray], ...]
    cfg: DictionaryConfig | CrosscoderConfig | CrossLayerConfig
    sparsity: Any = None
