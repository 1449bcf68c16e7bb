"""Text generation. The steps in order, each with the file that holds it::

text, tokens, messages or embeddings
  → methods      generate, generate_stream, generate_with_cache: the arguments
  → prompts      ids [batch, pos], padded on the left; stopping: the tokens and strings that end a text
  → answers      one generation, round by round
      → decoding     the prompt in one run, then a compiled loop over tokens
          hooks          interventions laid out over the whole text
          key_values     keys and values of the text so far
          few_rows       weight layouts for the matrix products of one token
          sampling       the next token by its logits; selection: without sorting them
  → answers      cut where they end, as text, tokens or embeddings
"""

from tljax.generation.key_values import HookedTransformerKeyValueCache, KeyValueCache
from tljax.generation.methods import GenerateOutput
from tljax.generation.sampling import sample_logits

__all__ = [
    "GenerateOutput",
    "HookedTransformerKeyValueCache",
    "KeyValueCache",
    "sample_logits",
]
