"""A training run on disk: parameters, optimizer state, step, history and config in one safetensors file."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tljax.checkpoints.writer import replace_file
from tljax.errors import CheckpointError

FILE = "training_state.safetensors"
_FORMAT = "tljax-training-state-1"


def _leaves(state: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def save_state(directory: Path, state: Any, step: int, history: list[dict[str, float]], config: dict) -> None:
    """Writes a run's state; the file of an earlier step is replaced once the new one is complete."""
    from safetensors.numpy import save

    header = {
        "format": _FORMAT,
        "step": str(step),
        "history": json.dumps(history),
        "config": json.dumps(config),
    }
    arrays = {name: np.asarray(jax.device_get(leaf), order="C") for name, leaf in _leaves(state).items()}
    directory.mkdir(parents=True, exist_ok=True)
    with replace_file(directory / FILE) as stream:
        stream.write(save(arrays, metadata=header))


def load_state(directory: Path, like: Any, config: dict) -> tuple[Any, int, list[dict[str, float]]]:
    """Reads what :func:`save_state` wrote.

    Args:
        directory: where the run was saved.
        like: a state of the same structure, shapes and dtypes.
        config: the fields that must be as they were for the run to go on as if never interrupted.

    Returns:
        ``(state, step, history)``.

    Raises:
        CheckpointError: the file is damaged, or is of another run: another config, another model.
    """
    from safetensors import SafetensorError, safe_open

    path = directory / FILE
    try:
        with safe_open(path, framework="numpy") as file:
            header: dict[str, Any] = file.metadata() or {}
            if header.get("format") != _FORMAT:
                raise CheckpointError(f"{path} is not a training state that tljax wrote.")
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or incomplete ({error}). Delete it to start again.") from error
    before = json.loads(header["config"])
    differ = [key for key in config if before.get(key) != config[key]]
    if differ:
        changed = [f"{key}: was {before.get(key)!r}, is {config[key]!r}" for key in differ]
        raise CheckpointError(
            f"{path} belongs to a run with another config ({'; '.join(changed)}). Train with the same config to go "
            "on, or with another out directory to start afresh."
        )
    _check_same(path, arrays, _leaves(like))
    structure = jax.tree.structure(like)
    state = jax.tree.unflatten(structure, [jnp.asarray(arrays[name]) for name in _leaves(like)])
    return state, int(header["step"]), json.loads(header["history"])


def _check_same(path: Path, found: dict[str, np.ndarray], expected: dict[str, Any]) -> None:
    def describe(leaves: dict[str, Any], name: str) -> str:
        return f"{leaves[name].dtype}{list(leaves[name].shape)}" if name in leaves else "absent"

    wrong = [
        f"{name} is {describe(found, name)}, should be {describe(expected, name)}"
        for name in sorted(found.keys() | expected.keys())
        if describe(found, name) != describe(expected, name)
    ]
    if wrong:
        raise CheckpointError(f"{path} is of another model or optimizer: {'; '.join(wrong[:6])}.")
