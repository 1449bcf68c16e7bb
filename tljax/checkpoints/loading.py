"""From a name to parameters: find, check, then read, place and process one stage at a time."""

import dataclasses
import functools
import inspect
import os
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tljax.checkpoints import hub, mapping, native
from tljax.checkpoints.families import family_of
from tljax.checkpoints.layout import (
    BLOCKS,
    axis_sizes,
    flatten,
    parameter_axes,
    parameter_shapes,
    stages_of,
    unflatten,
)
from tljax.checkpoints.mxfp4 import unpacked
from tljax.checkpoints.placement import Placer, ShardingRule, placer
from tljax.checkpoints.reader import CONFIG, Tensors, open_tensors, read_json
from tljax.checkpoints.stop_tokens import read_stop_tokens
from tljax.checkpoints.stored_names import known_names
from tljax.config import HookedTransformerConfig, available_dtype
from tljax.config_checks import PER_LAYER
from tljax.errors import CheckpointError, ConfigError, InputError, UnsupportedModelError, nearest
from tljax.text.tokenizer_files import has_tokenizer_files
from tljax.typing import DeviceLike, Params
from tljax.weights.processing import process_stage
from tljax.weights.steps import STEPS, Steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loaded:
    """A checkpoint in memory.

    Attributes:
        cfg: its config, as it is after processing.
        params: nested parameters in the stored layout.
        tokenizer_source: a directory that holds a tokenizer, readable or not, or ``None`` if it holds none.
    """

    cfg: HookedTransformerConfig
    params: Params
    tokenizer_source: Path | None


@dataclasses.dataclass(frozen=True)
class _Description:
    """What a checkpoint's config.json says: the config, and the table that goes with it."""

    cfg: HookedTransformerConfig
    rows: list[mapping.Row]
    prefix: str = ""
    ignored: tuple[str, ...] = ()
    computed: Mapping[str, Callable[[], np.ndarray]] = dataclasses.field(default_factory=dict)
    renamed: tuple[tuple[str, str], ...] = ()
    checked: Callable[[Tensors, Path], Tensors] = lambda tensors, _: tensors
    checked: Callable[[Tensors, Path], Tensors] = lambda tensors, _: tensors


def load_checkpoint(
    name: str | os.PathLike[str],
    *,
    dtype: Any = None,
    device: DeviceLike | ShardingRule = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    n_ctx: int | None = None,
    first_n_layers: int | None = None,
    checkpoint_value: int | None = None,
    checkpoint_index: int | None = None,
    n_devices: int = 1,
    ignore_config: str | Sequence[str] = (),
    **steps: bool,
) -> Loaded:
    """Loads a Hugging Face or tljax checkpoint, tensor by tensor and without torch.

    Everything is checked against the files' headers before the first weight is read. Host memory peaks at
    about one stage (the head, the embedding or one block) over the model.

    Args:
        name: a directory, a bundled model, an alias such as ``"gpt2-small"``, or a hub id.
        dtype: dtype of the parameters, whatever they are stored in; ``None`` means float32.
        device: where they go; see :func:`tljax.checkpoints.placement.placer`.
        revision: branch, tag or commit on the hub.
        token: hub token; by default ``HF_TOKEN`` or the stored login.
        cache_dir: where downloads are kept.
        n_ctx: context length instead of the checkpoint's own; learned positions can only be cut.
        first_n_layers: load only the first layers.
        checkpoint_value: training step of a published checkpoint (Pythia, Stanford GPT-2).
        checkpoint_index: the same, by its position in the list of checkpoints.
        n_devices: accepted for TransformerLens's sake; several devices are a sharding, ``device=``.
        ignore_config: attributes of config.json to load without, as if the file did not have them: one that tljax does
            not know and that you know to change nothing; of one that it reads, the class's default is taken instead.
            ``"a.b"`` is ``b`` in the object ``a``. What says which model it is, and of what size, cannot be ignored.
        **steps: weight processing: see :meth:`tljax.weights.steps.Steps.for_config`.

    Raises:
        InputError: an option that there is none of, ``n_devices`` other than 1, or an attribute in ``ignore_config``
            that config.json does not have or that no model can do without.
        CheckpointError: the checkpoint is not there, incomplete, damaged, or disagrees with its config.
        UnsupportedModelError: an architecture, attribute or storage format that tljax does not implement.
        ConfigError: ``n_ctx``, ``first_n_layers`` or ``dtype`` that the checkpoint cannot be loaded with.
    """
    _check_options(steps, n_devices)
    _check_names(ignore_config)
    location = hub.locate(
        name,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        checkpoint_value=checkpoint_value,
        checkpoint_index=checkpoint_index,
    )
    described = describe(location.directory, ignore_config)
    cfg = _requested(described.cfg, location, "float32" if dtype is None else dtype, n_ctx, first_n_layers)
    chosen = Steps.for_config(cfg, **steps)
    stored = unpacked(described.checked(open_tensors(location.directory), location.directory))
    mapping.check_counts(described.rows, described.cfg, stored.info, str(location.directory))
    is_known = mapping.is_stored_name(described.rows, described.cfg, described.prefix, described.ignored)
    tensors = known_names(stored, is_known, described.renamed, str(location.directory))
    entries = mapping.match(
        described.rows,
        described.cfg,
        tensors.info,
        prefix=described.prefix,
        ignored=described.ignored,
        computed=described.computed.keys(),
        origin=str(location.directory),
    )
    _warn_of_untied(entries, tensors, str(location.directory))
    params = _read(entries, tensors, described, cfg, chosen, placer(device))
    return Loaded(cfg=chosen.config_after(cfg), params=params, tokenizer_source=_tokenizer_source(location))


