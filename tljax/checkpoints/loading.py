"""From a name to parameters: find, check, then read, place and process one stage at a time."""

import dataclasses
import functools
import inspect
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tljax.checkpoints import hosted, hub, mapping, native, transformer_lens
from tljax.checkpoints.families import family_of
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
from tljax.checkpoints.memory import MemoryTensors, read_hf_model
from tljax.checkpoints.mxfp4 import unpacked
from tljax.checkpoints.placement import Placer, ShardingRule, placer
from tljax.checkpoints.reader import CONFIG, Tensors, open_tensors, read_json
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
        tokenizer_elsewhere: fetches them from another repository that the checkpoint names.
    """

    cfg: HookedTransformerConfig
    params: Params
    tokenizer_source: Path | None
    tokenizer_elsewhere: Callable[[], Path] | None = None

    def tokenizer_files(self) -> Path | None:
        """Returns the directory with its tokenizer's files, fetching them where they are elsewhere."""
        return self.tokenizer_source if self.tokenizer_elsewhere is None else self.tokenizer_elsewhere()


@dataclasses.dataclass(frozen=True)
class _Description:
    """What a checkpoint's config.json says: the config, and the table that goes with it."""

    cfg: HookedTransformerConfig
    rows: list[mapping.Row]
    prefix: str = ""
    ignored: tuple[str, ...] = ()
    computed: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    renamed: tuple[tuple[str, str], ...] = ()
    hint: Callable[[Mapping[str, mapping.TensorInfo]], str] = lambda stored: ""
    tokenizer_repo: str | None = None


