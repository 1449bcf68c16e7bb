"""The script for GPUs and TPUs, in its small form: numerics on this device, rows run to their end, failures told."""

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROWS = ["residual sweep", "EAP-IG", "a dictionary's step", "harvest"]
"""What only this script calls in this way; its other rows are calls that every other test makes."""


def run_script(path: Path, *options: str) -> tuple[int, dict, str]:
    """Returns the exit status, the file that was written, and what was printed."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    script = str(ROOT / "benchmarks" / "accelerator.py")
    command = [sys.executable, script, "--no-torch", "--json", str(path), *options]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    return done.returncode, json.loads(path.read_text()), done.stdout + done.stderr[-3000:]


def test_small_form(tmp_path: Path) -> None:
    options = ["--repeats", "1", "--budget", "0", "--dtypes", "bfloat16", "--rows", *ROWS]
    status, found, printed = run_script(tmp_path / "out.json", *options)
    assert status == 0, printed
    assert [row["attention"] for row in found["numerics"]] == ["matrix named"] * 2 + ["blockwise"] * 2
    assert all(row["met"] == "yes" and float(row["error"]) > 0 for row in found["numerics"])
    assert [row["work"] for row in found["times"]] == ROWS
    assert all(row["ms"] > 0 and row["turns"] == 1 and not row["error"] for row in found["times"])


def test_failures_and_lack_of_time_stop_nothing(monkeypatch) -> None:
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.6")  # as the script sets it
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    accelerator = importlib.import_module("accelerator")

    def fails(_: int) -> None:
        raise RuntimeError("out of memory")

    class Work:
        torch_error = ""

        def pieces(self) -> list:
            ours = {"tljax": lambda _: None}
            return [
                ("fails", lambda: {"tljax": fails}),
                ("peer", lambda: ours | {"torch": fails}),
                ("ours", lambda: ours),
            ]

    *rows, last = accelerator.timed(Work(), 2, 60.0, time.perf_counter() + 60)
    assert (rows[0]["error"], rows[0]["ms"]) == ("RuntimeError: out of memory", "")
    assert rows[1]["error"] == "beside torch: RuntimeError: out of memory"
    assert [row["turns"] for row in (rows[1], last)] == [2, 2]
    assert {row["ms"] for row in accelerator.timed(Work(), 2, 60.0, 0.0)} == {"left out: no time"}
