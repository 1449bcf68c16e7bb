"""Interventions on disk: a list of (hook name, intervention) pairs as one safetensors file."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from tljax.errors import CheckpointError, InterventionError
from tljax.fingerprint import FORM, Fingerprint, fingerprint_of
from tljax.hooks.interchanges import (
    BoundlessInterchange,
    Interchange,
    MaskedInterchange,
    NormMatchedPlacebo,
    RotatedInterchange,
)
from tljax.hooks.intervention import Intervention
from tljax.hooks.interventions import (
    Add,
    Chain,
    Mean,
    Noise,
    Project,
    ProjectOut,
    Replace,
    Scale,
    Zero,
)
from tljax.hooks.points import AXES
from tljax.hooks.selectors import SPANS, Selector
from tljax.safetensors_files import own_errors, read_own, write_own
from tljax.schema import mismatch

if TYPE_CHECKING:
    from tljax.model.hooked_transformer import HookedTransformer

_FORMAT = "tljax-interventions-1"
_REMEDY = "Save the interventions again."
_DEEPEST = 50
_INTERCHANGES = (Interchange, RotatedInterchange, BoundlessInterchange, MaskedInterchange, NormMatchedPlacebo)
_KINDS = {kind.__name__: kind for kind in (Replace, Add, Scale, Zero, Mean, Project, ProjectOut, Noise, *_INTERCHANGES)}
_AXIS, _BOUND = frozenset(AXES), (None, int)
_INTERVENTION = {
    "type": frozenset(_KINDS),
    "arrays": {str: (None, str)},
    "settings": {str: [str]},
    "at": [
        (
            {"axis": _AXIS, "slice": [_BOUND]},
            {"axis": _AXIS, "span": frozenset(SPANS)},
            {"axis": _AXIS, "kind": {"number", "numbers", "mask"}, "payload": str},
        )
    ],
}
_MODEL = (None, FORM)


def save_interventions(
    hooks: Sequence[tuple[str, Intervention]],
    path: str | os.PathLike[str],
    model: "HookedTransformer | None" = None,
) -> None:
    """Writes ``[(hook name, intervention), ...]``, the form ``fwd_hooks`` takes.

    Args:
        hooks: the hooks.
        path: the file.
        model: the model that they are for, so that :func:`load_interventions` can check it.

    Raises:
        InterventionError: an item is not a name with one of tljax's own interventions.
    """
    arrays: dict[str, np.ndarray] = {}
    described = []
    for number, (name, intervention) in enumerate(hooks):
        if not isinstance(name, str):
            raise InterventionError(f"Only hooks at a name can be saved; item {number} is at {name!r}.")
        described.append({"name": name, "intervention": _describe(intervention, f"{number}", arrays)})
    made_for = None if model is None else fingerprint_of(model).to_dict()
    write_own(path, _FORMAT, arrays, hooks=described, model=made_for)


def load_interventions(
    path: str | os.PathLike[str], model: "HookedTransformer | None" = None
) -> list[tuple[str, Intervention]]:
    """Reads what :func:`save_interventions` wrote.

    Args:
        path: the file.
        model: the model that they must have been saved for; ``None`` checks nothing.

    Raises:
        CheckpointError: the file is missing, damaged, or of another kind; its interventions were saved for a model
            other than ``model``, or it does not say for which.
    """
    arrays, header = read_own(
        path,
        _FORMAT,
        "interventions that save_interventions wrote",
        _REMEDY,
        fields={"hooks": [dict], "model?": _MODEL},
    )
    with own_errors(path, _REMEDY, CheckpointError):
        unread = dict(arrays)
        hooks = [_read_hook(item, unread) for item in header["hooks"]]
        if unread:
            raise ValueError(f"nothing reads its array {next(iter(unread))!r}")
        made_for = header.get("model") and Fingerprint.from_dict(header["model"])
    if model is not None:
        _check_model(path, made_for, model)
    return hooks


def _check_model(path: Any, made_for: Fingerprint | None, model: "HookedTransformer") -> None:
    if made_for is None:
        raise CheckpointError(
            f"{path} does not say which model its interventions are for: load it without model=, or save it again with "
            "save_interventions(hooks, path, model)."
        )
    if differences := made_for.differences(fingerprint_of(model)):
        raise CheckpointError(
            f"The interventions in {path} were saved for another model, {made_for.cfg.model_name!r}: "
            f"{'; '.join(differences[:4])}. If you mean to use them all the same, load them without model=."
        )


def _describe(intervention: Any, prefix: str, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    kind = type(intervention)
    if kind is not Chain and _KINDS.get(kind.__name__) is not kind:
        raise InterventionError(f"{kind.__name__} is not one of tljax's interventions and cannot be saved.")
    if isinstance(intervention, Chain):
        parts = [_describe(part, f"{prefix}.{n}", arrays) for n, part in enumerate(intervention.parts)]
        return {"type": "Chain", "parts": parts}

    def keep(key: str, value: Any) -> str | None:
        if value is None:
            return None
        arrays[f"{prefix}.{key}"] = np.array(value, order="C")  # ascontiguousarray would make a scalar 1-D
        return f"{prefix}.{key}"

    return {
        "type": kind.__name__,
        "arrays": {key: keep(key, getattr(intervention, key)) for key in (*kind.arrays, "mask")},
        "settings": {key: list(getattr(intervention, key)) for key in kind.settings},
        "at": [
            {"axis": s.axis, "slice": [s.payload.start, s.payload.stop, s.payload.step]}
            if s.kind == "slice"
            else {"axis": s.axis, "span": s.payload}
            if s.kind == "span"
            else {"axis": s.axis, "kind": s.kind, "payload": keep(f"at.{s.axis}", s.payload)}
            for s in intervention.at
        ],
    }


def _read_hook(item: dict[str, Any], unread: dict[str, Any]) -> tuple[str, Intervention]:
    """Rebuilds a hook from its description, and removes its arrays from ``unread``."""
    if problem := mismatch(item, {"name": str, "intervention": dict}, "a hook"):
        raise ValueError(problem)
    return item["name"], _rebuild(item["intervention"], unread)


def _rebuild(described: Any, unread: dict[str, Any], depth: int = 0) -> Intervention:
    if depth > _DEEPEST:
        raise ValueError("its chains are nested too deeply")
    if mismatch(described, {"type": {"Chain"}, "parts": [dict]}) is None:
        return Chain(*(_rebuild(part, unread, depth + 1) for part in described["parts"]))
    if problem := mismatch(described, _INTERVENTION, "an intervention"):
        raise ValueError(problem)
    kind = _KINDS[described["type"]]
    stored, settings = described["arrays"], described["settings"]
    if stored.keys() != {*kind.arrays, "mask"} or settings.keys() != set(kind.settings):
        raise ValueError(f"a {kind.__name__} has other parts than {sorted(stored)} and {sorted(settings)}")
    if absent := [key for key in kind.arrays if stored[key] is None and key not in kind.optional]:
        raise ValueError(f"a {kind.__name__} needs its {absent[0]}")
    if unknown := [axis for names in settings.values() for axis in names if axis not in AXES]:
        raise ValueError(f"{unknown[0]!r} is no axis")
    values = {key: None if name is None else _array(name, unread) for key, name in stored.items()}
    selectors = tuple(_selector(item, unread) for item in described["at"])
    if len({selector.axis for selector in selectors}) < len(selectors):
        raise ValueError(f"a {kind.__name__} addresses an axis twice")
    return kind.stored(values | {key: tuple(names) for key, names in settings.items()}, selectors)


def _array(name: str, unread: dict[str, Any], whole: bool = False, ndim: int | None = None) -> Any:
    """Removes an array from ``unread`` and checks it: floats, or booleans unless ``whole``; ``ndim`` axes if given."""
    if name not in unread:
        raise ValueError(f"it lacks the array {name!r}")
    array = unread.pop(name)
    is_right = jnp.issubdtype(array.dtype, jnp.floating) or (array.dtype == bool and not whole)
    if not is_right or (ndim is not None and array.ndim != ndim):
        raise ValueError(f"{name} cannot be {array.dtype}{list(array.shape)}")
    if whole and not (np.asarray(array) == np.round(np.asarray(array))).all():
        raise ValueError(f"{name} must hold whole numbers")
    return array


def _selector(item: dict[str, Any], unread: dict[str, Any]) -> Selector:
    if "slice" in item:
        return Selector(item["axis"], slice(*item["slice"]))
    if "span" in item:
        return Selector(item["axis"], item["span"])
    payload = _array(item["payload"], unread, whole=True, ndim=0 if item["kind"] == "number" else 1)
    return Selector.stored(item["axis"], item["kind"], payload)
