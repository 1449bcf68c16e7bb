"""Files that are damaged, of two models, or not what their name says; what mutation finds is in test_fuzz_files.py."""

import contextlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file
from table import Case, World

import tljax
from tljax import ActivationCache, HookedTransformer
from tljax.errors import CacheError, CheckpointError
from tljax.viz.html import Html


def checkpoint(w: World, change: Any = None, file: str = "config.json") -> HookedTransformer:
    """The small model saved, a file of it changed, and loaded."""
    directory = Path(tempfile.mkdtemp())
    w.small.save_pretrained(directory)
    if change is not None:
        path = directory / file
        path.write_bytes(change(path.read_bytes()))
    return HookedTransformer.from_pretrained_no_processing(directory)


def mixed(w: World) -> HookedTransformer:
    """The weights of one save beside the config of another."""
    one, two = (Path(tempfile.mkdtemp()) for _ in range(2))
    w.small.save_pretrained(one)
    HookedTransformer(w.config(seed=3, act_fn="gelu")).save_pretrained(two)
    shutil.copy(one / "model.safetensors", two)
    return HookedTransformer.from_pretrained_no_processing(two)


def over(w: World) -> HookedTransformer:
    """A model without a tokenizer saved over one that has one."""
    directory = Path(tempfile.mkdtemp())
    w.tiny.save_pretrained(directory)
    w.small.save_pretrained(directory)
    return HookedTransformer.from_pretrained_no_processing(directory)


def cache_file(w: World, change: Any = None) -> Path:
    path = Path(tempfile.mkdtemp()) / "cache.safetensors"
    w.small.run_with_cache(np.array([[1, 2, 3]]))[1].save(path)
    if change is not None:
        path.write_bytes(change(path.read_bytes()))
    return path


def rewritten(w: World) -> ActivationCache:
    """A cache whose arrays were changed by a script that kept the header's notes."""
    from safetensors import safe_open

    path = cache_file(w)
    with safe_open(path, "numpy") as file:
        notes = file.metadata()
    arrays = load_file(path)
    arrays["blocks.0.hook_resid_post"] = arrays["blocks.0.hook_resid_post"] + 1
    save_file(arrays, path, notes)
    return ActivationCache.load(path)


def flipped(place: int) -> Any:
    return lambda raw: raw[:place] + bytes([raw[place] ^ 1]) + raw[place:][1:]


def hooks_file(hooks: list[Any]) -> Path:
    """Interventions as they were written before there were checksums, by hand."""
    path = Path(tempfile.mkdtemp()) / "hooks.safetensors"
    save_file(
        {"0.value": np.ones(3, np.float32)}, path, {"format": "tljax-interventions-1", "hooks": json.dumps(hooks)}
    )
    return path


def hook(**changes: Any) -> list[Any]:
    arrays = {"value": "0.value", "mask": None}
    return [
        {"name": "hook_embed", "intervention": {"type": "Add", "arrays": arrays, "settings": {}, "at": []} | changes}
    ]


def page_on_a_full_disk() -> str:
    path = Path(tempfile.mkdtemp()) / "page.html"
    Html("<p>whole</p>").save(path)
    with contextlib.suppress(UnicodeEncodeError):
        Html("\ud800").save(path)
    return "whole" if "<p>whole</p>" in path.read_text() else "lost"


DEEP = b"[" * 100_000

CASES = [
    Case("a config that was edited", lambda w: checkpoint(w, lambda raw: raw.replace(b'"relu"', b'"gelu"')),
         CheckpointError, "was changed after it was written", "model.replace(cfg="),
    Case("a config with ten million layers",
         lambda w: checkpoint(w, lambda raw: raw.replace(b'"n_layers": 1', b'"n_layers": 10000000')), CheckpointError),
    Case("a config nested too deeply", lambda w: checkpoint(w, lambda _: DEEP), CheckpointError, "nested too deeply"),
    Case("a config that was only laid out anew",
         lambda w: checkpoint(w, lambda raw: json.dumps(json.loads(raw)).encode())(np.array([[1, 2]])),
         equals=lambda w: w.small(np.array([[1, 2]]))),
    Case("a bit of the weights", lambda w: checkpoint(w, flipped(-3), "model.safetensors"), CheckpointError,
         "does not have the checksum"),
    Case("weights and config of two saves", mixed, CheckpointError, "two different saves"),
    Case("another model's tokenizer", lambda w: over(w).tokenizer is None, equals=True),
    Case("a bit of a cache", lambda w: ActivationCache.load(cache_file(w, flipped(-3))), CacheError, "checksum"),
    Case("a cache that a script changed", rewritten, CacheError, "damaged or incomplete"),
    Case("a flag of a wrong type", lambda w: ActivationCache.load(
        cache_file(w, lambda raw: raw.replace(b'"has_batch_dim":"true"', b'"has_batch_dim":"null"'))), CacheError),
    Case("interventions written by hand",
         lambda w: np.asarray(tljax.load_interventions(hooks_file(hook()))[0][1].value),
         equals=np.ones(3)),
    Case("an intervention that there is none of", lambda w: tljax.load_interventions(hooks_file(hook(type="jnp"))),
         CheckpointError, "'jnp'", "ProjectOut"),
    Case("an intervention without its value",
         lambda w: tljax.load_interventions(hooks_file(hook(arrays={"value": None, "mask": None}))), CheckpointError,
         "needs its value"),
    Case("an array that is not there",
         lambda w: tljax.load_interventions(hooks_file(hook(arrays={"value": "x", "mask": None}))), CheckpointError,
         "lacks the array 'x'"),
    Case("an array that nothing reads", lambda w: tljax.load_interventions(hooks_file([])), CheckpointError,
         "nothing reads"),
    Case("an axis that there is none of", lambda w: tljax.load_interventions(
        hooks_file(hook(at=[{"axis": "heads", "slice": [0, 1, None]}]))), CheckpointError, "an intervention['at'][0]"),
    Case("a page that cannot be written keeps the old one", lambda w: page_on_a_full_disk(), equals="whole"),
]  # fmt: skip
