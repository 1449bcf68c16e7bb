"""SAELens's ``cfg.json``, of every version, and the config that it means."""

import json
from collections.abc import Mapping
from typing import Any

from tljax.dictionaries.maths.config import DictionaryConfig, Tap
from tljax.errors import DictionaryError, nearest

_RENAMED = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
    "hook_point_out": "hook_name_out",
}
"""Keys of versions before 6 → the names that later versions use."""

_DESCRIBES = (
    "model_name", "hook_name", "hook_head_index", "hook_name_out", "hook_head_index_out", "context_size", "prepend_bos",
    "seqpos_slice", "exclude_special_tokens", "dataset_path", "model_class_name", "model_from_pretrained_kwargs",
    "neuronpedia_id", "sae_lens_version", "sae_lens_training_version",
)  # fmt: skip
"""Keys of flat configs that later versions keep in ``metadata``. A flat config may hold the whole training runner's
configuration; what is not listed here says nothing about what the dictionary computes."""

_TYPES: tuple[tuple[str, type, str], ...] = (
    *((key, str, "a text") for key in ("hook_name", "hook_point", "hook_name_out", "hook_point_out", "model_name")),
    *((key, int, "a whole number") for key in ("hook_head_index", "hook_point_head_index")),
    ("activation_fn_kwargs", dict, "an object with k"),
)
"""Keys → the type of their values, and that in words."""

_TAP_KEYS = ("model_name", "hook_name", "hook_name_out", "hook_head_index")
"""Keys of ``metadata`` that :class:`~tljax.dictionaries.Tap` holds."""