def _check_options(steps: Mapping[str, Any], n_devices: int) -> None:
    if n_devices != 1:
        raise InputError(
            f"n_devices={n_devices}: to spread a model over devices pass a sharding, such as "
            "device=jax.sharding.NamedSharding(mesh, spec), or a function of path and shape that returns one."
        )
    if unknown := next((name for name in steps if name not in STEPS), None):
        parameters = inspect.signature(load_checkpoint).parameters.values()
        known = [*STEPS, *(each.name for each in parameters if each.kind is each.KEYWORD_ONLY)]
        known += ["tokenizer", "default_prepend_bos", "default_padding_side"]
        raise InputError(
            f"from_pretrained has no option {unknown!r}.{nearest(unknown, known)} Options: {', '.join(known)}."
        )


def _check_names(ignore: Any) -> None:
    each = (ignore,) if isinstance(ignore, str) else ignore
    if not isinstance(each, Collection) or not all(isinstance(name, str) for name in each):
        raise InputError(f"ignore_config={ignore!r}: expected a list of names, such as ['attribute'].")


def describe(directory: Path, ignore: str | Sequence[str] = ()) -> _Description:
    """Reads config.json: tljax's own format by its mark, anything else by its architecture.

    Args:
        directory: where it is.
        ignore: attributes to read it without; see :func:`load_checkpoint`.
    """
    attributes = read_json(directory / CONFIG)
    origin = str(directory / CONFIG)
    try:
        if native.FORMAT in attributes:
            if ignore:
                raise InputError("ignore_config is about Hugging Face's config.json: this one is tljax's own format.")
            cfg = native.read_config(attributes, origin)
            return _Description(cfg, native.rows(cfg), checked=functools.partial(native.checked, attributes=attributes))
        family = family_of(attributes, origin)
        names = (ignore,) if isinstance(ignore, str) else tuple(ignore)
        hf = family.config(_without(attributes, names, family.defaults, origin), origin)
        stops = read_stop_tokens(directory, attributes)
        cfg = family.read_config(hf).replace(original_architecture=family.architecture, **stops)
        rows = list(family.rows(hf))
        hf.refuse_unread()
        computed = family.computed(cfg)
    except (CheckpointError, UnsupportedModelError, InputError):
        raise
    except (ValueError, TypeError, ArithmeticError, AttributeError, LookupError, RecursionError) as error:
        raise CheckpointError(f"{origin} does not describe a model: {error}") from error
    return _Description(cfg, rows, family.prefix, family.ignored, computed, family.renamed)


def _warn_of_untied(entries: Mapping[str, list[mapping.Entry]], tensors: Tensors, origin: str) -> None:
    """Warns of tensors that the config ties but that are stored apart and differ: as in transformers, both count."""
    for one, other in mapping.stored_apart(entries):
        if not np.array_equal(tensors.read(one.key), tensors.read(other.key)):
            warnings.warn(
                f"{origin} ties {one.key} to {other.key} (tie_word_embeddings, or its default), but stores both, and "
                "they differ. Each is used as it is stored, as transformers does: set tie_word_embeddings to false in "
                "config.json, or remove the one that should not be there.",
                stacklevel=2,
            )


