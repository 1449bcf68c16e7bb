"""Has XLA compile quickly; imported before anything is compiled. Nearly all that the tests cost is compiling.

Without its newer emitters of fused loops XLA compiles for a CPU in a quarter of the time; that its programs are slower,
models of this size do not show. The flag is no promise of XLA's: it is tried first. ``--record-support`` does without.
"""

import os
import subprocess
import sys

_FLAG = "--xla_cpu_use_fusion_emitters=false"


def _is_known(flags: str) -> bool:
    """Whether XLA starts with these flags: one that it does not know ends the process."""
    code = "import jax; jax.numpy.zeros(1) + 1"
    known = subprocess.run([sys.executable, "-c", code], env=os.environ | {"XLA_FLAGS": flags}, capture_output=True)
    return known.returncode == 0


_flags = os.environ.get("XLA_FLAGS", "")
if _FLAG not in _flags and not any(argument.startswith("--record-support") for argument in sys.argv):
    _with_it = f"{_flags} {_FLAG}".strip()
    if _is_known(_with_it):
        os.environ["XLA_FLAGS"] = _with_it  # processes that tests start, such as notebooks' kernels, have it too
