"""Arrays that lie on the devices of several processes: read on the host, and compared between processes.

A process reads of an array only what its own devices hold. Where that is not the whole, the functions here gather it,
which takes part of all processes of the array: each of them makes the same calls in the same order.
"""

import functools
import hashlib
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tljax.errors import ShardingError


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


def check_same(value: Any, what: str, mesh: Mesh) -> None:
    """Compares what every process of a mesh was given; each of them calls this.

    Raises:
        ShardingError: it is not the same on all of them.
    """
    if len({device.process_index for device in mesh.devices.flat}) < jax.process_count():
        return  # a comparison is made by all processes, and some have no part in this
    from jax.experimental import multihost_utils

    array = np.asarray(value)
    told = f"{array.dtype}{array.shape}".encode() + array.tobytes()
    own = np.frombuffer(hashlib.blake2b(told, digest_size=16).digest(), np.uint8)
    all_of_them = np.asarray(multihost_utils.process_allgather(own)).reshape(-1, own.size)
    others = [number for number, one in enumerate(all_of_them) if (one != all_of_them[0]).any()]
    if others:
        raise ShardingError(
            f"{what} differ between processes: process {others[0]} was given others than process 0 (this is process "
            f"{jax.process_index()}, with {array.dtype} {list(array.shape)}). A model on a mesh over several processes "
            "computes one run with all of them: give each of them the same prompts in the same order, and let the mesh "
            "divide them."
        )


def _is_far(leaf: Any) -> bool:
    return is_distributed(leaf) and not leaf.is_fully_replicated


def _whole_on_all(leaf: jax.Array) -> NamedSharding:
    if isinstance(leaf.sharding, NamedSharding):
        return NamedSharding(leaf.sharding.mesh, PartitionSpec())
    devices = sorted(leaf.sharding.device_set, key=lambda device: device.id)
    return NamedSharding(Mesh(np.array(devices), ("all",)), PartitionSpec())


@functools.lru_cache(64)
def _copier(targets: tuple[NamedSharding, ...]) -> Any:
    """Returns one compiled copy to some shardings; which is cached by jax for each set of shapes."""
    return jax.jit(lambda leaves: leaves, out_shardings=targets)
