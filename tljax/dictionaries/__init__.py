"""Dictionaries: sparse autoencoders, transcoders, crosscoders and cross-layer transcoders."""

from tljax.dictionaries.cross_layer import CrossLayerTranscoder
from tljax.dictionaries.crosscoder import Crosscoder
from tljax.dictionaries.dictionary import Dictionary, Reconstruction, TopFeatures
from tljax.dictionaries.folding import fold_activation_norm, fold_W_dec_norm, scale_biases
from tljax.dictionaries.maths.config import CrosscoderConfig, CrossLayerConfig, DictionaryConfig, Tap

__all__ = [
    "CrossLayerConfig",
    "CrossLayerTranscoder",
    "Crosscoder",
    "CrosscoderConfig",
    "Dictionary",
    "DictionaryConfig",
    "Reconstruction",
    "Tap",
    "TopFeatures",
    "fold_W_dec_norm",
    "fold_activation_norm",
    "scale_biases",
]
