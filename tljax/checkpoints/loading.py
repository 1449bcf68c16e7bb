"""From a name to parameters: find, check, then read, place and process one stage at a time."""

import dataclasses
import inspect
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tljax.checkpoints import hub, mapping, native
from tljax.checkpoints.adapters import Adapted, merged, open_adapter
from tljax.checkpoints.families import family_of
from tljax.checkpoints.finite import Finite, refuse_overflow
from tljax.checkpoints.hf_config import HFConfig
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
from tljax.checkpoints.sources import Sources, find
from tljax.checkpoints.stored_names import known_names
from tljax.config import HookedTransformerConfig, available_dtype
from tljax.config_checks import PER_LAYER
from tljax.errors import CheckpointError, ConfigError, InputError, UnsupportedModelError, nearest
from tljax.typing import DeviceLike, Params
from tljax.weights.processing import process_stage
from tljax.weights.steps import STEPS, Steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loaded:
    """A checkpoint in memory.

    Attributes:
        cfg: its config, as it is after processing.
        params: nested parameters in the stored layout.
        tokenizer_source: a directory with its tokenizer's files, or ``None`` if it has none.
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
    computed: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    renamed: tuple[tuple[str, str], ...] = ()


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
    adapter: Any = None,
    adapter_revision: str | None = None,
    ignore_adapter_config: Sequence[str] = (),
    allow_nonfinite: bool = False,
    **steps: bool,
) -> Loaded:
    """Loads a Hugging Face or tljax checkpoint, tensor by tensor and without torch.

    Everything is checked against the files' headers before the first weight is read. Host memory peaks at
    about one stage (the head, the embedding or one block) over the model.

    Args:
        name: a directory, a bundled model, an alias such as ``"gpt2-small"``, or a hub id; of a LoRA adapter, which
            names its base, too.
        dtype: dtype of the parameters, whatever they are stored in; ``None`` means float32.
        device: where they go; see :func:`tljax.checkpoints.placement.placer`.
        revision: branch, tag or commit on the hub.
        token: hub token; by default ``HF_TOKEN`` or the stored login.
        cache_dir: where downloads are kept.
        n_ctx: context length instead of the checkpoint's own; learned positions can only be cut.
        first_n_layers: load only the first layers.
        checkpoint_value: training step of a published checkpoint (Pythia, Stanford GPT-2).
        checkpoint_index: the same, by its position in the list of checkpoints.
        adapter: directory or hub id of a LoRA adapter to merge into the weights; ``False``: none, though one be beside
            them. See :func:`tljax.checkpoints.sources.find`.
        adapter_revision: branch, tag or commit of ``adapter`` on the hub.
        ignore_adapter_config: keys of adapter_config.json to pass over though tljax does not know them, because you
            know that they change nothing.
        allow_nonfinite: load NaN, infinities and numbers that overflow ``dtype`` as they are.
        n_devices: accepted for TransformerLens's sake; several devices are a sharding, ``device=``.
        **steps: weight processing: see :meth:`tljax.weights.steps.Steps.for_config`.

    Raises:
        InputError: an option that there is none of, or ``n_devices`` other than 1.
        CheckpointError: the checkpoint is not there, incomplete, damaged, or disagrees with its config; the adapter
            does not fit; a weight is NaN or infinite, or does not fit ``dtype``.
        UnsupportedModelError: an architecture, attribute, adapter or storage format that tljax does not implement.
        ConfigError: ``n_ctx``, ``first_n_layers`` or ``dtype`` that the checkpoint cannot be loaded with.
    """
    _check_options(steps, n_devices)
    sources = find(
        name,
        adapter,
        adapter_revision=adapter_revision,
        ignore=ignore_adapter_config,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        checkpoint_value=checkpoint_value,
        checkpoint_index=checkpoint_index,
    )
    described = describe(sources.base.directory)
    base, tensors = _open(sources, described, allow_nonfinite)
    if isinstance(tensors, Adapted) and tensors.n_tokens not in (None, described.cfg.d_vocab):
        resized = described.cfg.replace(d_vocab=tensors.n_tokens, d_vocab_out=tensors.n_tokens)
        described = dataclasses.replace(described, cfg=resized)
    cfg = _requested(described.cfg, sources, "float32" if dtype is None else dtype, n_ctx, first_n_layers)
    chosen = Steps.for_config(cfg, **steps)
    origin = str(sources.base.directory)
    entries = mapping.match(
        described.rows,
        described.cfg,
        tensors.info,
        prefix=described.prefix,
        ignored=described.ignored,
        computed=described.computed.keys(),
        origin=origin,
    )
    _warn_of_untied(entries, base, origin)
    params = _read(entries, tensors, described, cfg, chosen, placer(device), None if allow_nonfinite else origin)
    tokenizer = sources.tokenizer()
    return Loaded(
        cfg=chosen.config_after(cfg), params=params, tokenizer_source=None if tokenizer is None else tokenizer.directory
    )


def _open(sources: Sources, described: _Description, allow_nonfinite: bool) -> tuple[Tensors, Tensors]:
    """Opens the tensors of the base by the table's names; returns them, and them with the adapter, if any, merged."""

    def checked(tensors: Tensors, place: hub.Location) -> Tensors:
        return tensors if allow_nonfinite else Finite(tensors, str(place.directory))

    stored = unpacked(open_tensors(sources.base.directory))
    is_known = mapping.is_stored_name(described.rows, described.cfg, described.prefix, described.ignored)
    named = known_names(stored, is_known, described.renamed, str(sources.base.directory))
    base = checked(named, sources.base)
    if sources.adapter is None or sources.settings is None:
        return base, base
    places = mapping.places(described.rows, described.cfg, base.info, described.prefix)
    adapter = checked(open_adapter(sources.adapter.directory), sources.adapter)
    return base, merged(base, adapter, sources.settings, places, described.renamed)


