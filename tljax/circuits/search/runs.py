"""A run of learning: its settings step by step, the loop over steps, and the evaluation of what it found."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from tljax.circuits.graph import ResidualGraph
from tljax.circuits.search.pairs import Pairs, in_batches
from tljax.circuits.search.training import Form, Method, Numbers, State, begin, distances, training_step
from tljax.config import HookedTransformerConfig
from tljax.errors import InputError, TrainingError
from tljax.progress import Progress
from tljax.typing import Params

_PENALTIES = {"edge_pruning": 0.0, "subnetwork_probing": 10.0, "ugs": 1e-3}
_TARGET = 0.95
_CHECK_EVERY = 25
_NO_GAP = 1e-6
"""Distance, in nats, below which a circuit without edges does what the model does."""


@dataclasses.dataclass(frozen=True)
class Stack:
    """Settings of the circuits that are learned together, one entry for each.

    Attributes:
        seed, target, penalty: of each circuit.
        node_target, node_penalty: of each circuit.
        several: whether any of them was given as a list.
    """

    seed: tuple[int, ...]
    target: tuple[float, ...]
    penalty: tuple[float, ...]
    node_target: float
    node_penalty: tuple[float, ...]
    several: bool

    def __len__(self) -> int:
        return len(self.seed)

    @classmethod
    def of(cls, method: Method, target: Any, penalty: Any, node_target: Any, node_penalty: Any, seed: Any) -> "Stack":
        """Checks what the user gave, and fills in defaults.

        Raises:
            InputError: a setting of another method, one out of range, or lists of different lengths.
        """
        _check_fits(method, target, penalty, node_target, node_penalty)
        given = {"seed": seed, "target": _or(target, _TARGET), "penalty": _or(penalty, _PENALTIES[method])}
        lists = {name: len(value) for name, value in given.items() if np.ndim(value)}
        if len(set(lists.values())) > 1 or 0 in lists.values():
            said = ", ".join(f"{count} of {name}" for name, count in lists.items())
            raise InputError(f"Lists of settings go in parallel, one entry for each circuit; there are {said}.")
        count = next(iter(lists.values()), 1)
        every = {name: tuple(np.broadcast_to(value, count).tolist()) for name, value in given.items()}
        for name, value in (*(("target", one) for one in every["target"]), ("node_target", node_target)):
            if value is not None and not 0 < value < 1:
                raise InputError(f"{name}={value} is the share to take out, more than 0 and less than 1.")
        if min(*every["penalty"], node_penalty or 0, 0) < 0:
            raise InputError(f"penalty={penalty} and node_penalty={node_penalty} are costs: give numbers from 0 up.")
        default = tuple(min(one / 2, 2e-4) for one in every["penalty"])
        of_nodes = default if node_penalty is None else (float(node_penalty),) * count
        seeds = tuple(int(one) for one in every["seed"])
        return cls(seeds, every["target"], every["penalty"], node_target or 0.0, of_nodes, bool(lists))


def _or(value: Any, default: float) -> Any:
    return default if value is None else value


def _check_fits(method: Method, target: Any, penalty: Any, node_target: Any, node_penalty: Any) -> None:
    """Refuses settings that the method would not read."""
    wanted = {"edge_pruning": ("target", "node_target"), "ugs": ("penalty", "node_penalty")}
    given = {"target": target, "penalty": penalty, "node_target": node_target, "node_penalty": node_penalty}
    reads = wanted.get(method, ("penalty",))
    for name, value in given.items():
        if value is not None and name not in reads:
            raise InputError(
                f"method={method!r} does not read {name}=; it takes {' and '.join(f'{one}=' for one in reads)}."
            )


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Numbers that change from step to step; the shares are those of edge pruning's 3,000 steps.

    Attributes:
        method: the method.
        steps: number of steps.
        rate: the highest learning rate.
        ramp: how the target rises.
    """

    method: Method | Literal["fixed"]
    steps: int
    rate: float
    ramp: Literal["linear", "log"]

    def rate_at(self, step: int) -> np.float32:
        """Returns the learning rate of a step."""
        if self.method != "edge_pruning":
            return np.float32(self.rate)
        return np.float32(self.rate * min((step + 1) / max(1, self.steps // 15), 1))

    def targets_at(self, step: int, target: Sequence[float]) -> np.ndarray:
        """Returns the targets of a step."""
        share = min(1.0, (step + 1) / max(1, self.steps * 5 // 6))
        last = np.asarray(target, np.float32)
        return last * np.float32(share) if self.ramp == "linear" else 1 - (1 - last) ** np.float32(share)


@dataclasses.dataclass(frozen=True)
class Training:
    """What is trained on.

    Attributes:
        cfg, graph, form, params, pairs: as in :func:`~tljax.circuits.search.training.training_step`.
        batch_size: prompts in each step.
    """

    cfg: HookedTransformerConfig
    graph: ResidualGraph
    form: Form
    params: Params
    pairs: Pairs
    batch_size: int

    def run(
        self,
        stack: Stack,
        schedule: Schedule,
        constants: dict[str, jax.Array] | None,
        progress: bool | None,
        gates: dict[str, jax.Array] | None = None,
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Runs all steps, from the method's own gates unless others are given.

        Returns:
            What was learned, and the history ``[circuit, step]``; on the host.
        """
        orders = [_Order(self.pairs.n_prompts, self.batch_size, seed) for seed in stack.seed]
        state = begin(self.form, self._first_gates(stack.seed) if gates is None else gates, constants)
        seeds = np.asarray(stack.seed, np.uint32)
        costs = (np.asarray(value, np.float32) for value in (stack.penalty, stack.node_penalty))
        fixed = dict(zip(("penalty", "node_penalty"), costs, strict=True))
        history: list[dict[str, Any]] = []
        with Progress(schedule.steps, progress, "learning", "step") as bar:
            for step in range(schedule.steps):
                rows = np.stack([order.rows(step) for order in orders])
                targets = (schedule.targets_at(step, one) for one in (stack.target, [stack.node_target] * len(stack)))
                numbers = Numbers(seeds, *targets, **fixed)
                state, measured = self._step(state, rows, numbers, np.int32(step), schedule.rate_at(step))
                history.append(measured)
                bar.advance(1)
                if (step + 1) % _CHECK_EVERY == 0 or step + 1 == schedule.steps:
                    history[-_CHECK_EVERY:] = jax.device_get(history[-_CHECK_EVERY:])
                    _check_finite(history, _CHECK_EVERY)
        columns = {name: np.stack([entry[name] for entry in history], axis=-1) for name in history[0]}
        return jax.device_get(state["learned"]), columns

    def distances(self, masks: np.ndarray, constants: Any = None) -> np.ndarray:
        """Returns the distance of each mask ``[circuit, writer, reader]``, mean over all prompts, ``[circuit]``."""
        total = np.zeros(len(masks))
        for rows, kept in in_batches(self.pairs.n_prompts, self.batch_size):
            found = distances(self.cfg, self.graph, self.form, self.params, self.pairs, rows, masks, constants)
            total += np.asarray(found, np.float64)[:, :kept].sum(axis=1)
        return total / self.pairs.n_prompts

    def check_gap(self, count: int, constants: Any) -> np.ndarray:
        """Returns the distance of circuits without edges, ``[circuit]``.

        Raises:
            InputError: it is that of the model.
            TrainingError: it is no finite number.
        """
        shape = (count, *self.graph.shape)
        empty, whole = (self.distances(np.full(shape, value), constants) for value in (False, True))
        if not (np.isfinite(empty).all() and np.isfinite(whole).all()):
            raise TrainingError(
                f"The model without edges is {empty[0]} from what is wanted, the whole model {whole[0]}: its "
                "activations are not finite. Look for NaN in the parameters, or run it in float32."
            )
        if np.abs(empty - whole).max() < _NO_GAP * max(1.0, np.abs(whole).max()):
            raise InputError(
                "A circuit without edges does what the model does, so that there is nothing to find: what absent edges "
                "carry is what they carry already. Is the source the same as the prompts?"
            )
        return empty

    def mean_constants(self, count: int) -> dict[str, jax.Array]:
        """Returns the constants to start from, the means, by full name ``[circuit, ...]``."""
        assert self.pairs.means is not None
        return {name: jnp.tile(mean, (count, *(1,) * (mean.ndim - 1))) for name, mean in self.pairs.means.items()}

    def _step(
        self, state: State, rows: np.ndarray, numbers: Numbers, step: np.int32, rate: np.float32
    ) -> tuple[State, dict[str, jax.Array]]:
        fixed = self.cfg, self.graph, self.form, self.params, self.pairs
        return training_step(*fixed, state, rows, numbers, step, rate)

    def _first_gates(self, seeds: Sequence[int]) -> dict[str, jax.Array]:
        """Returns the log odds that gates start with, each leaf ``[circuit, ...]``."""
        method, shape = self.form.method, self.graph.shape
        if method == "ugs":
            return {"edges": jnp.ones((len(seeds), *shape))}
        if method == "subnetwork_probing":
            open_at_first = (0.9 + 0.1) / 1.2
            return {"edges": jnp.full((len(seeds), *shape), np.log(open_at_first / (1 - open_at_first)))}
        draws = [np.random.default_rng([seed, 2]) for seed in seeds]
        gates = {"edges": np.stack([draw.normal(10, 0.01, shape) for draw in draws])}
        if self.form.nodes:
            gates["nodes"] = np.stack([draw.normal(10, 0.01, shape[0]) for draw in draws])
        return {name: jnp.asarray(value, jnp.float32) for name, value in gates.items()}


@dataclasses.dataclass(frozen=True)
class _Order:
    """Which prompts each step takes: all of them once, in a random order, then in another."""

    n_prompts: int
    batch_size: int
    seed: int

    def rows(self, step: int) -> np.ndarray:
        """Returns the numbers of a step's prompts, ``[row]``."""
        places = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        rounds, within = np.divmod(places, self.n_prompts)
        orders = {n: np.random.default_rng([self.seed, 1, n]).permutation(self.n_prompts) for n in np.unique(rounds)}
        return np.asarray([orders[n][place] for n, place in zip(rounds, within, strict=True)], np.int32)


def _check_finite(history: Sequence[dict[str, np.ndarray]], newest: int) -> None:
    first = max(0, len(history) - newest)
    for step, entry in enumerate(history[first:], first):
        if not np.isfinite(entry["loss"]).all():
            raise TrainingError(
                f"The loss of step {step} is {entry['loss'].tolist()}. Lower learning_rate; if the loss was not finite "
                "from the start, look for what makes the metric so."
            )
