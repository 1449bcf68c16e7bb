"""What each of two connected processes computes together with the other; ``processes_child.py`` runs it.

A directory holds what the parent prepared, and gets what it compares: ``found-RANK.json`` with the largest
difference, or the error, of each check.
"""

import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from process_parts import (
    CFG,
    HARVEST,
    POINTS,
    ROWS,
    STEPS,
    Stopped,
    activations,
    stops_at,
)
from sharded_child import METRIC, MODEL, OTHER, TOKENS, farthest, python_hooks

from tljax import HookedTransformer
from tljax.dictionaries.training import train_dictionary
from tljax.errors import CheckpointError, HarvestError, ShardingError
from tljax.harvest import ActivationStore, dividing, harvest
from tljax.patching import sweep
from tljax.processes import together, whole_mesh
from tljax.scale import fetch, make_mesh

RANK, HERE = jax.process_index(), Path(sys.argv[-1])


def a_forward(model: HookedTransformer) -> Any:
    logits, cache = model.run_with_cache(TOKENS)
    return fetch((logits, dict(cache.items()), model(TOKENS, return_type="loss")))


def hooks(model: HookedTransformer) -> Any:
    return fetch(python_hooks(model))


def a_sweep(model: HookedTransformer) -> Any:
    result = sweep(model, TOKENS, OTHER, METRIC, "resid_pre", reduce="none", progress=False)
    return np.asarray(result.values), np.asarray(result.baseline)


def generated(model: HookedTransformer) -> Any:
    return model.generate(TOKENS, max_new_tokens=3, do_sample=False, verbose=False, stop_at_eos=False)


def saved(model: HookedTransformer) -> Any:
    """Process 0 writes; both read all of it on one device."""
    directory = HERE / f"saved-{'mesh' if model.mesh is not None else RANK}"
    model.save_pretrained(directory)
    if model.mesh is not None:
        in_parts = HERE / "in-parts"
        model.save_pretrained(in_parts, in_parts=True)
        again = HookedTransformer.from_pretrained_no_processing(in_parts, mesh=model.mesh)
        assert farthest(fetch(again.params), MODEL.params) == 0
        files = (in_parts / "parameters" / "blocks.0.mlp.W_in" / "c").rglob("*")
        assert sum(path.is_file() for path in files) == 2  # each process wrote its half
        _raises(CheckpointError, "already", lambda: model.save_pretrained(in_parts, in_parts=True))
    return HookedTransformer.from_pretrained_no_processing(directory).params


def harvested_in_step(model: HookedTransformer) -> Any:
    """A model spread over both processes; its shards are written by turns."""
    if model.mesh is None:  # on one device; what it harvests is not divided
        return model.run_with_cache(ROWS[:6, :6] % 16, names_filter=POINTS[:1])[1][POINTS[0]].reshape(-1, 16)
    options: dict[str, Any] = {"batch_size": 2, "dtype": "float32", "shard_bytes": 1, "progress": False}
    store = harvest(model, ROWS[:6, :6] % 16, POINTS[:1], HERE / "in-step", **options)
    assert len(store.index.shards) == 3
    return store[POINTS[0]][:]