def _check_options(steps: Mapping[str, Any], n_devices: int) -> None:
    if n_devices != 1:
        raise InputError(
            f"n_devices={n_devices}: to spread a model over devices pass a sharding, such as "
            "device=jax.sharding.NamedSharding(mesh, spec), or a function of path and shape that returns one."
        )
    if unknown := next((name for name in steps if name not in STEPS), None):
        parameters = inspect.signature(load_checkpoint).parameters.values()
        known = [*STEPS, *(each.name for each in parameters if each.kind is each.KEYWORD_ONLY)]
        raise InputError(f"Loading has no option {unknown!r}.{nearest(unknown, known)} Options: {', '.join(known)}.")


def describe(directory: Path) -> _Description:
    """Reads config.json: tljax's own format by its mark, anything else by its architecture."""
    attributes = read_json(directory / CONFIG)
    origin = str(directory / CONFIG)
    try:
        if native.FORMAT in attributes:
            cfg = native.read_config(attributes, origin)
            return _Description(cfg, native.rows(cfg))
        family = family_of(attributes, origin)
        hf = HFConfig(attributes, origin)
        if family.tower is not None:
            hf = family.tower.text_config(hf)
        cfg = family.read_config(hf).replace(original_architecture=family.architecture)
        rows = list(family.rows(hf))
        hf.refuse_unread()
        computed = family.computed(cfg)
    except (CheckpointError, UnsupportedModelError):
        raise
    except (ValueError, TypeError, ArithmeticError) as error:
        raise CheckpointError(f"{origin} does not describe a model: {error}") from error
    return _Description(cfg, rows, family.prefix, family.ignored, computed, family.renamed)


def _warn_of_untied(entries: Mapping[str, list[mapping.Entry]], tensors: Tensors, origin: str) -> None:
    """Warns of tensors that the config ties but that are stored apart and differ: as in transformers, both count."""
    for one, other in mapping.stored_apart(entries):
        both = one.key in tensors.info and other.key in tensors.info  # an adapter has only one of the two
        if both and not np.array_equal(tensors.read(one.key), tensors.read(other.key)):
            warnings.warn(
                f"{origin} ties {one.key} to {other.key} (tie_word_embeddings, or its default), but stores both, and "
                "they differ. Each is used as it is stored, as transformers does: set tie_word_embeddings to false in "
                "config.json, or remove the one that should not be there.",
                stacklevel=2,
            )


def _requested(
    cfg: HookedTransformerConfig,
    sources: Sources,
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
        model_name=sources.named(sources.base.model_name if cfg.model_name == "custom" else cfg.model_name),
        tokenizer_name=(tokenizer.repo or cfg.tokenizer_name) if (tokenizer := sources.tokenizer()) else None,
    )


def _read(
    entries: Mapping[str, list[mapping.Entry]],
    tensors: Tensors,
    stored: _Description,
    cfg: HookedTransformerConfig,
    steps: Steps,
    place: Placer,
    origin: str | None,
) -> Params:
    """Reads the stages of ``cfg`` one after another; ``stored`` describes the files.

    A number that overflows is an error that names ``origin``, unless that is ``None``.
    """
    sizes, axes, shapes = axis_sizes(stored.cfg), parameter_axes(cfg), parameter_shapes(cfg)

    def read_stage(paths: list[str], stage: str, prefix: str) -> Params:
        raw = {}
        for entry in entries[stage]:
            parts = entry.read(tensors.read, axes[entry.targets[0]], sizes)
            for path, part in zip(entry.targets, parts, strict=True):
                raw[path] = place(path, part[: shapes[path][0]] if part.ndim else part)  # cuts positions past n_ctx
        raw |= {
            path: place(path, stored.computed[path][: shapes[path][0]]) for path in paths if path in stored.computed
        }
        raw |= {path: place(path, np.zeros(shapes[path], cfg.dtype)) for path in paths if path not in raw}
        return unflatten({path.removeprefix(prefix): array for path, array in raw.items()})

    params: dict[str, jax.Array] = {}
    for stage, paths in stages_of(cfg).items():
        prefix = f"{stage}." if stage.startswith(BLOCKS) else ""
        processed = flatten(process_stage(read_stage(paths, stage, prefix), steps, cfg.dtype))
        placed = {prefix + name: place(prefix + name, array) for name, array in processed.items()}
        if origin is not None:
            keys = {path: entry.keys(sizes) for entry in entries[stage] for path in entry.targets}
            refuse_overflow({path: placed[path] for path in placed.keys() - stored.computed}, keys, tensors, origin)
        params |= placed
        jax.block_until_ready(params)
    return unflatten(params)
