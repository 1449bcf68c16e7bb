"""Loading a checkpoint: find, describe and check it, then read stage by stage (:mod:`tljax.checkpoints.stages`)."""

import dataclasses
import functools
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Unpack

import numpy as np

from tljax.checkpoints import mapping
from tljax.checkpoints.description import Description, describe_checkpoint, names_to_ignore, of_transformer_lens
from tljax.checkpoints.files.reader import Tensors
from tljax.checkpoints.files.sources import find
from tljax.checkpoints.finite import Finite
from tljax.checkpoints.formats import transformer_lens
from tljax.checkpoints.formats.adapters import Adapted, merged, open_adapter
from tljax.checkpoints.formats.memory import MemoryTensors
from tljax.checkpoints.formats.native import TLJAX
from tljax.checkpoints.layout import parameter_axes
from tljax.checkpoints.opening import Checkpoint, in_files, in_memory, locate_tokenizer, of_state_dict
from tljax.checkpoints.placement import Axes, Placer, ShardingRule, check_one_device, placer_for
from tljax.checkpoints.rows import Entry
from tljax.checkpoints.stages import StageReader
from tljax.checkpoints.stored_names import known_names
from tljax.checks import typed
from tljax.config import HookedTransformerConfig
from tljax.config_checks import PER_LAYER
from tljax.errors import CheckpointError, ConfigError, InputError, OffloadError, QuantizationError
from tljax.numerics import available_dtype
from tljax.typing import DeviceLike, Params
from tljax.weights.quantization import WeightBits
from tljax.weights.steps import STEPS, ProcessingOptions, Steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loaded:
    """A checkpoint in memory.

    Attributes:
        cfg: its config after weight processing.
        params: nested parameters in the stored layout.
        tokenizer_source: the directory with the tokenizer's files, readable or not, or ``None`` if there are none.
        tokenizer_elsewhere: downloads the tokenizer's files from another repository that the checkpoint names.
    """

    cfg: HookedTransformerConfig
    params: Params
    tokenizer_source: Path | None
    tokenizer_elsewhere: Callable[[], Path] | None = None

    def tokenizer_files(self) -> Path | None:
        """Returns the directory with the tokenizer's files, downloading them if they are in another repository."""
        return self.tokenizer_source if self.tokenizer_elsewhere is None else self.tokenizer_elsewhere()


@dataclasses.dataclass(frozen=True)
class _Asked:
    """The caller's options that override the checkpoint's."""

    dtype: Any
    n_ctx: int | None
    first_n_layers: int | None
    steps: ProcessingOptions
    held: WeightBits | None = None
    """How weights are rounded as they are loaded."""
    keep: bool = False
    """Whether weights that are stored quantised stay so."""
    offload: bool = False
    """Whether blocks stay where they are stored."""


class ReadOptions(ProcessingOptions, total=False):
    """Options for reading any checkpoint: see :func:`load_checkpoint`."""

    dtype: Any
    device: DeviceLike | ShardingRule
    n_devices: int
    mesh: Any
    rules: Any
    n_ctx: int | None
    first_n_layers: int | None
    allow_nonfinite: bool
    quantize: str | None
    group_size: int | None


class LoadOptions(ReadOptions, total=False):
    """Options for finding and reading files: see :func:`load_checkpoint`."""

    revision: str | None
    token: str | bool | None
    cache_dir: str | Path | None
    checkpoint_value: int | None
    checkpoint_index: int | None
    adapter: Any
    adapter_revision: str | None
    ignore_adapter_config: Sequence[str]
    ignore_config: str | Sequence[str]
    hf_model: Any
    dequantize: bool | None
    offload: Literal["host"] | None