_PLAIN = ("standard", "gated", "jumprelu", "topk", "abstopk", "matching_pursuit", "temporal")
_TRANSCODERS = {
    "transcoder": "standard",
    "skip_transcoder": "standard",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
_BATCH = ("batchtopk", "matryoshka_batchtopk")
"""Architectures of training checkpoints: released dictionaries of these are saved as ``jumprelu``."""
ARCHITECTURES = (*_PLAIN, *_TRANSCODERS, *_BATCH)

STEPS = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases", "refactor_factored_attn_matrices")
"""Steps of weight processing, as ``model_from_pretrained_kwargs`` names them."""


def read_config(stored: Mapping[str, Any], origin: str, *, training: bool = False) -> DictionaryConfig:
    """Returns the config that a ``cfg.json`` of any version of SAELens means.

    Args:
        stored: its content.
        origin: the file, for errors.
        training: whether a BatchTopK training checkpoint is read as what trains, which selects over the batch; by
            default it is read as what SAELens saves for inference, a ``jumprelu`` dictionary.

    Raises:
        DictionaryError: an architecture, activation function or normalisation that is not known, or a key that is
            missing or of a wrong type.
    """
    _check_types(stored, origin)
    flat = not isinstance(stored.get("metadata"), Mapping)
    values = {_RENAMED.get(key, key): value for key, value in stored.items()}
    described = {key: values[key] for key in _DESCRIBES if key in values} if flat else dict(stored["metadata"])
    architecture = _architecture(values, origin)
    transcoder = architecture in _TRANSCODERS
    fields: dict[str, Any] = {
        "architecture": _TRANSCODERS.get(architecture, architecture),
        "d_in": values.get("d_in"),
        "d_sae": values.get("d_sae"),
        "normalize_activations": _normalization(values.get("normalize_activations"), origin),
        "apply_b_dec_to_input": False if transcoder else values.get("apply_b_dec_to_input", True),
        "transcoder": transcoder,
    }
    if missing := [name for name in ("d_in", "d_sae") if fields[name] is None]:
        raise DictionaryError(f"{origin} does not say {' and '.join(missing)}, as a cfg.json of SAELens does.")
    if transcoder:
        fields["d_out"] = values.get("d_out")
    if architecture in ("topk", "abstopk"):
        rescales = values.get("rescale_acts_by_decoder_norm", False)
        fields |= {"k": _k(values, origin), "rescale_acts_by_decoder_norm": rescales}
    elif architecture in _BATCH:
        fields |= _batch_fields(values, origin, training)
    elif architecture == "matching_pursuit":
        names = ("max_iterations", "residual_threshold", "stop_on_duplicate_support")
        fields |= {name: values[name] for name in names if name in values}
    elif architecture == "temporal":
        fields |= _temporal_fields(values, origin)
    tap, rest = _tap(values, described, flat, origin)
    metadata = tuple((key, json.dumps(value)) for key, value in rest.items())
    return DictionaryConfig(**fields, tap=tap, metadata=metadata)


def _check_types(stored: Mapping[str, Any], origin: str) -> None:
    """Checks values that fields of our configs do not check."""
    described = stored.get("metadata")
    for values in (stored, described if isinstance(described, Mapping) else {}):
        for key, kind, words in _TYPES:
            value = values.get(key)
            if value is not None and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
                raise DictionaryError(f"{origin} has {key}={value!r}, expected {words}.")


def _architecture(values: Mapping[str, Any], origin: str) -> str:
    """Returns the architecture; versions before 6 name a top-k dictionary by its activation function."""
    architecture = values.get("architecture", "standard")
    if architecture not in ARCHITECTURES:
        raise DictionaryError(
            f"{origin} has architecture {architecture!r}; known are {', '.join(ARCHITECTURES)}."
            f"{nearest(str(architecture), ARCHITECTURES)}"
        )
    activation = values.get("activation_fn", "relu") or "relu"
    if architecture != "standard" or activation == "relu":
        return architecture
    if activation == "topk":
        if "k" not in (values.get("activation_fn_kwargs") or {}) and "k" not in values:
            raise DictionaryError(
                f'{origin} names the activation function "topk" and no k: add "activation_fn_kwargs": {{"k": ...}}.'
            )
        return "topk"
    raise DictionaryError(
        f'{origin} names the activation function {activation!r}; known are "relu" and "topk". SAELens reads all others '
        "as ReLU, which gives other features than the dictionary was trained with."
    )


def _k(values: Mapping[str, Any], origin: str) -> int:
    k = (values.get("activation_fn_kwargs") or {}).get("k", values.get("k"))
    if isinstance(k, bool) or not isinstance(k, int | float) or k != int(k):
        raise DictionaryError(f"{origin} has k={k!r}; it needs how many features a token keeps, a whole number.")
    return int(k)


def _batch_fields(values: Mapping[str, Any], origin: str, training: bool) -> dict[str, Any]:
    if not training:
        return {"architecture": "jumprelu"}
    widths = values.get("matryoshka_widths") or ()
    if not isinstance(widths, list | tuple) or not all(type(width) is int for width in widths):
        raise DictionaryError(f"{origin} has matryoshka_widths={widths!r}, expected a list of whole numbers.")
    return {
        "architecture": "batchtopk",
        "k": _k(values, origin),
        "rescale_acts_by_decoder_norm": values.get("rescale_acts_by_decoder_norm", True),
        "matryoshka_widths": tuple(widths),
    }


def _temporal_fields(values: Mapping[str, Any], origin: str) -> dict[str, Any]:
    names = {
        "n_heads": "n_attn_heads",
        "n_attn_layers": "n_attn_layers",
        "bottleneck_factor": "bottleneck_factor",
        "tied_weights": "tied_weights",
        "activation_normalization_factor": "scale",
    }
    fields = {ours: values[theirs] for theirs, ours in names.items() if theirs in values}
    novel = values.get("sae_diff_type", "topk")
    if novel not in ("topk", "relu"):
        raise DictionaryError(f'{origin} has sae_diff_type={novel!r}; known are "topk" and "relu".')
    if novel == "topk" and values.get("kval_topk") is None:
        raise DictionaryError(f'{origin} has sae_diff_type="topk" and no kval_topk, how many features a token keeps.')
    return fields | {"novel": novel, "k": values.get("kval_topk")}


def _normalization(mode: Any, origin: str) -> str:
    if isinstance(mode, bool):
        return "expected_average_only_in" if mode else "none"
    if mode is None:
        return "none"
    known = (
        "none", "expected_average_only_in", "covariance_whitening", "constant_norm_rescale", "layer_norm",
        "constant_scalar_rescale",
    )  # fmt: skip
    if mode not in known:
        raise DictionaryError(
            f"{origin} has normalize_activations={mode!r}; known are {', '.join(known)}.{nearest(str(mode), known)}"
        )
    return mode


def _tap(values: Mapping[str, Any], described: dict[str, Any], flat: bool, origin: str) -> tuple[Tap, dict[str, Any]]:
    """Returns where the dictionary belongs, and what else is described."""
    reads = described.get("hook_name")
    reshaped = values.get("reshape_activations", "hook_z" if "hook_z" in (reads or "") else "none")
    if reshaped not in ("none", "hook_z"):
        raise DictionaryError(f'{origin} has reshape_activations={reshaped!r}; known are "none" and "hook_z".')
    head = described.get("hook_head_index")
    tap = Tap(
        reads=reads,
        writes=described.get("hook_name_out"),
        model_name=described.get("model_name"),
        head=head,
        merged_heads=reshaped == "hook_z",
        processing=processing_of(described, flat),
    )
    return tap, {key: value for key, value in described.items() if key not in _TAP_KEYS}


def processing_of(described: Mapping[str, Any], flat: bool = False) -> tuple[str, ...] | None:
    """Returns the processing of the model's weights that a dictionary's description implies; ``None`` if unknown.

    From version 6 on SAELens loads the model without processing but for the steps in ``model_from_pretrained_kwargs``.
    Earlier versions processed by default, and their files do not say.
    """
    options = described.get("model_from_pretrained_kwargs")
    if isinstance(options, Mapping):
        return tuple(step for step in STEPS if options.get(step))
    version = str(described.get("sae_lens_training_version") or described.get("sae_lens_version") or "")
    trained_by_six = version.partition(".")[0].isdigit() and int(version.partition(".")[0]) >= 6
    return () if trained_by_six and not flat else None


def write_config(cfg: DictionaryConfig, *, has_skip: bool, dtype: str) -> dict[str, Any]:
    """Returns the ``cfg.json`` of version 6 that means a config.

    Args:
        cfg: the config.
        has_skip: whether the parameters have a ``W_skip``.
        dtype: of the parameters.

    Raises:
        DictionaryError: SAELens has no such dictionary.
    """
    content: dict[str, Any] = {
        "architecture": _written_architecture(cfg, has_skip),
        "d_in": cfg.d_in,
        "d_sae": cfg.d_sae,
        "dtype": dtype,
        "device": "cpu",
        "apply_b_dec_to_input": cfg.apply_b_dec_to_input,
        "normalize_activations": cfg.normalize_activations,
        "reshape_activations": "hook_z" if cfg.tap.merged_heads else "none",
    }
    if cfg.transcoder:
        content["d_out"] = cfg.output_width
    match cfg.architecture:
        case "topk" | "abstopk" | "batchtopk":
            content |= {"k": cfg.k, "rescale_acts_by_decoder_norm": cfg.rescale_acts_by_decoder_norm}
            if cfg.matryoshka_widths and cfg.architecture == "batchtopk":
                content["matryoshka_widths"] = list(cfg.matryoshka_widths)
        case "matching_pursuit":
            names = ("max_iterations", "residual_threshold", "stop_on_duplicate_support")
            content |= {name: getattr(cfg, name) for name in names}
        case "temporal":
            content |= {
                "n_heads": cfg.n_attn_heads,
                "n_attn_layers": cfg.n_attn_layers,
                "bottleneck_factor": cfg.bottleneck_factor,
                "sae_diff_type": cfg.novel,
                "kval_topk": cfg.k,
                "tied_weights": cfg.tied_weights,
                "activation_normalization_factor": cfg.scale,
            }
    return content | {"metadata": _written_metadata(cfg)}


def _written_architecture(cfg: DictionaryConfig, has_skip: bool) -> str:
    if cfg.architecture == "groupmax":
        raise DictionaryError(
            "SAELens has no groupmax dictionaries, so this one cannot be saved in its format. Architectures it has: "
            f"{', '.join(_PLAIN)}."
        )
    if cfg.normalize_activations == "center":
        raise DictionaryError(
            'SAELens has no normalize_activations="center", which this dictionary got when it was fitted to a model '
            "with raw weights: save the dictionary as it was loaded."
        )
    own_gain = not (cfg.tap.reads or "").endswith(".hook_normalized")
    if cfg.tap.gain is not None and cfg.tap.gain != own_gain:
        raise DictionaryError(
            f"SAELens cannot say that this dictionary reads {cfg.tap.reads} {'after' if cfg.tap.gain else 'before'} "
            "the norm's gain, unlike that point: fit it to its model first (fit_to)."
        )
    if not cfg.transcoder:
        return "matryoshka_batchtopk" if cfg.matryoshka_widths and cfg.architecture == "batchtopk" else cfg.architecture
    if cfg.architecture not in ("standard", "jumprelu"):
        raise DictionaryError(
            f"SAELens has no {cfg.architecture} transcoders, so this one cannot be saved in its format, which has: "
            f"{', '.join(_TRANSCODERS)}."
        )
    start = "jumprelu_" if cfg.architecture == "jumprelu" else ""
    return f"{start}{'skip_' if has_skip else ''}transcoder"


def _written_metadata(cfg: DictionaryConfig) -> dict[str, Any]:
    described = {key: json.loads(value) for key, value in cfg.metadata}
    version = str(described.get("sae_lens_version") or "")
    if not version.partition(".")[0].isdigit() or int(version.partition(".")[0]) < 6:
        described["sae_lens_version"] = "6.0.0"  # the layout's: without one it would be read as a flat one
    tap = cfg.tap
    if tap.processing is not None and processing_of(described) != tap.processing:
        options = described.get("model_from_pretrained_kwargs") or {}
        options = {key: value for key, value in options.items() if key not in STEPS}
        described["model_from_pretrained_kwargs"] = options | dict.fromkeys(tap.processing, True)
    facts = {"model_name": tap.model_name, "hook_name": tap.reads, "hook_head_index": tap.head}
    facts |= {"hook_name_out": tap.writes} if tap.writes is not None else {}
    return described | facts
