"""Where a dictionary goes in a model: from what a user gives to a :class:`~tljax.hooks.splices.Splice`, or an error."""

import dataclasses
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from tljax.checks import is_traced
from tljax.config import HookedTransformerConfig
from tljax.dictionaries import Crosscoder, CrossLayerTranscoder, Dictionary, fit_to
from tljax.dictionaries.fitting import is_of_another_model
from tljax.errors import DictionaryError
from tljax.hooks.names import is_act_tuple, resolve
from tljax.hooks.points import EMBEDDING, HEAD, HookPointSpec, point_table, stage_of
from tljax.splice import ErrorTerm, Gradient, Splice
from tljax.text.warned import level_of_caller

if TYPE_CHECKING:
    from tljax.model.hooked_transformer import HookedTransformer

_WIDTHS = ("d_model", "neuron", "latent", "all_heads", "d_head")
"""Axes that a dictionary can read, each alone or after an axis of heads."""


class UnfittedWarning(UserWarning):
    """Warning that a spliced dictionary was trained on activations that the model does not have at its point."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpliceOptions:
    """How dictionaries are spliced in, as :meth:`~tljax.HookedTransformer.with_dictionaries` takes it."""

    error: ErrorTerm
    gradient: Gradient
    skip: bool
    exclude_tokens: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Place:
    """The points that a dictionary reads and writes, as rows of the hook table."""

    reads: HookPointSpec
    writes: HookPointSpec


def given_pairs(given: Any) -> list[tuple[Any, Any]]:
    """Returns what a user passed as dictionaries as pairs of a place (``None``: the dictionary's own) and a dictionary.

    Raises:
        DictionaryError: it is neither a mapping nor dictionaries.
    """
    if isinstance(given, Mapping):
        return list(given.items())
    if isinstance(given, Dictionary | Crosscoder | CrossLayerTranscoder):
        return [(None, given)]
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise DictionaryError(
            f"Dictionaries are given as {{name of a hook point: dictionary}}, or in a list if they know their points; "
            f"got {type(given).__name__}."
        )
    return [(None, one) for one in given]


def splice_of(
    model: "HookedTransformer", where: Any, dictionary: Any, options: SpliceOptions
) -> tuple[Splice, Dictionary]:
    """Returns the facts of a dictionary at its place in a model, and the dictionary as it computes there.

    Args:
        model: the model, without dictionaries.
        where: name of the point, a pair of names (read, written), or ``None`` for the dictionary's own.
        dictionary: the dictionary.
        options: how it is spliced in.

    Raises:
        DictionaryError: it does not fit there, or cannot be spliced.
        UnknownHookError: the model has no such point.

    Warns:
        UnfittedWarning: the dictionary was trained on activations that this model does not have there.
    """
    cfg, checked = model.cfg, _checked(dictionary, where)
    place = _place(cfg, where, checked)
    checked = _at(place, checked)
    for row in (place.reads, place.writes):
        _check_row(row)
    tap = checked.cfg.tap
    head = tap.head if len(place.writes.axes) == 4 else None
    merged = _merges(place.reads, checked.cfg.d_in, head)
    _check_width(cfg, place.reads, checked.cfg.d_in, head, merged, "encodes")
    _check_width(cfg, place.writes, checked.cfg.output_width, head, merged, "reconstructs")
    splice = Splice(
        reads=place.reads.name,
        writes=place.writes.name,
        d_in=checked.cfg.d_in,
        d_out=checked.cfg.output_width,
        d_sae=checked.cfg.d_sae,
        dtype=str(checked.dtype),
        acts_pre=checked.cfg.architecture != "matching_pursuit",
        merged_heads=merged,
        head=head,
        error=options.error,
        gradient=options.gradient,
        skip=options.skip and "W_skip" in checked.params,
        exclude_tokens=options.exclude_tokens,
        reads_every=place.reads.every_token,
        writes_every=place.writes.every_token,
        source=checked.cfg,
    )
    _check_tap(model, checked)
    computing = dataclasses.replace(checked.cfg, tap=dataclasses.replace(tap, merged_heads=merged)).computation
    return splice, Dictionary.tree_unflatten(computing, (checked.params, None))


def _checked(dictionary: Any, where: Any) -> Dictionary:
    if isinstance(dictionary, Crosscoder):
        raise DictionaryError(
            "A crosscoder reads several layers or models at once, so it has no one place in a model and cannot be "
            "spliced in. Encode activations with it, crosscoder.encode(...), and steer by its decoder: "
            "model.run_with_hooks(..., fwd_hooks=[(name, tljax.Add(direction))])."
        )
    if isinstance(dictionary, CrossLayerTranscoder):
        raise DictionaryError(
            "A cross-layer transcoder writes to later layers than it reads, and a splice reads and writes in one "
            "block. Its features of a run are transcoder.encode(...), its reconstruction transcoder.decode(...): put "
            "that in place with tljax.Replace at hook_mlp_out."
        )
    if not isinstance(dictionary, Dictionary):
        named = "" if where is None else f" at {where!r}"
        raise DictionaryError(
            f"Expected a tljax.dictionaries.Dictionary{named}, got {type(dictionary).__name__}. "
            "Dictionary.from_pretrained(directory) reads one; Dictionary(params, cfg) makes one of arrays."
        )
    architecture = dictionary.cfg.architecture
    if architecture == "temporal":
        raise DictionaryError(
            "A temporal dictionary's features depend on the whole text before a token, and runs that compute a part of "
            "the tokens (generation, sweeps) have no such text. Splice by hand in a plain run: fwd_hooks=[(name, "
            "lambda activation, hook: dictionary.forward(activation))]."
        )
    if architecture == "batchtopk":
        raise DictionaryError(
            "batchtopk selects features over the whole batch, so that one prompt's activations would depend on the "
            'others. For inference use its threshold: architecture="jumprelu" with params["threshold"], as '
            "training saves it."
        )
    if dictionary.W_dec.ndim != 2:
        raise DictionaryError(
            f"{dictionary!r} is a stack, W_dec of shape {dictionary.W_dec.shape}: splice one of them in, or all with "
            "jax.vmap over the stack."
        )
    if not is_traced(dictionary.params):
        for name, array in dictionary.params.items():
            if not bool(jnp.isfinite(array).all()):
                raise DictionaryError(
                    f"{dictionary!r} has {name} with numbers that are not finite: its file is damaged, or its training "
                    "diverged."
                )
    return dictionary


def _place(cfg: HookedTransformerConfig, where: Any, dictionary: Dictionary) -> Place:
    tap, table = dictionary.cfg.tap, point_table(cfg)

    def row(name: Any) -> HookPointSpec:
        return table[resolve(name, table, cfg.n_layers)]

    if isinstance(where, tuple) and len(where) == 2 and not is_act_tuple(where):
        place = Place(row(where[0]), row(where[1]))
    elif where is None:
        if tap.reads is None:
            raise DictionaryError(
                f"{dictionary!r} does not know its hook point. Say it: "
                'with_dictionaries({"blocks.8.hook_resid_pre": dictionary}).'
            )
        place = Place(row(tap.reads), row(tap.writes or tap.reads))
    elif not dictionary.cfg.transcoder:
        place = Place(row(where), row(where))
    else:
        named = row(where)
        if tap.reads is None or tap.writes is None or named not in (row(tap.reads), row(tap.writes)):
            raise DictionaryError(
                f"A transcoder reads one point and writes another, and {where!r} names one alone. Give both: "
                '{("blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"): transcoder}.'
            )
        place = Place(row(tap.reads), row(tap.writes))
    if place.reads != place.writes and not dictionary.cfg.transcoder:
        raise DictionaryError(
            f"{dictionary!r} reconstructs what it reads and is given two points, {place.reads.name} and "
            f"{place.writes.name}. Give it one; a transcoder has transcoder=True in its config."
        )
    _check_order(cfg, place)
    return place


def _at(place: Place, dictionary: Dictionary) -> Dictionary:
    """Returns the dictionary with its place in its tap."""
    writes = None if place.reads == place.writes else place.writes.name
    tap = dictionary.cfg.tap.replace(reads=place.reads.name, writes=writes)
    return with_config(dictionary, dictionary.cfg.replace(tap=tap))


def with_config(dictionary: Dictionary, cfg: Any) -> Dictionary:
    """Returns a dictionary with another config, unchecked: its arrays may be anything that goes through a trace."""
    return Dictionary.tree_unflatten(cfg, (dictionary.params, dictionary.sparsity))


def _check_tap(model: "HookedTransformer", dictionary: Dictionary) -> None:
    """Checks what the dictionary says of its model and of the activations that it was trained on.

    Raises:
        DictionaryError: it is of another model.

    Warns:
        UnfittedWarning: the activations are not those that it was trained on.
    """
    tap = dictionary.cfg.tap
    if is_of_another_model(tap.model_name, model.cfg.model_name):
        raise DictionaryError(
            f"The dictionary is of {tap.model_name}, and this model is {model.cfg.model_name}. For a model that was "
            "finetuned from its own: fit_to(dictionary, model, any_model=True), then splice in what that returns."
        )
    if is_traced(dictionary.params, model.params) or (tap.processing is None and tap.gain is None):
        return
    if dictionary.cfg.transcoder and tap.writes is None:
        tap = tap.replace(writes=tap.reads)
    try:
        fitted = fit_to(with_config(dictionary, dictionary.cfg.replace(tap=tap)), model, any_model=True)
    except DictionaryError as error:
        problem = str(error)
    else:
        same = all(fitted.params[name] is array for name, array in dictionary.params.items())
        if same and fitted.cfg.computation == dictionary.cfg.computation and fitted.cfg.tap.reads == tap.reads:
            return
        problem = (
            f"The dictionary at {tap.reads} was trained on other activations than this model has there (processed "
            "weights, or a norm's gain). fit_to(dictionary, model) converts it."
        )
    warnings.warn(problem, UnfittedWarning, stacklevel=level_of_caller())


def _check_order(cfg: HookedTransformerConfig, place: Place) -> None:
    (stage, _), (other, _) = stage_of(place.reads.name), stage_of(place.writes.name)
    if HEAD in (stage, other):
        raise DictionaryError(
            f"{place.writes.name} is after the last block, where sweeps and metrics unembed by themselves: a "
            f"dictionary cannot sit there. The last point for one is blocks.{cfg.n_layers - 1}.hook_resid_post."
        )
    if stage != other:
        raise DictionaryError(
            f"The dictionary reads {place.reads.name} and writes {place.writes.name}: a splice reads and writes in one "
            "block. The residual stream that leaves one block is the one that enters the next, so hook_resid_post of "
            "one may be read as hook_resid_pre of the next."
        )
    names = list(point_table(cfg))
    if names.index(place.reads.name) > names.index(place.writes.name):
        raise DictionaryError(
            f"The dictionary reads {place.reads.name}, which is computed after {place.writes.name}, which it writes."
        )
    if stage == EMBEDDING and place.reads != place.writes:
        raise DictionaryError("At the embedding a dictionary reads and writes one point: there is no transcoder there.")


def _check_row(row: HookPointSpec) -> None:
    lead, trailing = row.axes[:2], row.axes[2:]
    has_vector = trailing[-1:] and trailing[-1] in _WIDTHS and len(trailing) <= 2
    per_head = len(trailing) == 2
    if lead != ("batch", "pos") or not has_vector or (per_head and trailing != ("head", "d_head")):
        raise DictionaryError(
            f"{row.name} has axes {row.axes}: a dictionary reads one vector a token, or one for each head."
        )
    if row.asks_for != "shared" or row.read_by:
        raise DictionaryError(
            f"{row.name} may be computed apart for queries, keys and values, so no dictionary can be spliced in there. "
            "Splice at hook_resid_pre (with the norm's weight folded into the encoder), at attn.hook_z or at "
            "hook_attn_out."
        )


def _merges(row: HookPointSpec, d_in: int, head: int | None) -> bool:
    sizes = row.shape()[2:]
    return head is None and len(sizes) == 2 and sizes[0] * sizes[1] == d_in


def _check_width(
    cfg: HookedTransformerConfig, row: HookPointSpec, width: int, head: int | None, merged: bool, verb: str
) -> None:
    sizes = row.shape()[2:]
    if head is not None and not 0 <= head < sizes[0]:
        raise DictionaryError(
            f"The dictionary belongs to head {head}; {row.name} has {sizes[0]} heads, 0 to {sizes[0] - 1}."
        )
    expected = sizes[0] * sizes[1] if merged else sizes[-1]
    apart = len(sizes) == 2 and head is None and not merged
    if expected == width and not apart:
        return
    prefix = stage_of(row.name)[0]
    names = [name for name in point_table(cfg) if stage_of(name)[0] == prefix and _takes(point_table(cfg)[name], width)]
    where = f" In this layer it would fit {', '.join(names[:6])}." if names else " No point of this layer has it."
    raise DictionaryError(
        f"The dictionary {verb} vectors of width {width}, and {row.name} has "
        + (f"{sizes[0]} heads of {sizes[1]}, {sizes[0] * sizes[1]} together." if len(sizes) == 2 else f"{sizes[-1]}.")
        + where
    )


def _takes(row: HookPointSpec, width: int) -> bool:
    try:
        _check_row(row)
    except DictionaryError:
        return False
    sizes = row.shape()[2:]
    return (sizes[0] * sizes[1] if len(sizes) == 2 else sizes[0]) == width


def excluded_tokens(given: Any, cfg: HookedTransformerConfig, special: Iterable[int] | None) -> tuple[int, ...]:
    """Reads ``exclude_tokens=``: ids, ``"special"`` for the tokenizer's, or ``None``.

    Raises:
        DictionaryError: these are not ids of tokens, or there is no tokenizer to ask.
    """
    if given is None:
        return ()
    if isinstance(given, str):
        if given != "special":
            raise DictionaryError(f'exclude_tokens={given!r} must be token ids, or "special".')
        if special is None:
            raise DictionaryError('exclude_tokens="special" asks the tokenizer, and the model has none: give ids.')
        return tuple(sorted(special))
    ids = np.atleast_1d(np.asarray(given))
    if not ids.size:
        return ()
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= cfg.d_vocab:
        raise DictionaryError(
            f"exclude_tokens={given!r} must be ids of tokens, whole numbers from 0 to {cfg.d_vocab - 1}."
        )
    return tuple(sorted({int(one) for one in ids}))