@functools.partial(typed, receiver=Steps.for_config)
def load_checkpoint(
    name: str | os.PathLike[str],
    *,
    dtype: Any = None,
    device: DeviceLike | ShardingRule = None,
    n_devices: int = 1,
    mesh: Any = None,
    rules: Any = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    n_ctx: int | None = None,
    first_n_layers: int | None = None,
    checkpoint_value: int | None = None,
    checkpoint_index: int | None = None,
    adapter: Any = None,
    adapter_revision: str | None = None,
    ignore_adapter_config: Sequence[str] = (),
    ignore_config: str | Sequence[str] = (),
    hf_model: Any = None,
    allow_nonfinite: bool = False,
    quantize: str | None = None,
    group_size: int | None = None,
    dequantize: bool | None = None,
    offload: Literal["host"] | None = None,
    **steps: Unpack[ProcessingOptions],
) -> Loaded:
    """Loads a Hugging Face or tljax checkpoint, tensor by tensor and without torch.

    Everything is checked against the files' headers before the first weight is read. Peak host memory is about the
    model plus one stage (the head, the embedding or one block).

    Args:
        name: directory, bundled model, alias such as ``"gpt2-small"``, or hub id of a checkpoint, or of a LoRA adapter
            whose config names its base.
        dtype: dtype of the parameters, whatever they are stored in; ``None`` means float32.
        device: where to put the parameters; see :class:`tljax.checkpoints.placement.Placer`.
        n_devices: over how many devices to spread the parameters; heads, neurons and vocabulary are split.
        mesh: the ``jax.sharding.Mesh`` to spread them over; each device's part is read from the file alone.
        rules: which axes are split over which of the mesh's: a :class:`tljax.scale.ShardingRules` or a mapping. By
            default what the names of the mesh's axes suggest: ``"model"``, ``"data"``, ``"fsdp"``.
        revision: branch, tag or commit on the hub.
        token: hub token; by default ``HF_TOKEN`` or the stored login.
        cache_dir: where downloads are kept.
        n_ctx: context length instead of the checkpoint's own; learned positions can only be cut.
        first_n_layers: load only the first layers.
        checkpoint_value: training step of a published checkpoint (Pythia, Stanford GPT-2).
        checkpoint_index: the same, by its position in the list of checkpoints.
        adapter: directory or hub id of a LoRA adapter to merge into the weights; ``False``: none, even if one is beside
            them. See :func:`tljax.checkpoints.files.sources.find`.
        adapter_revision: branch, tag or commit of ``adapter`` on the hub.
        ignore_adapter_config: keys of adapter_config.json that tljax does not know and that you know to change nothing.
        ignore_config: attributes of config.json to ignore, as if the file lacked them. Meant for attributes that tljax
            does not know and that you know to change nothing; for one that it reads, the config class's default
            applies. ``"a.b"`` is ``b`` in the object ``a``. The model's type and sizes cannot be ignored.
        hf_model: a transformers model in memory, whose config and tensors are read instead of any file. ``name`` is
            then only its name and, if it is a directory, where its tokenizer is.
        allow_nonfinite: load NaN, infinities and numbers that overflow ``dtype`` as they are.
        quantize: ``"int8"`` or ``"int4"`` rounds the large matrices of each block as it is loaded and processed, so
            that floats of one block at a time are in memory: see :meth:`tljax.HookedTransformer.quantize`.
        group_size: how many weights share a scale, with ``quantize``.
        dequantize: whether weights that are stored quantised (GPTQ, AWQ, bitsandbytes, FP8, compressed-tensors, MXFP4)
            become the floats that they stand for, in ``dtype``. ``False`` keeps those of attention, MLPs and experts
            packed, and needs weight processing off. ``None``: only what tljax saved packed stays so.
        offload: ``"host"`` leaves the blocks where they are stored: each is read, processed and put on the device
            when it runs, and no more than two lie there at a time. The files must stay as they are.
        **steps: weight processing: see :meth:`tljax.weights.steps.Steps.for_config`.

    Raises:
        InputError: an unknown option, or options that exclude each other.
        ShardingError: more devices than there are, or a mesh and rules that do not fit each other.
        OffloadError: ``offload`` together with several devices.
        CheckpointError: the checkpoint is not there, incomplete, damaged, or disagrees with its config; the adapter
            does not fit; a weight is NaN or infinite, or does not fit ``dtype``.
        UnsupportedModelError: an architecture, attribute, adapter or storage format that tljax does not implement.
        QuantizationError: weights that cannot be rounded as asked for, or stay packed under weight processing.
        ConfigError: ``n_ctx``, ``first_n_layers`` or ``dtype`` that the checkpoint cannot be loaded with.
    """
    place = placer_for(device, n_devices, mesh, rules)
    if offload is not None:
        check_one_device(device, mesh is not None or n_devices != 1)
    ignored = names_to_ignore(ignore_config)
    revisions = {"revision": revision, "checkpoint_value": checkpoint_value, "checkpoint_index": checkpoint_index}
    access = {"token": token, "cache_dir": cache_dir}
    if hf_model is not None:
        refused = {"adapter": adapter or None, "adapter_revision": adapter_revision}
        source = in_memory(name, hf_model, revisions | refused)
    else:
        source = in_files(
            find(name, adapter, adapter_revision=adapter_revision, ignore=ignore_adapter_config, **revisions, **access)
        )
    described = describe_checkpoint(source, ignored)
    keep = described.quantized is not None and not (described.quantized != TLJAX if dequantize is None else dequantize)
    held = WeightBits.asked(quantize, group_size)
    if keep and held is not None:
        raise QuantizationError(
            f"{source.origin} holds quantised weights ({described.quantized}) that stay packed: quantize={quantize!r} "
            "has nothing to round. Leave it out; or pass dequantize=True, to round the floats that they stand for."
        )
    asked = _Asked("float32" if dtype is None else dtype, n_ctx, first_n_layers, steps, held, keep, offload is not None)
    if asked.offload and (keep or held is not None):
        raise OffloadError(
            "offload='host' leaves blocks in the checkpoint's files, where none is rounded or kept packed. "
            "Quantised blocks can stay in the host's memory: load the model without offload=, on the host "
            "(device='cpu'), and then model.offload('host')."
        )
    loaded = _load(source, described, asked, place, allow_nonfinite)
    return dataclasses.replace(loaded, tokenizer_elsewhere=locate_tokenizer(source, described.tokenizer_repo, **access))


