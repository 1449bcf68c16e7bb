"""The script for GPUs and TPUs, in its small form: numerics on this device, and what no longer fits is left out."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_small_form(tmp_path: Path) -> None:
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    script, path = str(ROOT / "benchmarks" / "accelerator.py"), tmp_path / "out.json"
    command = [sys.executable, script, "--seconds", "0", "--json", str(path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(path.read_text())
    assert len(found["numerics"]) == 8
    assert all(row["met"] == "yes" and float(row["error"]) > 0 for row in found["numerics"])
    assert [row["work"] for row in found["times"]][-3:] == ["EAP-IG", "a dictionary's step", "harvest"]
    assert {row["ms"] for row in found["times"]} == {"left out: no time"}
