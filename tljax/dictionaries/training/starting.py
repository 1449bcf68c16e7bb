"""What training starts from, as a user gives it: parameters, or a dictionary to go on from."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tljax.dictionaries.dictionary import Dictionary
from tljax.dictionaries.training.config import TrainingConfig
from tljax.dictionaries.training.initial import initial_parameters
from tljax.errors import InputError

_SHARED = ("d_in", "d_sae", "output_width", "transcoder", "apply_b_dec_to_input")
"""Fields of a dictionary's config that have to be those of the training."""


def starting_parameters(start: Any, cfg: TrainingConfig) -> tuple[dict[str, jax.Array], float]:
    """Returns float32 parameters to start from, none if ``start`` gives none, and the threshold of ``batchtopk``.

    Args:
        start: a mapping of parameters in units of training, with ``topk_threshold`` among them or not; a
            :class:`~tljax.dictionaries.Dictionary` for raw activations; or ``None``.
        cfg: the settings.

    Raises:
        InputError: it does not fit the settings; says what differs.
    """
    if start is None:
        return {}, 0.0
    if isinstance(start, Dictionary):
        return _of_dictionary(start, cfg)
    if not isinstance(start, Mapping):
        raise InputError(f"start must be a Dictionary or a mapping of parameters, got {type(start).__name__}.")
    given = dict(start)
    threshold = given.pop("topk_threshold", 0.0)
    return (_checked(given, cfg) if given else {}), threshold


def _of_dictionary(start: Dictionary, cfg: TrainingConfig) -> tuple[dict[str, jax.Array], float]:
    """Returns a dictionary's parameters; a ``jumprelu`` one with one threshold may go on as ``batchtopk``."""
    there, here = start.cfg, cfg.dictionary_config()
    differ = [f"{name} is {getattr(there, name)!r}, not {getattr(here, name)!r}"
              for name in _SHARED if getattr(there, name) != getattr(here, name)]  # fmt: skip
    if cfg.normalize_activations in ("expected_average_only_in", "covariance_whitening"):
        raise InputError(
            f'start is a dictionary of raw activations, and normalize_activations="{cfg.normalize_activations}" would '
            'give it scaled ones. Leave that out of the config: normalize_activations="none".'
        )
    if there.normalize_activations != here.normalize_activations:
        differ.append(f"normalize_activations is {there.normalize_activations!r}, not {here.normalize_activations!r}")
    params, threshold = dict(start.params), 0.0
    from_jumprelu = there.architecture == "jumprelu" and cfg.architecture == "batchtopk"
    if from_jumprelu:
        threshold = float(np.median(np.asarray(params.pop("threshold"), np.float32)))
    elif there.architecture != cfg.architecture:
        differ.append(f"architecture is {there.architecture!r}, not {cfg.architecture!r}")
    elif there.rescale_acts_by_decoder_norm != here.rescale_acts_by_decoder_norm and not _has_unit_rows(start):
        differ.append(f"rescale_acts_by_decoder_norm is {there.rescale_acts_by_decoder_norm}")
    if differ:
        raise InputError(
            f"{start!r}, to start from, does not fit the config: {'; '.join(differ)}. TrainingConfig.of(dictionary) "
            "makes a config that fits."
        )
    return _checked(params, cfg), threshold


def _has_unit_rows(dictionary: Dictionary) -> bool:
    return bool(jnp.allclose(dictionary.decoder_norms, 1, atol=1e-3))


def _checked(params: Any, cfg: TrainingConfig) -> dict[str, jax.Array]:
    expected = jax.eval_shape(lambda: initial_parameters(cfg))
    given = {name: jnp.asarray(value, jnp.float32) for name, value in params.items()}
    wrong = [
        f"{name} is {list(given[name].shape) if name in given else 'missing'}, expected "
        f"{list(expected[name].shape) if name in expected else 'no such parameter'}"
        for name in sorted(given.keys() | expected.keys())
        if name not in given or name not in expected or given[name].shape != expected[name].shape
    ]
    if wrong:
        raise InputError(f"The parameters to start from do not fit the config: {'; '.join(wrong)}.")
    return given
