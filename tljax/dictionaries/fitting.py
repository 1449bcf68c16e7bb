"""Fitting a dictionary to a model: its points, widths, name and weight processing, converted exactly or refused."""

import warnings
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from tljax.checkpoints.files.names import hub_id
from tljax.checks import typed
from tljax.dictionaries.conversions import moved, reading_uncentred, with_gain, writing_centred
from tljax.dictionaries.maths.config import Tap
from tljax.errors import CheckpointError, DictionaryError, UnknownHookError
from tljax.hooks.names import resolve
from tljax.hooks.points import HookPointSpec, layer_of, point_table, stage_of
from tljax.modules.norm import norm_gain
from tljax.quantized_weight import as_floats
from tljax.weights.steps import why_not

if TYPE_CHECKING:
    from tljax.dictionaries.dictionary import Dictionary
    from tljax.model.hooked_transformer import HookedTransformer

_CENTRED = (
    "hook_embed", "hook_pos_embed", "hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out",
    "hook_mlp_out", "hook_attn_in", "hook_mlp_in", "attn.hook_result",
)  # fmt: skip
"""Points, within their stage, whose activations ``center_writing_weights`` changes."""
_VALUES = ("attn.hook_v", "attn.hook_z")
"""Points whose activations ``fold_value_biases`` changes."""
_FACTORED = ("attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_z")
"""Points whose activations ``refactor_factored_attn_matrices`` changes altogether."""
_AFTER_GAIN = {"mlp.hook_in": "ln2"}
"""Points that are read after a norm's gain → the norm."""


class UnknownModelWarning(UserWarning):
    """A dictionary names a model by a name that is not known, so that it cannot be told from the one given."""


@typed
def fit_to(
    dictionary: "Dictionary",
    model: "HookedTransformer",
    *,
    reads: str | None = None,
    any_model: bool = False,
) -> "Dictionary":
    """Returns a dictionary in the terms of a model, or refuses it.

    The points exist, widths agree, the model is the one named, and the dictionary gives on the activations of *this*
    model, with its weight processing, the features that it gave on those it was trained on. Converted exactly:

    - heads ``[n_heads, d_head]`` are merged where the dictionary reads them as one vector;
    - a transcoder that reads after the gain of a norm (``mlp.hook_in``, or ``tap.gain=True``) is moved to
      ``ln2.hook_normalized`` by folding gain and bias into its encoder, with ``reads=`` that point;
    - a dictionary of centred residual activations on a model with raw weights: the mean passes by it;
    - a transcoder whose output was raw on a model with centred weights: its decoder is centred;
    - a dictionary of ``hook_z`` with folded value biases on a model that has them: they become part of its biases.

    What a model lacks cannot be made up (the mean of the residual stream, a folded gain or value bias): then the
    message says how to load it. Dictionaries that do not say their processing (``tap.processing=None``) are taken as
    they are; :func:`check_dictionary` tells.

    Args:
        dictionary: the dictionary.
        model: the model.
        reads: the point to read, where the tap does not say it, or another form of the tap's point.
        any_model: whether the dictionary may be of a model of another name, such as the base of a finetuned one.

    Raises:
        DictionaryError: the dictionary does not belong to this model, or not to it as it is processed.

    Warns:
        UnknownModelWarning: the names of the models differ, and one of them is not known.
    """
    _check_name(dictionary.cfg.tap.model_name, model.cfg.model_name, any_model)
    if dictionary.cfg.normalize_activations == "expected_average_only_in":
        raise DictionaryError(
            "This dictionary was trained on activations times a number that is not known "
            '(normalize_activations="expected_average_only_in"): pass norm_scaling_factor= to from_pretrained, or '
            "fold it, fold_activation_norm(dictionary, sqrt(d_in) / mean norm of the activations)."
        )
    dictionary = _named(dictionary, model, reads)
    dictionary = _with_widths(dictionary, model)
    dictionary = _processed(dictionary, model)
    if reads is not None and dictionary.cfg.tap.reads != resolve_point(reads, model):
        dictionary = _moved_before_gain(dictionary, model, resolve_point(reads, model))
    elif dictionary.cfg.tap.gain is not None:
        dictionary = _at_its_gain(dictionary, model)
    tap = dictionary.cfg.tap
    return _retapped(
        dictionary,
        processing=None if tap.processing is None else model.cfg.weight_processing,
        gain=tap.gain if stage_of(_reads(dictionary))[1] in _AFTER_GAIN else None,
        model_name=model.cfg.model_name,
    )


