"""Several processes, on one host or many, that share one run."""

import jax

from tljax.checks import typed
from tljax.errors import ShardingError
from tljax.scale.rendezvous import meet

_CPU_COLLECTIVES = "jax_cpu_collectives_implementation"


@typed
def connect(
    coordinator: str | None = None, n_processes: int | None = None, process: int | None = None, *, timeout: int = 120
) -> None:
    """Connects this process with the others of a run; each of them calls this before it does anything else with jax.

    It is ``jax.distributed.initialize``, with collectives that work on CPUs too, and an error that says who is missing.
    On TPU pods, under Slurm and under Open MPI the three arguments may be left out: jax finds them.

    Args:
        coordinator: address of process 0 and a free port of its host, such as ``"10.0.0.1:1234"``.
        n_processes: how many there are.
        process: number of this one, from 0.
        timeout: seconds to wait for the others.

    Raises:
        ShardingError: jax has been used already, the arguments do not fit, or the others did not come.
    """
    given = (coordinator, n_processes, process)
    if any(one is None for one in given) and not all(one is None for one in given):
        raise ShardingError(
            f"connect() was given coordinator={coordinator!r}, n_processes={n_processes} and process={process}: give "
            'all three, connect("10.0.0.1:1234", 2, 0), or none where jax finds them (TPU pods, Slurm, Open MPI).'
        )
    if n_processes is not None and process is not None and not 0 <= process < n_processes:
        raise ShardingError(f"process={process} of n_processes={n_processes}: processes are counted from 0.")
    if timeout < 1:
        raise ShardingError(f"timeout={timeout}: give the seconds to wait for the other processes, such as 120.")
    if jax.distributed.is_initialized():
        raise _too_late()
    if coordinator is not None and n_processes is not None and process is not None:
        meet(coordinator, n_processes, process, timeout)
    if getattr(jax.config, _CPU_COLLECTIVES) in (None, "none"):
        jax.config.update(_CPU_COLLECTIVES, "gloo")
    try:
        jax.distributed.initialize(coordinator, n_processes, process, initialization_timeout=timeout)
    except Exception as error:
        if "before any JAX" in str(error):
            raise _too_late() from error
        raise ShardingError(
            f"jax could not connect the processes: {error} Give coordinator, n_processes and process, "
            'connect("10.0.0.1:1234", 2, 0), where jax does not find them itself.'
        ) from error


def _too_late() -> ShardingError:
    return ShardingError(
        "jax has been used or connected in this process already, and connects before its first device is touched: call "
        "tljax.scale.connect() once, right after the imports."
    )
