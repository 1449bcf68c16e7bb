"""Dictionaries: sparse autoencoders, transcoders, crosscoders and cross-layer transcoders."""

from tljax.dictionaries.checking import Check, check_dictionary
from tljax.dictionaries.cross_layer import CrossLayerTranscoder
from tljax.dictionaries.crosscoder import Crosscoder
from tljax.dictionaries.dictionary import Dictionary, Reconstruction, TopFeatures
from tljax.dictionaries.fitting import UnknownModelWarning, fit_to
from tljax.dictionaries.folding import fold_activation_norm, fold_W_dec_norm, scale_biases
from tljax.dictionaries.formats.releases import releases, sae_ids
from tljax.dictionaries.loading import UnscaledDictionaryWarning
from tljax.dictionaries.maths.config import CrosscoderConfig, CrossLayerConfig, DictionaryConfig, Tap
from tljax.dictionaries.transcoder_sets import load_transcoders, save_transcoders, transcoder_sizes

SAE = Dictionary
"""SAELens's name."""

__all__ = [
    "SAE",
    "Check",
    "CrossLayerConfig",
    "CrossLayerTranscoder",
    "Crosscoder",
    "CrosscoderConfig",
    "Dictionary",
    "DictionaryConfig",
    "Reconstruction",
    "Tap",
    "TopFeatures",
    "UnknownModelWarning",
    "UnscaledDictionaryWarning",
    "check_dictionary",
    "fit_to",
    "fold_W_dec_norm",
    "fold_activation_norm",
    "load_transcoders",
    "releases",
    "sae_ids",
    "save_transcoders",
    "scale_biases",
    "transcoder_sizes",
]