def resolve_point(name: str, model: "HookedTransformer") -> str:
    """Returns the model's full name of a hook point.

    Raises:
        DictionaryError: the model has no such point.
    """
    try:
        return resolve(name, point_table(model.cfg), model.cfg.n_layers)
    except UnknownHookError as error:
        raise DictionaryError(f"The dictionary's point {name!r} is none of this model: {error.args[0]}") from error


def is_of_another_model(named: str | None, own: str) -> bool:
    """Whether two names of models are both known, and not of the same one."""
    one, other = (None if name is None else _canonical(name) for name in (named, own))
    return one is not None and other is not None and one[1] and other[1] and one[0] != other[0]


def _check_name(named: str | None, own: str, any_model: bool) -> None:
    one, other = (None if name is None else _canonical(name) for name in (named, own))
    if any_model or one is None or other is None or one[0] == other[0]:
        return
    remedy = "any_model=True fits it all the same, as to a finetuned version of its model."
    if is_of_another_model(named, own):
        raise DictionaryError(f"The dictionary is of {named}, and this model is {own}. {remedy}")
    warnings.warn(
        f"The dictionary is of {named!r}, and this model is {own!r}: whether they are the same is not known. {remedy}",
        UnknownModelWarning,
        stacklevel=4,
    )


def _canonical(name: str) -> tuple[str, bool]:
    """Returns a model's name in one form for all its aliases, and whether it is a known one."""
    try:
        return hub_id(name).rpartition("/")[2].lower(), True
    except CheckpointError:
        return name.rpartition("/")[2].lower(), False


def _reads(dictionary: "Dictionary") -> str:
    assert dictionary.cfg.tap.reads is not None
    return dictionary.cfg.tap.reads


def _retapped(dictionary: "Dictionary", **changes: Any) -> "Dictionary":
    return dictionary.replace(cfg=dictionary.cfg.replace(tap=dictionary.cfg.tap.replace(**changes)))


def _named(dictionary: "Dictionary", model: "HookedTransformer", reads: str | None) -> "Dictionary":
    """Returns the dictionary with the model's names of its points."""
    tap = dictionary.cfg.tap
    if (where := tap.reads or reads) is None:
        raise DictionaryError(
            "The dictionary's files do not say which hook point it reads: say it, reads='blocks.8.hook_resid_pre'."
        )
    writes = tap.writes
    if dictionary.cfg.transcoder and writes is None:
        raise DictionaryError(
            "The transcoder's files do not say which hook point it writes: give it a tap that does, "
            "dictionary.replace(cfg=cfg.replace(tap=cfg.tap.replace(writes='blocks.8.hook_mlp_out')))."
        )
    full, out = resolve_point(where, model), None if writes is None else resolve_point(writes, model)
    if not dictionary.cfg.transcoder and out not in (None, full):
        raise DictionaryError(f"A dictionary that reads {full} and writes {out} is a transcoder: transcoder=True.")
    order = list(point_table(model.cfg))
    if out is not None and order.index(out) < order.index(full):
        raise DictionaryError(f"The transcoder would write {out}, which comes before what it reads, {full}.")
    return _retapped(dictionary, reads=full, writes=out)


def _with_widths(dictionary: "Dictionary", model: "HookedTransformer") -> "Dictionary":
    """Checks widths against the points'; returns the dictionary with heads merged where it reads them so."""
    cfg, table = dictionary.cfg, point_table(model.cfg)
    tap: Tap = cfg.tap
    for role, name, width in (("reads", tap.reads, cfg.d_in), ("writes", tap.writes, cfg.output_width)):
        if name is None:
            continue
        last, merged = _widths(table[name])
        if width == last and not (role == "reads" and tap.merged_heads and merged is not None):
            continue
        if width == merged and tap.head is None:
            dictionary = _retapped(dictionary, merged_heads=True) if role == "reads" else dictionary
            continue
        sizes = f"{last} wide" + (f", {merged} with heads merged" if merged is not None else "")
        raise DictionaryError(
            f"The dictionary {role} {width} numbers at {name}, and this model ({model.cfg.model_name}) is {sizes} "
            "there: it is a dictionary of another model or point."
        )
    return dictionary