@typed
def load_transformer_lens(
    state_dict: Any,
    cfg: Any,
    *,
    dtype: Any = None,
    device: DeviceLike | ShardingRule = None,
    n_devices: int = 1,
    mesh: Any = None,
    rules: Any = None,
    n_ctx: int | None = None,
    first_n_layers: int | None = None,
    allow_nonfinite: bool = False,
    quantize: str | None = None,
    group_size: int | None = None,
    **steps: Unpack[ProcessingOptions],
) -> Loaded:
    """Loads a state dict of TransformerLens 3.9, with the config that goes with it.

    Args:
        state_dict: mapping from names to arrays (numpy, jax, torch), or a file with one (.safetensors, or torch's).
        cfg: see :func:`tljax.checkpoints.formats.transformer_lens.read_config`.
        dtype: dtype of the parameters; ``None`` means the config's.
        device, n_devices, mesh, rules, n_ctx, first_n_layers, allow_nonfinite, quantize, group_size: as in
            :func:`load_checkpoint`.
        **steps: weight processing, off unless asked for.

    Raises:
        CheckpointError: tensors do not fit the config; lists all of them.
        UnsupportedModelError: a field or a storage format that tljax does not implement.
        ConfigError, InputError: as in :func:`load_checkpoint`.
    """
    place = placer_for(device, n_devices, mesh, rules)
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
    described = of_transformer_lens(stored_cfg, transformer_lens.rows(stored_cfg))
    own = transformer_lens.OneNumber(tensors)
    source = of_state_dict(own, stored_cfg.model_name, origin, stored_cfg.tokenizer_name)
    chosen: ProcessingOptions = {**dict.fromkeys(STEPS, False), **steps}  # type: ignore[typeddict-item]
    held = WeightBits.asked(quantize, group_size)
    asked = _Asked(stored_cfg.dtype if dtype is None else dtype, n_ctx, first_n_layers, chosen, held)
    return _load(source, described, asked, place, allow_nonfinite)


