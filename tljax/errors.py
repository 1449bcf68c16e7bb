"""One named error for each mistake worth explaining.

Every message says what was given, what was expected, and what to do. Each class also derives from the builtin
exception a caller would catch without knowing tljax (``KeyError`` for a name, ``ValueError`` for a value).
"""

import difflib
from collections.abc import Iterable


def nearest(name: str, options: Iterable[str], k: int = 3) -> str:
    """Returns `` Did you mean 'a' or 'b'?`` for the ``k`` closest options, or an empty string."""
    close = difflib.get_close_matches(name, list(options), n=k, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(match) for match in close)}?" if close else ""


class TljaxError(Exception):
    """Base class of every error tljax raises on purpose."""

    def __str__(self) -> str:  # KeyError would print the repr of its message
        return str(self.args[0]) if self.args else ""


class ConfigError(TljaxError, ValueError):
    """A configuration field is unknown, out of range, or contradicts another."""


class UnknownHookError(TljaxError, KeyError):
    """A hook name, alias or filter matches no hook point of this model."""


class HookError(TljaxError, ValueError):
    """A hook returned something that cannot stand in for the activation."""


class InterventionError(TljaxError, ValueError):
    """An intervention addresses an axis or an index its hook point does not have."""


class InputError(TljaxError, ValueError):
    """Tokens, text, masks or layer bounds that the model cannot run on."""


class ArgumentError(InputError, TypeError):
    """A call names an unknown argument, or gives a keyword-only argument by position."""


class AmbiguousHookError(UnknownHookError, InputError):
    """A hook name could mean several points of this model."""


class TokenizerError(TljaxError, ValueError):
    """Text that does not tokenize as asked, or a model without a tokenizer."""


class CheckpointError(TljaxError, ValueError):
    """A checkpoint is incomplete, damaged, or disagrees with its own config."""


class UnsupportedModelError(TljaxError, ValueError):
    """An architecture, a config attribute or a storage format that tljax does not implement."""


class GenerationError(TljaxError, ArithmeticError):
    """Generation cannot go on: the next token has no usable logits, or the chosen token cannot be fed back."""


class CacheError(TljaxError, ValueError):
    """A cache was asked for something it does not hold."""


class DictionaryError(TljaxError, ValueError):
    """A dictionary (sparse autoencoder, transcoder) that is damaged, or does not fit what it is used on."""


class ShardingError(InputError):
    """A mesh, rules for it, or arrays on it that do not fit each other or this machine."""


class QuantizationError(TljaxError, ValueError):
    """Weights that cannot be quantised so, or quantised weights where floats are needed, as for their derivatives."""


class OffloadError(InputError):
    """Something that a model whose blocks stay on the host cannot do."""


class HarvestError(TljaxError, ValueError):
    """Activations that cannot be stored, or a store of them that is incomplete, damaged or of something else."""


class TrainingError(TljaxError, ArithmeticError):
    """Training failed in a way that more steps would not fix."""


class MissingAttributeError(TljaxError, AttributeError):
    """An attribute that does not exist, perhaps of TransformerLens or torch; the message says what to write instead."""


class FrozenModelError(TljaxError, AttributeError):
    """Something tried to change a model in place."""