def _widths(point: HookPointSpec) -> tuple[int, int | None]:
    """Returns the width of a point's last axis, and with heads merged, if it has heads."""
    *_, before, last = point.shape()
    return last, before * last if point.axes[-2] == "head" else None


def _processed(dictionary: "Dictionary", model: "HookedTransformer") -> "Dictionary":
    """Returns the dictionary for the model's own weight processing."""
    trained, name = dictionary.cfg.tap.processing, model.cfg.model_name
    if trained is None:
        return dictionary
    differs = {step for step in {*trained} ^ {*model.cfg.weight_processing} if not _never(step, model)}
    reads, writes = (
        None if one is None else stage_of(one)[1] for one in (_reads(dictionary), dictionary.cfg.tap.writes)
    )
    refusal = (
        f"The dictionary at {_reads(dictionary)} was trained on a model with {_said(trained)}, and this one has "
        f"{_said(model.cfg.weight_processing)}. {{}} Load the model so: {_way(name, trained)}."
    )
    if "refactor_factored_attn_matrices" in differs and {reads, writes} & {*_FACTORED}:
        raise DictionaryError(refusal.format("Heads' activations are in another basis."))
    if "center_writing_weights" in differs:
        dictionary = _centred(dictionary, model, reads, writes, refusal)
    if "fold_value_biases" in differs and reads in _VALUES:
        dictionary = _value_biases(dictionary, model, refusal)
    if "fold_ln" in differs and reads in _AFTER_GAIN:
        if "fold_ln" in model.cfg.weight_processing:
            raise DictionaryError(refusal.format("The gain of the norm is folded and gone."))
        stage = stage_of(_reads(dictionary))[0]
        dictionary = _retapped(dictionary, reads=f"{stage}{_AFTER_GAIN[reads]}.hook_normalized", gain=False)
    return dictionary


def _never(step: str, model: "HookedTransformer") -> bool:
    """Whether a step is not exact for this model, so that nobody's copy of it has gone through it."""
    return step in why_not(model.cfg) and step not in model.cfg.weight_processing and step != "fold_ln"


def _centred(
    dictionary: "Dictionary", model: "HookedTransformer", reads: str | None, writes: str | None, refusal: str
) -> "Dictionary":
    is_centred = "center_writing_weights" in model.cfg.weight_processing
    if reads in _CENTRED:
        if is_centred and not (dictionary.cfg.normalize_activations == "layer_norm" and not dictionary.cfg.transcoder):
            raise DictionaryError(refusal.format("The mean of the residual stream is gone."))
        if not is_centred:
            try:
                dictionary = reading_uncentred(dictionary)
            except DictionaryError as error:
                raise DictionaryError(refusal.format(error)) from error
    if writes in _CENTRED and dictionary.cfg.transcoder:
        if not is_centred:
            raise DictionaryError(refusal.format("It does not know the mean of what it is to write."))
        dictionary = writing_centred(dictionary)
    return dictionary


