"""Dictionaries that tests make on the spot."""

from typing import Any

import numpy as np

from tljax.dictionaries import Dictionary, DictionaryConfig, Tap


def standard(W_enc: Any, W_dec: Any, b_enc: Any = None, **tap: Any) -> Dictionary:
    """A ReLU dictionary of given weights, with no decoder bias."""
    d_in, d_sae = np.shape(W_enc)
    params = {"W_enc": W_enc, "W_dec": W_dec, "b_enc": np.zeros(d_sae) if b_enc is None else b_enc}
    params["b_dec"] = np.zeros(d_in)
    cfg = DictionaryConfig(d_in=d_in, d_sae=d_sae, tap=Tap(**tap))
    return Dictionary({name: np.asarray(value, np.float32) for name, value in params.items()}, cfg)