def loaded(_: Any) -> None:
    """Each process reads its devices' parts, and together they compute what one computes."""
    mesh = make_mesh(model=2, data=2)
    model, plain = (HookedTransformer.from_pretrained("tljax-tiny", **one) for one in ({"mesh": mesh}, {}))
    W_in = model.params["blocks"][0]["mlp"]["W_in"]
    held = {shard.index[1].start: shard.data.shape for shard in W_in.addressable_shards}
    assert held == {RANK * W_in.shape[1] // 2: (W_in.shape[0], W_in.shape[1] // 2)}
    np.testing.assert_allclose(fetch(model("one two")), plain("one two"), atol=2e-5)


def refused(sharded: HookedTransformer) -> None:
    """What differs between processes, or cannot be, is an error on both."""
    other = np.where(RANK == 1, (TOKENS + 1) % 16, TOKENS)
    for given in (other, TOKENS[: 2 + RANK]):
        _raises(ShardingError, "Prompts differ between processes: process 1", lambda given=given: sharded(given))
    _raises(ShardingError, "local_devices", lambda: make_mesh(2))
    _raises(ShardingError, "jax sees 4", lambda: make_mesh(8))
    _raises(HarvestError, "limit= and max_norm_ratio=", lambda: harvest(
        MODEL, TOKENS, POINTS[:1], HERE / "no", limit=4, max_norm_ratio=2.0))  # fmt: skip
    _raises(HarvestError, "Prompts or options of a harvest differ", lambda: harvest(
        MODEL, other, POINTS[:1], HERE / "no"))  # fmt: skip
    wrong = MODEL.replace(params=jax.tree.map(lambda leaf: leaf * (2 if RANK else 1), MODEL.params))
    _raises(HarvestError, "holds another harvest" if RANK else "failed on process 1", lambda: harvest(
        wrong, TOKENS, POINTS[:1], HERE / "other"))  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        if RANK == 1:
            patch.setattr(dividing, "write_part", _full)
        _raises(HarvestError, "disk is full" if RANK else "failed on process 1", lambda: harvest(
            MODEL, TOKENS, POINTS[:1], HERE / "full", batch_size=2, shard_bytes=1))  # fmt: skip

    def fails() -> None:
        with together(whole_mesh(), "Writing", CheckpointError):
            if RANK == 1:
                raise ValueError("mine")

    _raises(ValueError if RANK else CheckpointError, "mine" if RANK else "failed on process 1", fails)


def _full(*_: Any) -> None:
    raise HarvestError("the disk is full")


def on_its_own(_: Any) -> None:
    """A mesh of this process's devices needs no other process."""
    mesh = jax.sharding.Mesh(np.array(jax.local_devices()), ("model",))
    np.testing.assert_allclose(MODEL.shard(mesh)(TOKENS), MODEL(TOKENS), atol=2e-5)


def trained(_: Any) -> None:
    """Stops in the middle; one process goes on from there."""
    options: dict[str, Any] = {"steps": STEPS, "batch_size": 64, "directory": HERE / "trained", "save_every": 4}
    with pytest.raises(Stopped):
        train_dictionary(CFG, activations(), mesh=make_mesh(data=4), log_every=1, on_log=stops_at(6), **options)


def harvested(tiny: HookedTransformer) -> None:
    """Each process runs its own shards: anew, and going on with what one process left."""
    for name in ("whole", "left-by-one"):
        ActivationStore.verify(harvest(tiny, ROWS, POINTS, HERE / name, **HARVEST))


def killed(tiny: HookedTransformer) -> None:
    """Process 1 dies in its second shard; process 0 has then written both of its own, and waits until it is killed."""
    if RANK == 1:
        write = dividing.write_part

        def once(directory: Path, part: Any) -> None:
            if part.number > 1:
                while len([*directory.glob("part-*.json")]) < 3:  # until process 0 has written both of its own
                    time.sleep(0.02)
                os.kill(os.getpid(), signal.SIGKILL)
            write(directory, part)

        dividing.write_part = once
    harvest(tiny, ROWS, POINTS, HERE / "killed", **HARVEST)


def _raises(kind: type[Exception], part: str, call: Callable[[], Any]) -> None:
    with pytest.raises(kind, match=re.escape(part)):
        call()


COMPARED = (a_forward, hooks, a_sweep, generated, saved, harvested_in_step)
CLAIMS = (loaded, refused, on_its_own, trained)


def main() -> None:
    assert (jax.process_count(), jax.local_device_count()) == (2, 2)
    sharded, found = MODEL.shard(make_mesh(model=2, data=2)), dict[str, Any]()
    tiny = HookedTransformer.from_pretrained("tljax-tiny")
    for check in (*COMPARED, *CLAIMS, harvested, killed):
        began = time.process_time()
        try:
            if check in COMPARED:
                found[check.__name__] = farthest(check(MODEL), check(sharded))
            else:
                check(tiny if check in (harvested, killed) else sharded)
                found[check.__name__] = 0.0
        except Exception:
            found[check.__name__] = traceback.format_exc()[-3000:]
            (HERE / f"found-{RANK}.json").write_text(json.dumps(found))
            os._exit(1)  # the processes are not at the same place any more; the parent ends the other
        (HERE / f"found-{RANK}.json").write_text(json.dumps(found))
        print(check.__name__, found[check.__name__], f"{time.process_time() - began:.1f} s", flush=True)
