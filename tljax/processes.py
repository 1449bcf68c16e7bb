"""Arrays that lie on the devices of several processes: read on the host, and compared between processes.

A process reads of an array only what its own devices hold. Where that is not the whole, the functions here gather it,
which takes part of all processes of the array: each of them makes the same calls in the same order.
"""

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tljax.errors import CheckpointError, ShardingError, TljaxError


def fetch(value: Any) -> Any:
    """Returns arrays on the host, whole, on every process that holds a part of them.

    Of an array that this process can read alone (always, unless ``jax.distributed`` runs) it is ``np.asarray``.

    Args:
        value: an array, or a tree of them, such as logits, the entries of a cache or parameters.

    Returns:
        The same tree with numpy arrays. For arrays over several processes: all of these have to call this, in the same
        order, and every one of their devices holds the whole array for a moment.

    >>> import jax.numpy as jnp
    >>> from tljax.scale import fetch
    >>> fetch({"logits": jnp.ones(2)})
    {'logits': array([1., 1.], dtype=float32)}
    """
    return jax.tree.map(np.asarray, readable(value))


def as_numpy(value: Any) -> np.ndarray:
    """Returns ``np.asarray(value)``, of an array over several processes too: all of them call this."""
    return np.asarray(readable(value))


def readable(value: Any) -> Any:
    """Returns a tree whose arrays this process can read: those that it cannot are copied to all of their devices."""
    leaves, structure = jax.tree.flatten(value)
    far = [number for number, leaf in enumerate(leaves) if _is_far(leaf)]
    if not far:
        return value
    targets = tuple(_whole_on_all(leaves[number]) for number in far)
    gathered = _copier(targets)(tuple(leaves[number] for number in far))
    for number, leaf in zip(far, gathered, strict=True):
        leaves[number] = leaf
    return jax.tree.unflatten(structure, leaves)


def put(value: Any, sharding: Any) -> jax.Array:
    """Returns an array in a sharding; of one that each process holds whole, each places what its own devices get."""
    if isinstance(value, jax.Array) and not is_distributed(value) and not sharding.is_fully_addressable:
        value = np.asarray(value)  # jax refuses an array that was put on one device
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])
    return jax.device_put(value, sharding)


def put_like(value: Any, like: Any) -> Any:
    """Returns an array where ``like`` lies, if that is on devices of several processes."""
    if not is_distributed(like) or isinstance(value, Tracer) or value is like:
        return value
    return put(value, like.sharding)


def is_distributed(value: Any) -> bool:
    """Whether an array, or a mesh, is on devices of several processes."""
    if isinstance(value, Mesh):
        return len({device.process_index for device in value.devices.flat}) > 1
    return isinstance(value, jax.Array) and not isinstance(value, Tracer) and not value.is_fully_addressable


def processes_of(mesh: Mesh) -> tuple[int, ...]:
    """Returns the numbers of the processes that have devices in a mesh, ascending."""
    return tuple(sorted({device.process_index for device in mesh.devices.flat}))


def whole_mesh() -> Mesh:
    """Returns a mesh of all devices of all processes."""
    return Mesh(np.array(jax.devices()), ("all",))


def gather(own: bytes, mesh: Mesh) -> list[bytes]:
    """Returns what each process of a mesh gave, in the order of their numbers; all give equally many bytes."""
    row, devices = np.frombuffer(own, np.uint8)[None], np.array(list(mesh.devices.flat))
    sharding = NamedSharding(Mesh(devices, ("all",)), PartitionSpec("all"))
    rows = fetch(jax.make_array_from_callback((len(devices), row.shape[1]), sharding, lambda index: row))
    at = {device.process_index: number for number, device in enumerate(devices)}
    return [rows[at[process]].tobytes() for process in processes_of(mesh)]


