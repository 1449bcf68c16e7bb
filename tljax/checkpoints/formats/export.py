"""Export to Hugging Face's format, by the same table that loading uses."""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from tljax.checkpoints.families import FAMILIES, TEXT_ARCHITECTURES
from tljax.checkpoints.family import Family
from tljax.checkpoints.files.reader import SINGLE
from tljax.checkpoints.files.replacing import replace_checkpoint
from tljax.checkpoints.formats.native import write_json, write_side_files
from tljax.checkpoints.layout import flatten, parameter_axes
from tljax.checkpoints.rows import Entry, bind, is_bias, may_be_absent
from tljax.checkpoints.stop_tokens import GENERATION_CONFIG, stop_token_attributes
from tljax.config import HookedTransformerConfig
from tljax.errors import UnsupportedModelError
from tljax.fingerprint import NOT_THE_FUNCTION
from tljax.modules.parameters import axis_sizes
from tljax.processes import as_numpy, write_together
from tljax.safetensors_files import write_safetensors
from tljax.typing import Params


def save_hf(
    params: Params, cfg: HookedTransformerConfig, directory: str | os.PathLike[str], tokenizer: Any = None
) -> None:
    """Writes a checkpoint that ``transformers`` loads.

    Args:
        params: nested parameters, with norms not folded.
        cfg: their config; ``original_architecture`` chooses the family, otherwise the first one that fits. The text
            model of a multimodal checkpoint is written as the text-only architecture.
        directory: created if it does not exist. A checkpoint in it is replaced, with its tokenizer; if the process is
            killed, it holds the old checkpoint, the new one, or none that loads.
        tokenizer: a Hugging Face tokenizer to save with them, or ``None``.

    Raises:
        UnsupportedModelError: the norms are folded, no family can express the config, or a bias that the
            architecture does not have is not zero.
    """
    flat = flatten(params)
    nonzero = {path for path in flat if may_be_absent(path) and bool((flat[path] != 0).any())}
    tied = flat["embed.W_E"].shape == flat["unembed.W_U"].shape[::-1] and bool(
        (flat["embed.W_E"] == flat["unembed.W_U"].T).all()
    )
    biases = frozenset(_without_layer(path) for path in nonzero if is_bias(path))
    family, attributes = _fitting_family(cfg, biases, tied)
    rows = [row for row in family.rows(family.config(attributes)) if not row.tied_to and not row.other]
    entries = bind(rows, cfg.n_layers)
    if lost := sorted(nonzero - {path for entry in entries for path in entry.targets}):
        raise UnsupportedModelError(
            f"{', '.join(lost[:8])} not zero, but {family.architecture} has no such bias. It may come from "
            "weight processing: to export, load the model with from_pretrained_no_processing."
        )
    _check_computed(flat, cfg, family)
    sizes, axes = axis_sizes(cfg), parameter_axes(cfg)
    by_key: dict[str, Entry] = {}
    for entry in entries:
        for key in entry.keys(sizes):
            _check_shared(by_key.setdefault(key, entry), entry, flat, family)

    def tensor(key: str) -> np.ndarray:
        entry: Entry = by_key[key]
        return entry.write(key, [as_numpy(flat[path]) for path in entry.targets], axes[entry.targets[0]], sizes)

    headers = {key: (np.dtype(flat[entry.targets[0]].dtype), entry.shape(sizes)) for key, entry in by_key.items()}
    stops = stop_token_attributes(cfg)
    inner = dict(stops)
    if not 0 <= stops.get("pad_token_id", 0) < cfg.d_vocab:  # transformers would look for its row in the embedding
        del inner["pad_token_id"]

    def write(tensor: Callable[[str], np.ndarray]) -> None:
        with replace_checkpoint(directory) as written:
            write_safetensors(written / SINGLE, headers, tensor)
            write_json(written / GENERATION_CONFIG, stops)
            write_side_files(written, attributes | inner, tokenizer)

    write_together(next(iter(flat.values())), headers, tensor, write, f"Writing {directory}")


def _check_computed(flat: dict[str, Any], cfg: HookedTransformerConfig, family: Family) -> None:
    """Refuses parameters that differ from those that the architecture computes instead of storing."""
    for path, make in family.computed(cfg).items():
        values = make()
        if bool((flat[path] != values.astype(flat[path].dtype)).any()):
            raise UnsupportedModelError(
                f"{path} is not what {family.architecture} computes in its place, and it stores no such tensor."
            )


def _check_shared(one: Entry, other: Entry, flat: dict[str, Any], family: Family) -> None:
    """Refuses parameters that differ though the architecture stores them as one tensor."""
    for path, same in zip(one.targets, other.targets, strict=True):
        if path != same and bool((flat[path] != flat[same]).any()):
            raise UnsupportedModelError(
                f"{path} and {same} differ, but {family.architecture} has one tensor for both ({one.key})."
            )


def _fitting_family(cfg: HookedTransformerConfig, nonzero: frozenset[str], tied: bool) -> tuple[Family, dict[str, Any]]:
    """Returns the family whose config, written and read back, is ``cfg`` again, and that written config."""
    checked = [field.name for field in dataclasses.fields(cfg) if field.name not in NOT_THE_FUNCTION]
    reasons = []
    asked_for = TEXT_ARCHITECTURES.get(cfg.original_architecture or "", cfg.original_architecture)
    for family in FAMILIES:
        if asked_for not in (None, family.architecture):
            continue
        attributes = {
            "architectures": [family.architecture],
            "model_type": family.model_type,
            "torch_dtype": cfg.dtype,
            "tie_word_embeddings": tied,
            **family.write_config(cfg, nonzero),
        }
        try:
            back = family.read_config(family.config(attributes))
        except (ValueError, TypeError) as error:
            reasons.append(f"{family.architecture}: {error}")
            continue
        differing = [name for name in checked if getattr(cfg, name) != getattr(back, name)]
        if not differing:
            return family, attributes
        reasons.append(
            f"{family.architecture} cannot express " + ", ".join(f"{name}={getattr(cfg, name)!r}" for name in differing)
        )
    if cfg.normalization_type in ("LNPre", "RMSPre"):
        raise UnsupportedModelError(
            f"normalization_type={cfg.normalization_type!r}: the norms of this model were folded into its "
            "weights, and a Hugging Face model needs them apart. To export, load it with "
            "from_pretrained_no_processing."
        )
    if not reasons:
        reasons = [f"{cfg.original_architecture} is not one of {[family.architecture for family in FAMILIES]}"]
    raise UnsupportedModelError(f"No Hugging Face architecture fits this model. {'; '.join(reasons)}.")


def _without_layer(path: str) -> str:
    return path.split(".", 2)[2] if path.startswith("blocks.") else path
