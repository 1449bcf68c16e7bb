"""The devices of a training run: batches spread over a mesh, the state whole on each device of it."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tljax.dictionaries.training.batches import Pair
from tljax.errors import TrainingError
from tljax.processes import fetch, is_distributed, processes_of, put, together
from tljax.scale.batch import over_data
from tljax.scale.mesh import checked_mesh


@dataclasses.dataclass(frozen=True)
class Devices:
    """Where a run computes.

    Attributes:
        mesh: the mesh; ``None`` is one device.
    """

    mesh: Mesh | None = None

    @classmethod
    def of(cls, mesh: Any) -> "Devices":
        """Returns the devices of a mesh.

        Raises:
            ShardingError: this is no mesh, or no rule says what one of its axes is for.
        """
        return cls() if mesh is None else cls(checked_mesh(mesh, None)[0])

    def check_first(self, pair: Pair) -> None:
        """Raises ShardingError if the processes were given different batches."""
        if self.mesh is not None:
            for one in pair:
                if one is not None:
                    over_data(one, self.mesh)

    def batch(self, pair: Pair) -> tuple[Any, Any]:
        """Returns a batch with its tokens spread over the mesh."""
        if self.mesh is None:
            return pair
        x, y = (None if one is None else over_data(one, self.mesh, compare=False) for one in pair)
        return x, y

    def state(self, state: Any) -> Any:
        """Returns a state on every device."""
        if self.mesh is None:
            return state
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        return jax.tree.map(lambda leaf: put(leaf, everywhere), state)

    def on_host(self, state: Any) -> Any:
        """Returns a state that this process holds alone; all processes of the mesh call this."""
        if self.mesh is None or not is_distributed(self.mesh):
            return state
        return jax.tree.map(jnp.asarray, fetch(state))

    @contextlib.contextmanager
    def saving(self) -> Iterator[bool]:
        """Tells whether this process writes; ends with an error on all processes if that one could not.

        Raises:
            TrainingError: another process could not write.
        """
        if self.mesh is None or not is_distributed(self.mesh):
            yield True
            return
        with together(self.mesh, "Saving the state of training", TrainingError):
            yield jax.process_index() == processes_of(self.mesh)[0]


ONE = Devices()
"""One device."""
