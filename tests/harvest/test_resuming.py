"""A harvest that is stopped anywhere, and made again, leaves the same bytes; readers never see half a shard."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tljax import HookedTransformer, safetensors_files
from tljax.errors import HarvestError
from tljax.harvest import ActivationStore, harvest

ROWS = np.random.default_rng(0).integers(1, 900, (26, 16)).astype(np.int32)
POINTS = ["blocks.0.hook_resid_post", "blocks.1.attn.hook_z"]
OPTIONS: dict[str, Any] = {
    "batch_size": 4, "shard_bytes": 40_000, "covariance": True, "skip_special": [5, 6, 7], "max_norm_ratio": 1.3
}  # fmt: skip


class Stopped(BaseException):
    """Stands for what no handler catches."""


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def whole(tiny: HookedTransformer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a harvest that nothing stopped: four shards and an index."""
    directory = tmp_path_factory.mktemp("whole")
    harvest(tiny, ROWS, POINTS, directory, **OPTIONS)
    found = contents(directory)
    assert len(found) == 5
    return found


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_stopped_at_every_step_of_writing(
    tiny: HookedTransformer, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    real = getattr(os, call)
    steps = {"fsync": 19, "replace": 10}[call]  # an index at the start, then four shards and after each an index
    for step in range(1, steps):
        directory, calls = tmp_path / str(step), 0

        def stops(*given: Any, at: int = step) -> Any:
            nonlocal calls
            calls += 1
            if calls == at:
                raise Stopped
            return real(*given)

        monkeypatch.setattr(safetensors_files.os, call, stops)
        with pytest.raises(Stopped):
            harvest(tiny, ROWS, POINTS, directory, **OPTIONS)
        monkeypatch.undo()
        if (directory / "index.json").is_file() and b'"shards": []' not in (directory / "index.json").read_bytes():
            part = ActivationStore.open(directory, partial=True)
            part.verify()  # whatever is listed is whole
        harvest(tiny, ROWS, POINTS, directory, **OPTIONS)
        assert contents(directory) == whole, step


KILLED = """
import os, signal, sys
import numpy as np
from tljax import HookedTransformer, safetensors_files
from tljax.harvest import harvest
rows = np.random.default_rng(0).integers(1, 900, (26, 16)).astype(np.int32)
write, calls = safetensors_files.checksum, 0
def checksum(array):
    global calls
    calls += 1
    if calls == 20:  # in the middle of the second shard
        os.kill(os.getpid(), signal.SIGKILL)
    return write(array)
safetensors_files.checksum = checksum
harvest(HookedTransformer.from_pretrained("tljax-tiny"), rows, {points!r}, sys.argv[1], **{options!r})
"""


def test_killed_in_the_middle_of_a_shard(tiny: HookedTransformer, whole: dict[str, bytes], tmp_path: Path) -> None:
    script = KILLED.format(points=POINTS, options=OPTIONS)
    ended = subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=dict(os.environ), check=False)
    assert ended.returncode == -signal.SIGKILL
    left = contents(tmp_path)
    assert any(name.startswith(".shard-00001") for name in left)  # half a shard, which nobody reads
    with pytest.raises(HarvestError, match="stopped after 1 shards"):
        ActivationStore.open(tmp_path)
    assert len(ActivationStore.open(tmp_path, partial=True)) < 128
    harvest(tiny, ROWS, POINTS, tmp_path, **OPTIONS)
    assert contents(tmp_path) == whole


def test_a_full_disk_leaves_nothing_half_written(
    tiny: HookedTransformer, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(safetensors_files.os, "fsync", full)
    with pytest.raises(HarvestError, match=r"the disk is full. The 1 shards before it are whole.*goes on"):
        harvest(tiny, ROWS, POINTS, tmp_path, **OPTIONS)
    assert set(contents(tmp_path)) <= {"index.json", "shard-00000.safetensors", "shard-00001.safetensors"}
    harvest(tiny, ROWS, POINTS, tmp_path, **OPTIONS)
    assert contents(tmp_path) == whole


def test_a_disk_too_small_is_refused_before_anything_runs(
    tiny: HookedTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tljax.harvest.running.shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(HarvestError, match=r"416 tokens take .* GB free. Harvest fewer tokens"):
        harvest(tiny, ROWS, POINTS, tmp_path / "new", **OPTIONS)
    assert not (tmp_path / "new").exists()


def test_made_again_it_runs_nothing(
    tiny: HookedTransformer, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, data in whole.items():
        (tmp_path / name).write_bytes(data)
    monkeypatch.setattr("tljax.harvest.collecting.run_to_points", None)
    assert len(harvest(tiny, ROWS, POINTS, tmp_path, **OPTIONS)) > 300
    assert contents(tmp_path) == whole


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"batch_size": 2}, "batch_size=4 and 2"),
        ({"points": POINTS[:1]}, r"points: blocks.1.attn.hook_z only there"),
        ({"dtype": "float32"}, "dtype='bfloat16' and 'float32'"),
        ({"max_norm_ratio": None}, "max_norm_ratio=1.3 and None"),
        ({"prompts": ROWS[::-1]}, r"other prompts: they differ in windows 0 to 7"),
        ({"prompts": ROWS[:20]}, r"other prompts: they differ in windows 16 to 23"),
        ({"prompts": np.concatenate([ROWS, ROWS])}, r"other prompts: they differ in windows 24 to 25"),
        ({"resume": False}, "holds a harvest already: resume=True"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_harvest_is_refused_by_what_differs(
    tiny: HookedTransformer, whole: dict[str, bytes], tmp_path: Path, changed: dict[str, Any], says: str
) -> None:
    for name, data in whole.items():
        (tmp_path / name).write_bytes(data)
    given = {"prompts": ROWS, "points": POINTS, **OPTIONS} | changed
    with pytest.raises(HarvestError, match=says):
        harvest(tiny, given.pop("prompts"), given.pop("points"), tmp_path, **given)
    assert contents(tmp_path) == whole
