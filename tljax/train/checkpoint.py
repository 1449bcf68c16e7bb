"""A training run on disk: parameters, optimizer state, step, history and config in one safetensors file."""

from pathlib import Path
from typing import Any

import jax

from tljax.config import HookedTransformerConfig
from tljax.errors import CheckpointError
from tljax.fingerprint import FORM, Fingerprint
from tljax.safetensors_files import own_errors, read_own, write_own

FILE = "training_state.safetensors"
_FORMAT = "tljax-training-state-1"
_REMEDY = "Delete it to start again."
_FIELDS = {"step": int, "history": [{"step": int, "loss": float}], "config": dict, "model?": FORM}


def _leaves(state: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def save_state(
    directory: Path, state: Any, step: int, history: list[dict[str, float]], config: dict, cfg: HookedTransformerConfig
) -> None:
    """Writes a run's state; the file of an earlier step is replaced once the new one is complete."""
    write_own(directory / FILE, _FORMAT, _leaves(state), step=step, history=history, config=config,
              model=Fingerprint(cfg).to_dict())  # fmt: skip


def load_state(
    directory: Path, like: Any, config: dict, cfg: HookedTransformerConfig
) -> tuple[Any, int, list[dict[str, float]]]:
    """Reads what :func:`save_state` wrote.

    Args:
        directory: where the run was saved.
        like: a state of the same structure, shapes and dtypes.
        config: the fields that must be unchanged for the run to continue as if never interrupted.
        cfg: the model's config, which must describe the same computation as the saved one.

    Returns:
        ``(state, step, history)``.

    Raises:
        CheckpointError: the file is damaged, or is of another run: another config, another model.
    """
    path = directory / FILE
    arrays, header = read_own(path, _FORMAT, "a training state that tljax wrote", _REMEDY, fields=_FIELDS)
    before = header["config"]
    differ = [key for key in config if before.get(key) != config[key]]
    if differ:
        changed = [f"{key}: was {before.get(key)!r}, is {config[key]!r}" for key in differ]
        raise CheckpointError(
            f"{path} belongs to a run with another config ({'; '.join(changed)}). Train with the same config to go "
            "on, or with another directory to start afresh."
        )
    _check_same(path, arrays, _leaves(like))
    with own_errors(path, _REMEDY, CheckpointError):
        stored = header.get("model") and Fingerprint.from_dict(header["model"])
        steps = [entry["step"] for entry in header["history"]]
        if steps != sorted(set(steps)) or (steps and steps[-1] != header["step"]) or header["step"] < 1:
            raise ValueError(f"a run at step {header['step']} cannot have the history of {steps[-3:]}")
    if stored and (differences := stored.differences(Fingerprint(cfg))):
        raise CheckpointError(
            f"{path} is of another model: {'; '.join(differences[:4])}. Resume with the model that the run was started "
            "with, or train with another directory."
        )
    structure = jax.tree.structure(like)
    state = jax.tree.unflatten(structure, [arrays[name] for name in _leaves(like)])
    return state, header["step"], header["history"]


def _check_same(path: Path, found: dict[str, jax.Array], expected: dict[str, Any]) -> None:
    def describe(leaves: dict[str, Any], name: str) -> str:
        return f"{leaves[name].dtype}{list(leaves[name].shape)}" if name in leaves else "absent"

    wrong = [
        f"{name} is {describe(found, name)}, should be {describe(expected, name)}"
        for name in sorted(found.keys() | expected.keys())
        if describe(found, name) != describe(expected, name)
    ]
    if wrong:
        raise CheckpointError(f"{path} is of another model or optimizer: {'; '.join(wrong[:6])}.")