def _without(
    attributes: Mapping[str, Any], names: Sequence[str], needed: Collection[str], origin: str
) -> dict[str, Any]:
    """Returns ``attributes`` without ``names``; ``"a.b"`` is ``b`` in the object ``a``.

    Args:
        attributes: what config.json says.
        names: what to leave out.
        needed: what cannot be left out, besides the names of the model itself.
        origin: named in errors.

    Raises:
        InputError: a name that is not there, or one that is needed.
    """
    left = dict(attributes)
    for name in names:
        if name.rpartition(".")[2] in needed or name in ("architectures", "model_type", "text_config"):
            raise InputError(f"ignore_config names {name!r}, which says what model this is: it cannot be ignored.")
        outer, _, inner = name.partition(".")
        if name in left:
            del left[name]
        elif inner and isinstance(left.get(outer), Mapping) and inner in left[outer]:
            left[outer] = {key: value for key, value in left[outer].items() if key != inner}
        else:
            raise InputError(f"ignore_config names {name!r}, which {origin} does not have.{nearest(name, left)}")
    return left


def _requested(
    cfg: HookedTransformerConfig,
    location: hub.Location,
    dtype: Any,
    n_ctx: int | None,
    first_n_layers: int | None,
) -> HookedTransformerConfig:
    """Returns the checkpoint's config with what the caller asked for instead."""
    name = available_dtype(dtype)
    if n_ctx is not None and n_ctx > cfg.n_ctx and cfg.positional_embedding_type == "standard":
        raise ConfigError(f"n_ctx={n_ctx} is longer than the {cfg.n_ctx} positions this checkpoint has learnt.")
    layers = cfg.n_layers if first_n_layers is None else first_n_layers
    if not 1 <= layers <= cfg.n_layers:
        raise ConfigError(f"first_n_layers={layers} is not between 1 and the checkpoint's {cfg.n_layers}.")
    return cfg.replace(
        n_layers=layers,
        **{name: entries[:layers] for name in PER_LAYER if (entries := getattr(cfg, name)) is not None},
        n_ctx=cfg.n_ctx if n_ctx is None else n_ctx,
        dtype=name,
        model_name=location.model_name if cfg.model_name == "custom" else cfg.model_name,
        tokenizer_name=(location.repo or cfg.tokenizer_name) if _tokenizer_source(location) else None,
    )


def _tokenizer_source(location: hub.Location) -> Path | None:
    return location.directory if has_tokenizer_files(location.directory) else None


def _read(
    entries: Mapping[str, list[mapping.Entry]],
    tensors: Tensors,
    stored: _Description,
    cfg: HookedTransformerConfig,
    steps: Steps,
    place: Placer,
) -> Params:
    """Reads the stages of ``cfg`` one after another; ``stored`` describes the files."""
    sizes, axes, shapes = axis_sizes(stored.cfg), parameter_axes(cfg), parameter_shapes(cfg)

    def read_stage(paths: list[str], stage: str, prefix: str) -> Params:
        raw = {}
        for entry in entries[stage]:
            parts = entry.read(tensors.read, axes[entry.targets[0]], sizes)
            for path, part in zip(entry.targets, parts, strict=True):
                raw[path] = place(path, part[: shapes[path][0]] if part.ndim else part)  # cuts positions past n_ctx
        raw |= {
            path: place(path, stored.computed[path]()[: shapes[path][0]]) for path in paths if path in stored.computed
        }
        raw |= {path: place(path, np.zeros(shapes[path], cfg.dtype)) for path in paths if path not in raw}
        return unflatten({path.removeprefix(prefix): array for path, array in raw.items()})

    params: dict[str, jax.Array] = {}
    for stage, paths in stages_of(cfg).items():
        prefix = f"{stage}." if stage.startswith(BLOCKS) else ""
        processed = flatten(process_stage(read_stage(paths, stage, prefix), steps, cfg.dtype))
        params |= {prefix + name: place(prefix + name, array) for name, array in processed.items()}
        jax.block_until_ready(params)
    return unflatten(params)