def _load(
    source: Checkpoint,
    described: Description,
    asked: _Asked,
    place: Callable[[Axes], Placer],
    allow_nonfinite: bool,
) -> Loaded:
    """Checks that stored tensors and table match, in both directions, and reads the tensors."""
    base, tensors = _open(source, described, allow_nonfinite)
    if isinstance(tensors, Adapted) and tensors.n_tokens not in (None, described.cfg.d_vocab):
        resized = described.cfg.replace(d_vocab=tensors.n_tokens, d_vocab_out=tensors.n_tokens)
        described = dataclasses.replace(described, cfg=resized)
    cfg = _requested(described.cfg, source, asked)
    steps = Steps.for_config(cfg, **asked.steps)
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
    _warn_of_untied(entries, base, source.origin)
    placer = place(parameter_axes(cfg))
    if asked.keep:
        _refuse_processing(steps, cfg, source.origin)
    origin = None if allow_nonfinite else source.origin
    reader = StageReader(entries, tensors, described, cfg, steps, origin, asked.held, asked.keep)
    params = reader.read(placer, asked.offload)
    return Loaded(cfg=steps.config_after(cfg), params=params, tokenizer_source=source.tokenizer)


def _refuse_processing(steps: Steps, cfg: HookedTransformerConfig, origin: str) -> None:
    """Raises QuantizationError if weights are to be processed that stay packed."""
    before = cfg.weight_processing
    if wanted := [step for step in steps.config_after(cfg).weight_processing if step not in before]:
        raise QuantizationError(
            f"{origin} is to stay packed, and weight processing ({', '.join(wanted)}) changes the floats that its "
            "numbers stand for. Load it with from_pretrained_no_processing(..., dequantize=False), or leave "
            "dequantize=False out."
        )


def _open(source: Checkpoint, described: Description, allow_nonfinite: bool) -> tuple[Tensors, Tensors]:
    """Opens the base's tensors under the table's names; returns them, and them with the adapter (if any) merged."""

    def finite(tensors: Tensors, origin: str) -> Tensors:
        return tensors if allow_nonfinite else Finite(tensors, origin)

    stored = described.checked(source.tensors())
    mapping.check_counts(described.rows, described.cfg, stored.info, source.origin)
    is_known = mapping.is_stored_name(described.rows, described.cfg, described.prefix, described.ignored)
    base = finite(known_names(stored, is_known, described.renamed, source.origin), source.origin)
    if source.adapter is None or source.adapter_config is None:
        return base, base
    places = mapping.stored_tensors(described.rows, described.cfg, base.info, described.prefix)
    adapter = finite(open_adapter(source.adapter), str(source.adapter))
    return base, merged(base, adapter, source.adapter_config, places, described.renamed)


def _warn_of_untied(entries: Mapping[str, list[Entry]], tensors: Tensors, origin: str) -> None:
    """Warns of tied tensors that are stored separately and differ; each is used as stored, as in transformers."""
    for one, other in mapping.stored_apart(entries):
        both = one.key in tensors.info and other.key in tensors.info  # an adapter has only one of the two
        if both and not np.array_equal(tensors.read(one.key), tensors.read(other.key)):
            warnings.warn(
                f"{origin} ties {one.key} to {other.key} (tie_word_embeddings, or its default), but stores both, and "
                "they differ. Each is used as it is stored, as transformers does: set tie_word_embeddings to false in "
                "config.json, or remove the one that should not be there.",
                stacklevel=2,
            )


def _requested(cfg: HookedTransformerConfig, source: Checkpoint, asked: _Asked) -> HookedTransformerConfig:
    """Returns the checkpoint's config with the caller's options applied."""
    dtype, n_ctx = available_dtype(asked.dtype), asked.n_ctx
    if n_ctx is not None and n_ctx > cfg.n_ctx and cfg.learns_positions:
        raise ConfigError(f"n_ctx={n_ctx} is longer than the {cfg.n_ctx} positions this checkpoint has learnt.")
    layers = cfg.n_layers if asked.first_n_layers is None else asked.first_n_layers
    if not 1 <= layers <= cfg.n_layers:
        raise ConfigError(f"first_n_layers={layers} is not between 1 and the checkpoint's {cfg.n_layers}.")
    return cfg.replace(
        n_layers=layers,
        **{name: entries[:layers] for name in PER_LAYER if (entries := getattr(cfg, name)) is not None},
        n_ctx=cfg.n_ctx if n_ctx is None else n_ctx,
        dtype=dtype,
        model_name=source.named(cfg.model_name),
        tokenizer_name=(source.tokenizer_repo or cfg.tokenizer_name) if source.tokenizer else None,
    )
