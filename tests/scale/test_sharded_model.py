"""Everything public on eight fake CPU devices equals one device, and lies where the rules say."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sharded_child import CHECKS, ON_MESH

TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """The largest difference, or the error, of each check in a child process."""
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent), str(here.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip(),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": paths,
    }
    done = subprocess.run(
        [sys.executable, str(here / "sharded_child.py")], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", [*CHECKS, *ON_MESH])
def test_a_mesh_equals_one_device(name: str, found: dict[str, Any]) -> None:
    assert isinstance(found[name], float), found[name]
    assert found[name] <= TOLERANCE
