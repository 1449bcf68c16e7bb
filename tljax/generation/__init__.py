"""Continuing texts: prompts, decoding with a key-value cache, sampling."""

from tljax.generation.methods import GenerateOutput
from tljax.generation.key_values import HookedTransformerKeyValueCache, KeyValueCache
from tljax.generation.sampling import sample_logits

__all__ = [
    "GenerateOutput",
    "HookedTransformerKeyValueCache",
    "KeyValueCache",
    "sample_logits",
]
