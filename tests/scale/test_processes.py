"""Two processes connected by ``jax.distributed`` compute, load, harvest and train what one does."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from process_parts import CFG, HARVEST, POINTS, ROWS, STEPS, activations

from tljax import HookedTransformer, safetensors_files
from tljax.dictionaries.training import train_dictionary
from tljax.errors import CheckpointError, ShardingError
from tljax.harvest import harvest
from tljax.scale import connect

TOLERANCE = 2e-5
LIMIT = 300
"""Seconds after which processes that hang are ended; they take some 20 on two idle cores."""
CHECKS = ("a_forward", "hooks", "a_sweep", "generated", "saved", "harvested_in_step", "loaded", "refused", "on_its_own",
          "trained", "harvested")  # fmt: skip


class Cut(BaseException):
    """Stands for what no handler catches."""


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="module")
def together(tiny: HookedTransformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory in which two processes left their results, ended by the parent where the test is that they die."""
    here = tmp_path_factory.mktemp("together")
    _left_by_one(tiny, here / "left-by-one")
    tests = Path(__file__).parents[1]
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2".strip(),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(
            [*map(str, (tests / "scale", tests, tests.parent)), os.environ.get("PYTHONPATH", "")]
        ),
    }
    port, children = free_port(), []
    for rank in range(2):
        with (here / f"log-{rank}").open("wb") as log:
            command = [sys.executable, str(tests / "scale" / "processes_child.py"), str(port), str(rank), str(here)]
            children.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        until = time.monotonic() + LIMIT
        while time.monotonic() < until and all(child.poll() is None for child in children):
            time.sleep(0.1)  # the second kills itself in the last check
    finally:
        for child in children:
            child.kill()
            child.wait()
    return here


def _left_by_one(tiny: HookedTransformer, directory: Path) -> None:
    """Makes a harvest that stops in its second shard."""
    real, calls = safetensors_files.checksum, 0

    def checksum(*given: Any) -> str:
        nonlocal calls
        calls += 1
        if calls == 20:
            raise Cut
        return real(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors_files, "checksum", checksum)
        with pytest.raises(Cut):
            harvest(tiny, ROWS, POINTS, directory, **HARVEST)


@pytest.fixture(scope="module")
def whole(tiny: HookedTransformer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files that one process harvests."""
    directory = tmp_path_factory.mktemp("whole")
    harvest(tiny, ROWS, POINTS, directory, **HARVEST)
    return contents(directory)


@pytest.mark.parametrize("name", CHECKS)
def test_two_processes_equal_one(name: str, together: Path) -> None:
    for rank in range(2):
        log = (together / f"log-{rank}").read_text(errors="replace")[-3000:]
        path = together / f"found-{rank}.json"
        found = json.loads(path.read_text()) if path.is_file() else {}
        assert isinstance(found.get(name), float), f"process {rank}: {found.get(name)}\n{log}"
        assert found[name] <= TOLERANCE


@pytest.mark.parametrize("name", ["whole", "left-by-one"])
def test_a_divided_harvest_has_the_bytes_of_one_process(name: str, together: Path, whole: dict[str, bytes]) -> None:
    assert contents(together / name) == whole


def test_one_process_goes_on_where_one_of_two_was_killed(
    together: Path, whole: dict[str, bytes], tiny: HookedTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = {name for name in contents(together / "killed") if not name.startswith(".")}
    parts = {
        f"{kind}-0000{number}.{end}"
        for number in (0, 1, 2)
        for kind, end in (("part", "json"), ("shard", "safetensors"))
    }
    assert parts <= left, left
    ran: list[int] = []
    monkeypatch.setattr(HookedTransformer, "run_with_cache", _counting(ran))
    harvest(tiny, ROWS, POINTS, together / "killed", **HARVEST)
    assert contents(together / "killed") == whole
    assert len(ran) == 1  # the batch of the last shard


def _counting(ran: list[int]) -> Any:
    real = HookedTransformer.run_with_cache

    def run(self: HookedTransformer, *given: Any, **options: Any) -> Any:
        ran.append(1)
        return real(self, *given, **options)

    return run


def test_one_process_reads_what_two_wrote_in_parts(together: Path, tmp_path: Path) -> None:
    model = HookedTransformer.from_pretrained_no_processing(together / "in-parts")
    again = HookedTransformer.from_pretrained_no_processing(together / "saved-mesh")
    assert jax.tree.all(jax.tree.map(np.array_equal, model.params, again.params))
    copied = tmp_path / "copied"
    shutil.copytree(together / "in-parts", copied)
    part = next(path for path in (copied / "parameters" / "blocks.1.mlp.W_in" / "c").rglob("*") if path.is_file())
    part.write_bytes(part.read_bytes()[:-8] + b"\0" * 8)
    with pytest.raises(CheckpointError, match=r"blocks.1.mlp.W_in is damaged"):
        HookedTransformer.from_pretrained_no_processing(copied)
    part.unlink()  # a part that is missing is not taken for zeros
    with pytest.raises(CheckpointError, match="NaN"):
        HookedTransformer.from_pretrained_no_processing(copied)


def test_one_process_goes_on_with_what_two_trained(together: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": STEPS, "batch_size": 64, "log_every": 1}
    done: list[int] = []
    again = train_dictionary(
        CFG,
        activations(),
        directory=together / "trained",
        resume=True,
        on_log=lambda row: done.append(row["step"]),
        **options,
    )
    alone = train_dictionary(CFG, activations(), **options)
    assert done == [5, 6, 7, 8, 9, 10]  # four steps were those of two processes
    np.testing.assert_allclose(again.history["loss"], alone.history["loss"], rtol=1e-5)
    for one, other in zip(jax.tree.leaves(again.dictionary), jax.tree.leaves(alone.dictionary), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("process", [0, 1])
def test_a_missing_process_is_named(process: int) -> None:
    began = time.monotonic()
    with pytest.raises(ShardingError, match=rf"After 1 seconds process {1 - process} had not come to localhost:\d+"):
        connect(f"localhost:{free_port()}", 2, process, timeout=1)
    assert time.monotonic() - began < 30
