"""A check that a dictionary explains the activations of its site, on prompts."""

import dataclasses
import json
from typing import TYPE_CHECKING, Any, Literal

import jax.numpy as jnp
import numpy as np

from tljax.checks import typed
from tljax.errors import DictionaryError

if TYPE_CHECKING:
    from tljax.dictionaries.dictionary import Dictionary
    from tljax.model.hooked_transformer import HookedTransformer

_FEWEST = 8
"""Tokens below which the check says nothing."""
_WORST = 0.9
_FACTOR = 3.0


@dataclasses.dataclass(frozen=True)
class Check:
    """What a dictionary does on prompts.

    Attributes:
        fvu: fraction of variance unexplained, ``sum |y - y_hat|^2 / sum |y - mean y|^2`` over all tokens.
        l0: active features for each token, on average.
        tokens: number of tokens.
    """

    fvu: float
    l0: float
    tokens: int


@typed
def check_dictionary(
    dictionary: "Dictionary",
    model: "HookedTransformer",
    prompt: Any,
    *,
    l0: float | None = None,
    on_failure: Literal["error", "return"] = "error",
) -> Check:
    """Measures whether a dictionary explains the activations of its site, and refuses one that does not.

    Wrong sites, layers and processing, wrong orientations of square matrices and wrong scales all show here. The first
    token of each prompt is left out: its activations are unlike all others in most models.

    Args:
        dictionary: the dictionary, fitted to the model: see :func:`fit_to`.
        model: the model.
        prompt: texts or tokens, at least 8 tokens beside the first of each prompt.
        l0: active features for each token as published; by default what its release states, if it does.
        on_failure: ``"return"`` returns the figures whatever they are.

    Raises:
        DictionaryError: the FVU is above 0.9; no feature is active; or ``l0`` is missed by more than three times.
    """
    tap = dictionary.cfg.tap
    if tap.reads is None:
        raise DictionaryError("The dictionary does not say which point it reads: fit_to(dictionary, model, reads=...).")
    names = [name for name in (tap.reads, tap.writes) if name is not None]
    _, cache = model.run_with_cache(prompt, return_type=None, names_filter=names)
    read, wanted = (_headless(cache[name], tap.head) for name in (names[0], names[-1]))
    found = dictionary(read)
    texts = np.ones(read.shape[:2], bool) if cache.token_mask is None else np.array(cache.token_mask)
    texts[np.arange(len(texts)), texts.argmax(axis=1)] = False
    if (tokens := int(texts.sum())) < _FEWEST:
        raise DictionaryError(f"prompt= holds {tokens} tokens beside the first of each; the check needs {_FEWEST}.")
    y, y_hat = (np.asarray(one, np.float64).reshape(*texts.shape, -1)[texts] for one in (wanted, found.reconstruction))
    check = Check(
        fvu=float(np.square(y - y_hat).sum() / max(np.square(y - y.mean(axis=0)).sum(), 1e-30)),
        l0=float((np.asarray(found.features)[texts] != 0).sum(axis=-1).mean()),
        tokens=tokens,
    )
    stated = dict(dictionary.cfg.metadata).get("l0") if l0 is None else json.dumps(l0)
    problem = _problem(check, None if stated is None else float(json.loads(stated)))
    if problem is not None and on_failure == "error":
        raise DictionaryError(
            f"{dictionary!r} does not explain this model's activations on {tokens} tokens: {problem} Likely causes: "
            "another site or layer, other weight processing (model.processing), a transposed square matrix, or "
            "activations that were scaled in training."
        )
    return check


def _headless(activations: Any, head: int | None) -> Any:
    return activations if head is None else jnp.asarray(activations)[..., head, :]


def _problem(check: Check, stated: float | None) -> str | None:
    if not check.fvu <= _WORST:
        return f"FVU {check.fvu:.3g}, more than {_WORST} of the variance is left over."
    if check.l0 == 0:
        return "no feature is active."
    if stated and not stated / _FACTOR <= check.l0 <= stated * _FACTOR:
        return f"{check.l0:.3g} features are active for each token, and {stated:g} are stated."
    return None