def _value_biases(dictionary: "Dictionary", model: "HookedTransformer", refusal: str) -> "Dictionary":
    """Returns a dictionary for values with their biases, of values without (with fold_ln also those through ln1's)."""
    block = model.params["blocks"][layer_of(_reads(dictionary))]
    attention, trained = block["attn"], dictionary.cfg.tap.processing or ()
    if "fold_value_biases" in model.cfg.weight_processing:
        if "b_O" in attention and not np.any(np.asarray(attention["b_O"])):
            return dictionary  # value biases were zero: folding them left a zero
        raise DictionaryError(refusal.format("The value biases are folded and gone."))
    bias = attention.get("b_V")
    if "fold_ln" in {*trained} ^ {*model.cfg.weight_processing} and model.cfg.normalization_type in ("LN", "LNPre"):
        if "fold_ln" in model.cfg.weight_processing:
            raise DictionaryError(refusal.format("The bias of ln1 and the value biases can no longer be told apart."))
        W_V = as_floats(attention["W_V"])
        through = jnp.einsum("d,dhe->he", block["ln1"]["b"], W_V, precision="highest")
        bias = through if bias is None else bias + through
    if bias is None or not np.any(np.asarray(bias)):
        return dictionary
    heads = model.cfg.n_heads if stage_of(_reads(dictionary))[1] == "attn.hook_z" else bias.shape[0]
    spread = jnp.repeat(bias, heads // bias.shape[0], axis=0)
    if not dictionary.cfg.tap.merged_heads:
        head = dictionary.cfg.tap.head
        if head is None:
            raise DictionaryError(
                refusal.format("Each head has its own value bias, and one dictionary reads them all.")
            )
        return moved(dictionary, -spread[head])
    return moved(dictionary, -spread.reshape(-1))


def _moved_before_gain(dictionary: "Dictionary", model: "HookedTransformer", reads: str) -> "Dictionary":
    """Returns a dictionary that reads after a norm's gain, moved to the point before it."""
    stage, own = stage_of(_reads(dictionary))
    if own not in _AFTER_GAIN or reads != f"{stage}{_AFTER_GAIN[own]}.hook_normalized":
        raise DictionaryError(
            f"The dictionary reads {_reads(dictionary)}, and that is no other form of {reads}: only a point after a "
            "norm's gain (mlp.hook_in) can be exchanged for the one before it (ln2.hook_normalized)."
        )
    return _folded_gain(_retapped(dictionary, reads=reads), model)


def _at_its_gain(dictionary: "Dictionary", model: "HookedTransformer") -> "Dictionary":
    """Returns a dictionary whose tap says that it reads after or before a norm's gain, at a point that is so."""
    stage, own = stage_of(_reads(dictionary))
    if dictionary.cfg.tap.gain and own in _AFTER_GAIN:
        _check_gain(dictionary, model, _AFTER_GAIN[own])
        return dictionary
    if dictionary.cfg.tap.gain:
        return _folded_gain(dictionary, model)
    if own in _AFTER_GAIN:
        return _retapped(dictionary, reads=f"{stage}{_AFTER_GAIN[own]}.hook_normalized")
    return dictionary


def _folded_gain(dictionary: "Dictionary", model: "HookedTransformer") -> "Dictionary":
    """Returns a dictionary of a norm's output for the point ``hook_normalized`` of that norm."""
    stage, relative = stage_of(_reads(dictionary))
    norm, _, last = relative.rpartition(".")
    if last != "hook_normalized":
        raise DictionaryError(
            f"The dictionary's tap says that it reads after a norm's gain, and {_reads(dictionary)} is not the output "
            "of a norm."
        )
    _check_gain(dictionary, model, norm)
    layer = layer_of(_reads(dictionary))
    params = model.params["blocks"][layer].get(norm, {}) if stage.startswith("blocks.") else model.params.get(norm, {})
    return with_gain(dictionary, norm_gain(model.cfg, params), params.get("b"))


def _check_gain(dictionary: "Dictionary", model: "HookedTransformer", norm: str) -> None:
    """Checks that a model has the gain of a norm, after which a dictionary reads."""
    if "fold_ln" in model.cfg.weight_processing and "fold_ln" not in (dictionary.cfg.tap.processing or ()):
        raise DictionaryError(
            f"The dictionary reads {norm}'s output after its gain, which is folded into this model's weights. Load the "
            f"model with fold_ln=False, such as {_way(model.cfg.model_name, ())}."
        )


def _said(processing: tuple[str, ...]) -> str:
    return f"processed weights ({', '.join(processing)})" if processing else "raw weights"


def _way(name: str, processing: tuple[str, ...]) -> str:
    options = "".join(f", {step}=True" for step in processing)
    return f"HookedTransformer.from_pretrained_no_processing({name!r}{options})"
