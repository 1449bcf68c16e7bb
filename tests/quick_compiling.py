"""Has JAX compile quickly; imported before anything is compiled. Nearly all that the tests cost is compiling.

Without its newer emitters of fused loops XLA compiles for a CPU in a quarter of the time, and one thread is quicker for
programs of this size; that they are slower, models of this size do not show. The flags are no promise of XLA's: they
are tried first. ``--record-support`` does without all of it. Workers and the processes that tests start, such as
notebooks' kernels, inherit what is set here.
"""

import os
import subprocess
import sys

_FLAGS = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
_SETTINGS = {
    "jax_disable_most_optimizations": True,
    "jax_traceback_in_locations_limit": 0,
    "jax_include_full_tracebacks_in_locations": False,
}


def _are_known(flags: str) -> bool:
    """Whether XLA starts with these flags: one that it does not know ends the process."""
    code = "import jax; jax.numpy.zeros(1) + 1"
    known = subprocess.run([sys.executable, "-c", code], env=os.environ | {"XLA_FLAGS": flags}, capture_output=True)
    return known.returncode == 0


def _compile_quickly() -> None:
    flags = os.environ.get("XLA_FLAGS", "")
    if _FLAGS not in flags and _are_known(f"{flags} {_FLAGS}".strip()):
        os.environ["XLA_FLAGS"] = f"{flags} {_FLAGS}".strip()
    os.environ.update({name.upper(): str(int(value)) for name, value in _SETTINGS.items()})

    import jax

    for name, value in _SETTINGS.items():
        jax.config.update(name, value)


_is_worker = "PYTEST_XDIST_WORKER" in os.environ
if not _is_worker and not any(argument.startswith("--record-support") for argument in sys.argv):
    _compile_quickly()