def check_same(value: Any, what: str, mesh: Mesh, error: type[TljaxError] = ShardingError) -> None:
    """Compares what every process of a mesh was given; each of them calls this.

    Args:
        value: an array, or bytes.
        what: the thing in words, for the message: ``"Prompts"``.
        mesh: the processes are those of its devices.
        error: class of the error.

    Raises:
        ShardingError: (or ``error``) it is not the same on all of them.
    """
    array = np.frombuffer(value, np.uint8) if isinstance(value, bytes) else np.asarray(value)
    told = f"{array.dtype}{array.shape}".encode() + array.tobytes()
    all_of_them = gather(hashlib.blake2b(told, digest_size=16).digest(), mesh)
    others = [process for process, one in zip(processes_of(mesh), all_of_them, strict=True) if one != all_of_them[0]]
    if others:
        raise error(
            f"{what} differ between processes: process {others[0]} was given others than process "
            f"{processes_of(mesh)[0]}. Several processes compute one run together: make the same call on each of them, "
            "with the same prompts in the same order; the work is divided by tljax."
        )


@contextlib.contextmanager
def together(mesh: Mesh, what: str, error: type[TljaxError]) -> Iterator[None]:
    """Ends a block that all processes of a mesh run with an error on all of them if it had one on any.

    Raises:
        TljaxError: ``error``, where only other processes had one; where this one had, its own.
    """
    problem: Exception | None = None
    try:
        yield
    except Exception as raised:
        problem = raised
    signs = gather(bytes([problem is not None]), mesh)
    failed = [process for process, sign in zip(processes_of(mesh), signs, strict=True) if sign != b"\0"]
    if problem is not None:
        raise problem
    if failed:
        raise error(f"{what} failed on process {failed[0]}, whose own message says why; this one did nothing wrong.")


def write_together(
    value: Any, names: Iterable[str], tensor: Callable[[str], np.ndarray], write: Callable[[Any], None], what: str
) -> None:
    """Writes arrays of several processes: all of them gather one tensor after another, and the first of them writes.

    Args:
        value: an array among them; where it lies on one process, this is ``write(tensor)``.
        names: of the tensors, in the order that ``write`` asks for them.
        tensor: returns a tensor on the host; all processes call it.
        write: writes a file; called with ``tensor`` on one process.
        what: the file in words, for the message.

    Raises:
        CheckpointError: the process that writes failed.
    """
    if not is_distributed(value):
        return write(tensor)
    left = list(names)
    with in_step(value, what, CheckpointError):
        try:
            if leads(value):
                write(lambda name: tensor(left.pop(left.index(name))))
        finally:
            for name in left:  # the others, or those that the others still wait for
                tensor(name)


def leads(value: Any) -> bool:
    """Whether this process writes for all that hold parts of an array: it is alone, or the first of them."""
    return not is_distributed(value) or jax.process_index() == processes_of(_mesh_of(value))[0]


def in_step(value: Any, what: str, error: type[TljaxError]) -> contextlib.AbstractContextManager[None]:
    """Returns :func:`together` for the processes that hold parts of an array; nothing if there is one."""
    return together(_mesh_of(value), what, error) if is_distributed(value) else contextlib.nullcontext()


def _mesh_of(value: jax.Array) -> Mesh:
    return Mesh(np.array(sorted(value.sharding.device_set, key=lambda device: device.id)), ("all",))


def _is_far(leaf: Any) -> bool:
    return is_distributed(leaf) and not leaf.is_fully_replicated


def _whole_on_all(leaf: jax.Array) -> NamedSharding:
    if isinstance(leaf.sharding, NamedSharding):
        return NamedSharding(leaf.sharding.mesh, PartitionSpec())
    return NamedSharding(_mesh_of(leaf), PartitionSpec())


@functools.lru_cache(64)
def _copier(targets: tuple[NamedSharding, ...]) -> Any:
    """Returns one compiled copy to some shardings; which is cached by jax for each set of shapes."""
    return jax.jit(lambda leaves: leaves, out_shardings=targets)
