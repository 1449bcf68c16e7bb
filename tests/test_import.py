"""Importing tljax is quick and touches nothing."""

import subprocess
import sys

SCRIPT = """
import sys, time
start = time.perf_counter()
import tljax
seconds = time.perf_counter() - start
from jax._src import xla_bridge
import jax
heavy = sorted({name.split(".")[0] for name in sys.modules} & {"torch", "transformers", "matplotlib", "optax"})
assert not heavy, heavy
assert not xla_bridge._backends, xla_bridge._backends
print(seconds)
"""

OPTIONS = """
import jax
before = dict(jax.config.values)
import tljax
assert dict(jax.config.values) == before
"""


def run(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_quick_and_light() -> None:
    assert min(float(run(SCRIPT)) for _ in range(2)) < 2


def test_import_sets_no_jax_option() -> None:
    run(OPTIONS)


def test_each_room_can_be_imported_first() -> None:
    code = """
import importlib, sys
import tljax
for room in tljax._ROOMS:
    for name in [name for name in sys.modules if name.split(".")[0] == "tljax"]:
        del sys.modules[name]
    importlib.import_module(f"tljax.{room}")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
