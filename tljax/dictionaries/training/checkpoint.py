"""A training run on disk: states, history and settings in one safetensors file, written whole or not at all."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tljax.dictionaries.training.config import TrainingConfig
from tljax.dictionaries.training.preparation import Preparation, Whitening
from tljax.dictionaries.training.step import TrainingState
from tljax.errors import CheckpointError
from tljax.fingerprint import FORM, Fingerprint
from tljax.safetensors_files import own_errors, read_own, write_own

FILE = "dictionary_training_state.safetensors"
_FORMAT = "tljax-dictionary-training-state-1"
_REMEDY = "Delete it to start again."
_FIELDS = {
    "step": int, "configs": [dict], "steps": int, "batch_size": int, "data": str, "optimizer": str, "objective?": dict,
    "model?": FORM,
}  # fmt: skip
_FACTS = ("steps", "batch_size", "data", "optimizer")
_HISTORY = "history."


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run must agree in to be gone on with.

    Attributes:
        cfgs: the settings of each member.
        steps: steps of the whole run, which schedules depend on.
        batch_size: rows of a batch where batches are drawn from an array.
        data: checksum of the first batch.
        optimizer: whose moments the state holds.
        objective: settings of the loss besides those of the configs, by name.
        model: the model that is run in training; ``None`` if none is.
    """

    cfgs: Sequence[TrainingConfig]
    steps: int
    batch_size: int
    data: str
    optimizer: str
    objective: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    model: Fingerprint | None = None

    def header(self) -> dict[str, Any]:
        """Returns the facts as JSON values."""
        configs = [_plain(dataclasses.asdict(cfg)) for cfg in self.cfgs]
        facts = {"configs": configs, **{name: getattr(self, name) for name in _FACTS}}
        facts |= {"objective": _plain(dict(self.objective))} if self.objective else {}
        return facts if self.model is None else facts | {"model": self.model.to_dict()}


def _plain(value: Any) -> Any:
    """Returns a value as JSON gives it back."""
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value.item() if isinstance(value, np.generic) else value


def save_run(
    directory: Path, run: Run, state: TrainingState, preparation: Preparation, step: int, history: dict[str, np.ndarray]
) -> None:
    """Writes a run; the file of an earlier step is replaced once the new one is complete."""
    arrays = _leaves((state, preparation)) | {_HISTORY + name: values for name, values in history.items()}
    write_own(directory / FILE, _FORMAT, arrays, step=step, **run.header())


def load_run(
    directory: Path, run: Run, like: TrainingState
) -> tuple[TrainingState, Preparation, int, dict[str, np.ndarray]]:
    """Reads what :func:`save_run` wrote.

    Args:
        directory: where the run was saved.
        run: what the run must agree in.
        like: a state of the same structure, shapes and dtypes.

    Returns:
        ``(state, preparation, step, history)``.

    Raises:
        CheckpointError: the file is damaged, or is of a run with other settings, data or number of members; names them.
    """
    path = directory / FILE
    arrays, header = read_own(path, _FORMAT, "a state of dictionary training", _REMEDY, fields=_FIELDS)
    differ = _differences(header, run.header())
    if run.model is not None and "model" in header:
        differ += [f"the model: {one}" for one in Fingerprint.from_dict(header["model"]).differences(run.model)]
    if differ:
        raise CheckpointError(
            f"{path} belongs to another run ({'; '.join(differ[:6])}). Train with the same settings and batches to go "
            "on, or with another directory to start afresh."
        )
    history = {
        name.removeprefix(_HISTORY): np.asarray(arrays.pop(name)) for name in list(arrays) if name.startswith(_HISTORY)
    }
    preparation = _preparation({name: arrays.pop(name) for name in list(arrays) if name.startswith("[1]")})
    expected = _leaves((like,))
    with own_errors(path, _REMEDY, CheckpointError):
        if arrays.keys() != expected.keys():
            raise ValueError(f"it has the arrays {sorted(arrays.keys() ^ expected.keys())[:6]} too many or too few")
        for name, leaf in expected.items():
            found = arrays[name]
            if found.shape != leaf.shape or found.dtype != leaf.dtype:
                raise ValueError(f"{name} is {found.dtype}{list(found.shape)}, not {leaf.dtype}{list(leaf.shape)}")
        if any(values.shape[0] != header["step"] for values in history.values()):
            raise ValueError(f"its history does not have the {header['step']} steps that it says")
    state = jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in expected])
    return state, preparation, header["step"], history


def _preparation(arrays: dict[str, Any]) -> Preparation:
    """Returns the preparation from its leaves; it may have any, or none, of its parts."""
    parts = [arrays.get(f"[1].whitening.{name}") for name in Whitening._fields]
    whitening = None if parts[0] is None else Whitening(*parts)  # pyright: ignore[reportArgumentType]
    return Preparation(arrays.get("[1].scale_in"), arrays.get("[1].scale_out"), whitening)


def _leaves(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    if len(there["configs"]) != len(here["configs"]):
        return [f"it trains {len(there['configs'])} dictionaries, not {len(here['configs'])}"]
    found = []
    for number, (theirs, ours) in enumerate(zip(there["configs"], here["configs"], strict=True)):
        which = f"cfgs[{number}]." if len(here["configs"]) > 1 else ""
        names = dict.fromkeys([*theirs, *ours])
        found += [
            f"{which}{name}: was {theirs.get(name)!r}, is {ours.get(name)!r}"
            for name in names
            if theirs.get(name) != ours.get(name)
        ]
    theirs, ours = there.get("objective", {}), here.get("objective", {})
    found += [
        f"{name}: was {theirs.get(name)!r}, is {ours.get(name)!r}"
        for name in dict.fromkeys([*theirs, *ours])
        if theirs.get(name) != ours.get(name)
    ]
    found += [
        f"{name}: was {there[name]!r}, is {here[name]!r}"
        for name in ("steps", "batch_size", "optimizer")
        if there[name] != here[name]
    ]
    if there["data"] != here["data"]:
        found.append("its first batch was another: other activations, or another order")
    return found