@dataclasses.dataclass(frozen=True)
class _Source:
    """Where a checkpoint is, before anything of it is understood.

    Attributes:
        name: short name for the config.
        origin: what errors call it.
        attributes: its config.json.
        config_name: what errors call that.
        tensors: opens its tensors; another call returns the same.
        tokenizer: a directory with its tokenizer's files, or ``None``.
        repo: its hub id, when it came from the hub.
    """

    name: str
    origin: str
    attributes: Mapping[str, Any]
    config_name: str
    tensors: Callable[[], Tensors]
    tokenizer: Path | None = None
    repo: str | None = None


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
    hf_model: Any = None,
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
        hf_model: a transformers model in memory, whose config and tensors are read instead of any file; ``name`` is
            then only its name, and the tokenizer's where it is a directory.
        **steps: weight processing: see :meth:`tljax.weights.steps.Steps.for_config`.

    Raises:
        InputError: an option that there is none of, or ``n_devices`` other than 1.
        CheckpointError: the checkpoint is not there, incomplete, damaged, or disagrees with its config.
        UnsupportedModelError: an architecture, attribute or storage format that tljax does not implement.
        ConfigError: ``n_ctx``, ``first_n_layers`` or ``dtype`` that the checkpoint cannot be loaded with.
    """
    _check_options(steps, n_devices)
    at = {"revision": revision, "checkpoint_value": checkpoint_value, "checkpoint_index": checkpoint_index}
    if hf_model is None:
        source = _files(hub.locate(name, token=token, cache_dir=cache_dir, **at))
    else:
        source = _in_memory(name, hf_model, at)
    described = _describe(source)
    cfg = _requested(described.cfg, source, "float32" if dtype is None else dtype, n_ctx, first_n_layers)
    loaded = _load(described, source, cfg, Steps.for_config(cfg, **steps), placer(device))
    if source.repo is None or described.tokenizer_repo is None or loaded.tokenizer_source is not None:
        return loaded
    fetch = functools.partial(hub.tokenizer_directory, described.tokenizer_repo, token=token, cache_dir=cache_dir)
    return dataclasses.replace(loaded, tokenizer_elsewhere=fetch)


def load_transformer_lens(
    state_dict: Any,
    cfg: Any,
    *,
    dtype: Any = None,
    device: DeviceLike | ShardingRule = None,
    n_ctx: int | None = None,
    first_n_layers: int | None = None,
    **steps: bool,
) -> Loaded:
    """Loads a state dict of TransformerLens 3.9, with the config that goes with it.

    Args:
        state_dict: names to arrays (numpy, jax, torch), or a file with that (.safetensors, or of torch's).
        cfg: see :func:`tljax.checkpoints.transformer_lens.read_config`.
        dtype: of the parameters; ``None`` means the config's.
        device, n_ctx, first_n_layers: as in :func:`load_checkpoint`.
        **steps: weight processing, off unless asked for.

    Raises:
        CheckpointError: the state dict is not what the config describes; lists every tensor that is not.
        UnsupportedModelError: a field or a storage format that tljax does not implement.
        ConfigError, InputError: as in :func:`load_checkpoint`.
    """
    _check_options(steps, 1)
    stored_cfg = transformer_lens.read_config(cfg)
    if isinstance(state_dict, str | os.PathLike):
        tensors, origin = transformer_lens.open_file(Path(state_dict)), os.fspath(state_dict)
    elif isinstance(state_dict, Mapping):
        tensors, origin = MemoryTensors(state_dict, "state_dict"), "The state dict"
    else:
        raise InputError(
            f"state_dict is a {type(state_dict).__name__}; expected a mapping from names to arrays, such as "
            "model.state_dict() in TransformerLens, or a file that holds one."
        )
    described = _of_transformer_lens(stored_cfg, transformer_lens.rows(stored_cfg))
    directory = Path(stored_cfg.tokenizer_name or "").expanduser() if stored_cfg.tokenizer_name else None
    source = _Source(
        name=stored_cfg.model_name,
        origin=origin,
        attributes={},
        config_name="cfg",
        tensors=lambda: transformer_lens.OneNumber(tensors),
        tokenizer=directory if directory is not None and directory.is_dir() else None,
    )
    wanted = _requested(stored_cfg, source, stored_cfg.dtype if dtype is None else dtype, n_ctx, first_n_layers)
    chosen = Steps.for_config(wanted, **{step: steps.get(step, False) for step in STEPS})
    return _load(described, source, wanted, chosen, placer(device))


def _files(location: hub.Location) -> _Source:
    """A checkpoint on disk."""
    directory = location.directory
    found = any((directory / file).exists() for file in hub.VOCABULARY_FILES)
    return _Source(
        name=location.model_name,
        origin=str(directory),
        attributes=read_json(directory / CONFIG),
        config_name=CONFIG,
        tensors=functools.cache(lambda: unpacked(open_tensors(directory, location.weights))),
        tokenizer=directory if found else None,
        repo=location.repo,
    )


def _in_memory(name: str | os.PathLike[str], hf_model: Any, at: Mapping[str, Any]) -> _Source:
    """A transformers model that is in memory already; its tokenizer is that of ``name`` where this is a directory."""
    if chosen := [option for option, value in at.items() if value is not None]:
        raise InputError(f"{chosen[0]}={at[chosen[0]]!r} chooses files on the hub; hf_model= reads none. Drop one.")
    attributes, tensors = read_hf_model(hf_model)
    path = Path(name).expanduser()
    path = path.resolve() if path.is_dir() else path
    found = any((path / file).exists() for file in hub.VOCABULARY_FILES)
    return _Source(path.name, "hf_model", attributes, "config", lambda: unpacked(tensors), path if found else None)


def _load(
    described: _Description, source: _Source, cfg: HookedTransformerConfig, steps: Steps, place: Placer
) -> Loaded:
    """Checks what is stored against the table, both ways, and reads it."""
    is_known = mapping.is_stored_name(described.rows, described.cfg, described.prefix, described.ignored)
    tensors = known_names(source.tensors(), is_known, described.renamed, source.origin)
    try:
        entries = mapping.match(
            described.rows,
            described.cfg,
            tensors.info,
            prefix=described.prefix,
            ignored=described.ignored,
            computed=described.computed.keys(),
            origin=source.origin,
            config_name=source.config_name,
        )
    except CheckpointError as error:
        raise CheckpointError(f"{error}{described.hint(tensors.info)}") from error
    _warn_of_untied(entries, tensors, source.origin)
    params = _read(entries, tensors, described, cfg, steps, place)
    return Loaded(cfg=steps.config_after(cfg), params=params, tokenizer_source=source.tokenizer)


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
    """Describes the checkpoint in a directory."""
    return _describe(_files(hub.Location(directory, directory.name)))


def _describe(source: _Source) -> _Description:
    """Reads config.json: tljax's own format by its mark, TransformerLens's by its keys, others by architecture."""
    attributes = source.attributes
    origin = os.path.join(source.origin, source.config_name) if source.config_name == CONFIG else "hf_model.config"
    try:
        if native.FORMAT in attributes:
            cfg = native.read_config(attributes, origin)
            return _Description(cfg, native.rows(cfg))
        if hosted.is_hosted(attributes):
            cfg = hosted.read_config(attributes)
            table = hosted.rows(cfg, attributes, source.tensors().info)
            return _of_transformer_lens(cfg, table, attributes.get("tokenizer_name"))
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
        if not np.array_equal(tensors.read(one.key), tensors.read(other.key)):
            warnings.warn(
                f"{origin} ties {one.key} to {other.key} (tie_word_embeddings, or its default), but stores both, and "
                "they differ. Each is used as it is stored, as transformers does: set tie_word_embeddings to false in "
                "config.json, or remove the one that should not be there.",
                stacklevel=2,
            )


def _of_transformer_lens(
    cfg: HookedTransformerConfig, rows: list[mapping.Row], tokenizer_repo: str | None = None
) -> _Description:
    return _Description(
        cfg,
        rows,
        ignored=transformer_lens.ignored(cfg),
        hint=functools.partial(transformer_lens.hint, cfg, rows),
        tokenizer_repo=tokenizer_repo,
    )


def _requested(
    cfg: HookedTransformerConfig,
    source: _Source,
    dtype: Any,
    n_ctx: int | None,
    first_n_layers: int | None,
) -> HookedTransformerConfig:
    """Returns the checkpoint's config with what the caller asked for instead."""
    name = available_dtype(dtype)
    if n_ctx is not None and n_ctx > cfg.n_ctx and cfg.learns_positions:
        raise ConfigError(f"n_ctx={n_ctx} is longer than the {cfg.n_ctx} positions this checkpoint has learnt.")
    layers = cfg.n_layers if first_n_layers is None else first_n_layers
    if not 1 <= layers <= cfg.n_layers:
        raise ConfigError(f"first_n_layers={layers} is not between 1 and the checkpoint's {cfg.n_layers}.")
    return cfg.replace(
        n_layers=layers,
        **{name: entries[:layers] for name in PER_LAYER if (entries := getattr(cfg, name)) is not None},
        n_ctx=cfg.n_ctx if n_ctx is None else n_ctx,
        dtype=name,
        model_name=source.name if cfg.model_name == "custom" else cfg.model_name,
        tokenizer_name=(source.repo or cfg.tokenizer_name) if source.tokenizer else None,
    )


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
            path: place(path, stored.computed[path][: shapes[path][0]]) for path in paths if path in stored.computed
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
