"""One step of learning masks and constants, compiled once, and the evaluation of masks on the same prompts."""

import dataclasses
import functools
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import optax

from tljax.circuits.graph import ResidualGraph
from tljax.circuits.masked import masked_stream
from tljax.circuits.search.gates import hard_concrete, open_chance, uniform_gradient
from tljax.circuits.search.pairs import Pairs, replacement_of, with_constants
from tljax.config import HookedTransformerConfig
from tljax.model.losses import divergences, log_probabilities
from tljax.patching.metrics.evaluation import traced_metric
from tljax.patching.metrics.reads import unembed
from tljax.typing import Params

Method = Literal["edge_pruning", "subnetwork_probing", "ugs"]
Objective = Literal["keep", "lower", "raise"]

_CONSTANTS_RATE = 1e-3
_FORGETTING = {"edge_pruning": 0.95, "subnetwork_probing": 0.999, "ugs": 0.995, "fixed": 0.999}
"""Adam's average of squares. In edge pruning gates have to come back from where their gradients are tiny."""

_MULTIPLIERS_RATE, _FIRST_MULTIPLIERS = 4.0, (0.0, 100.0)
"""How the constraint of edge pruning is enforced: an augmented Lagrangian, whose multipliers ascend. Multipliers that
start at 0 and ascend by Adam take out half of the edges before the target asks for any, and are slow to return."""


@dataclasses.dataclass(frozen=True)
class Form:
    """What the compiled step depends on, besides the model and its graph.

    Attributes:
        method: how gates are drawn and what they cost; ``"fixed"`` takes the mask as it is, to learn constants alone.
        objective: what is wanted of the metric.
        handed: the form of logits that the metric gets.
        metric: a metric that is a Python function; ``None`` for one that is a pytree, or for the KL divergence.
        nodes: whether each writer has a gate of its own, which all its edges share.
    """

    method: Method | Literal["fixed"]
    objective: Objective = "keep"
    handed: Literal["views", "rows", "array"] = "views"
    metric: Any = None
    nodes: bool = False

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """The optimizer, without a learning rate. (AdamW without weight decay, as both methods use it, is Adam.)"""
        adam = optax.scale_by_adam(b2=_FORGETTING[self.method])
        gates = optax.chain(optax.clip_by_global_norm(5.0), adam) if self.method == "ugs" else adam
        kinds: dict[Any, Any] = {"gates": gates, "multipliers": optax.identity(), "constants": optax.scale_by_adam()}
        return optax.multi_transform(kinds, lambda tree: {name: name for name in tree})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Numbers:
    """Numbers of a step; each may have a leading axis of circuits that are learned together.

    Attributes:
        seed: where random draws start.
        target: share of edges to be absent by now.
        node_target: share of writers to be absent by now.
        penalty, node_penalty: cost of an edge and of a writer.
    """

    seed: Any
    target: Any
    node_target: Any
    penalty: Any
    node_penalty: Any


State = dict[str, Any]
"""``learned`` (``gates``, and ``constants`` where these are learned) and the ``optimizer``'s state."""


@functools.partial(jax.jit, static_argnames=("cfg", "graph", "form"), donate_argnames="state")
def training_step(
    cfg: HookedTransformerConfig,
    graph: ResidualGraph,
    form: Form,
    params: Params,
    pairs: Pairs,
    state: State,
    rows: Any,
    numbers: Numbers,
    step: Any,
    rate: Any,
) -> tuple[State, dict[str, jax.Array]]:
    """Takes one step for each circuit of a stack.

    Args:
        cfg, graph, form: what the program depends on.
        params, pairs: the model, and all prompts.
        state: the state so far, each leaf with a leading axis of circuits; it is used up.
        rows: numbers of the prompts of this step, ``[circuit, row]``.
        numbers: numbers with an axis ``[circuit]``.
        step, rate: the step's number and its learning rate.

    Returns:
        The new state, and ``[circuit]`` each: the loss, the distance from the model's behaviour, and the share of
        edges expected to be present.
    """

    def one(state: State, rows: jax.Array, numbers: Numbers) -> tuple[State, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(numbers.seed), step)
        slopes = jax.grad(_loss, has_aux=True)
        gradient, measured = slopes(state["learned"], cfg, graph, form, params, pairs.take(rows), key, numbers)
        rates = {"gates": rate, "multipliers": jnp.float32(-_MULTIPLIERS_RATE)}
        rates["constants"] = jnp.float32(_CONSTANTS_RATE)
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to the power of its integer step count
            updates, optimizer = form.optimizer.update(gradient, state["optimizer"], state["learned"])
            scaled = {
                name: jax.tree.map(lambda u, r=rates[name]: -r * u, tree)
                for name, tree in cast(dict[str, Any], updates).items()
            }
            learned = cast(dict[str, Any], optax.apply_updates(state["learned"], scaled))
        return {"learned": learned, "optimizer": optimizer}, measured

    return jax.vmap(one)(state, rows, numbers)


def begin(form: Form, gates: dict[str, jax.Array], constants: dict[str, jax.Array] | None) -> State:
    """Returns the state before the first step; leaves have a leading axis of circuits."""
    learned: dict[str, Any] = {"gates": gates}
    if form.method == "edge_pruning":
        learned["multipliers"] = {
            name: jnp.tile(jnp.asarray(_FIRST_MULTIPLIERS), (len(leaf), 1)) for name, leaf in gates.items()
        }
    if constants is not None:
        learned["constants"] = constants
    return {"learned": learned, "optimizer": _first_moments(form, learned)}


@functools.partial(jax.jit, static_argnames="form")
def _first_moments(form: Form, learned: dict[str, Any]) -> Any:
    return jax.vmap(form.optimizer.init)(learned)


def _loss(
    learned: dict[str, Any],
    cfg: HookedTransformerConfig,
    graph: ResidualGraph,
    form: Form,
    params: Params,
    pairs: Pairs,
    key: jax.Array,
    numbers: Numbers,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    masks = draw_masks(form, graph, learned["gates"], key, pairs.n_prompts)
    distance = distance_of(cfg, graph, form, params, pairs, masks, learned.get("constants")).mean()
    cost, kept = _cost(form, graph, learned, numbers)
    return distance + cost, {"loss": distance + cost, "distance": distance, "kept": kept}


def draw_masks(
    form: Form, graph: ResidualGraph, gates: dict[str, jax.Array], key: jax.Array, n_prompts: int
) -> jax.Array:
    """Draws a mask for all prompts, or for each of them (uniform gradient sampling): ``[1, prompt or 1, 1, F, R]``."""
    if form.method == "fixed":
        return gates["edges"][None, None, None]
    if form.method == "ugs":
        uniform = jax.random.uniform(key, (n_prompts, *graph.shape))
        return uniform_gradient(gates["edges"][None], uniform)[None, :, None]
    mask = hard_concrete(gates["edges"], jax.random.uniform(key, graph.shape))
    if form.nodes:
        uniform = jax.random.uniform(jax.random.fold_in(key, 1), (graph.n_writers,))
        mask = mask * hard_concrete(gates["nodes"], uniform)[:, None]
    return mask[None, None, None]


def chances(form: Form, gates: dict[str, Any]) -> jax.Array:
    """Returns the chance that each edge is present, ``[..., writer, reader]``; entries that are no edges too."""
    edges = jnp.asarray(gates["edges"])
    if form.method == "ugs":
        return jax.nn.sigmoid(edges)
    return open_chance(edges) * open_chance(gates["nodes"])[..., None] if form.nodes else open_chance(edges)


def _cost(form: Form, graph: ResidualGraph, learned: dict[str, Any], numbers: Numbers) -> tuple[jax.Array, jax.Array]:
    """Returns what the edges that are present cost, and the share of them."""
    gates = learned["gates"]
    if form.method == "fixed":
        return jnp.zeros(()), gates["edges"].sum() / graph.n_edges
    present = jnp.where(jnp.asarray(graph.edges), chances(form, gates), 0)
    kept = present.sum() / graph.n_edges
    if form.method == "subnetwork_probing":
        return numbers.penalty * kept, kept
    if form.method == "ugs":
        writers = jnp.tanh(present.sum(axis=-1)).sum()
        return numbers.penalty * present.sum() + numbers.node_penalty * writers, kept
    cost = _lagrangian(learned["multipliers"]["edges"], 1 - kept - numbers.target)
    if form.nodes:
        absent = 1 - open_chance(gates["nodes"]).mean()
        cost += _lagrangian(learned["multipliers"]["nodes"], absent - numbers.node_target)
    return cost, kept


def _lagrangian(multipliers: jax.Array, excess: jax.Array) -> jax.Array:
    return multipliers[0] * excess + multipliers[1] * excess**2


def distance_of(
    cfg: HookedTransformerConfig,
    graph: ResidualGraph,
    form: Form,
    params: Params,
    pairs: Pairs,
    masks: jax.Array,
    constants: dict[str, jax.Array] | None = None,
) -> jax.Array:
    """Computes how far a circuit is from what is wanted of it, ``[prompt]``.

    By default that is ``KL(model || circuit)`` of the next token after each prompt, in nats.

    Args:
        cfg, graph, form, params: as in :func:`training_step`.
        pairs: the prompts to run.
        masks: one mask, ``[1, prompt or 1, 1, writer, reader]``.
        constants: what absent edges carry, activations by full name, in place of what ``pairs`` says.
    """
    if constants is not None:
        pairs = with_constants(pairs, {name: value[None] for name, value in constants.items()})
    replacement = replacement_of(cfg, params, graph, pairs)
    stream = masked_stream(cfg, params, graph, pairs.base.tokens, pairs.base.context, masks, replacement)[0]
    metric = pairs.metric if form.metric is None else form.metric
    if metric is None:
        rows = stream[jnp.arange(pairs.n_prompts), pairs.last]
        model, circuit = (_log_probs(cfg, params, final) for final in (pairs.final, rows))
        return divergences(model, circuit)
    value = traced_metric(metric, cfg, params, stream, form.handed)
    if form.objective != "keep":
        return value if form.objective == "lower" else -value
    assert pairs.baseline is not None
    return (value - pairs.baseline.astype(value.dtype)) ** 2


def _log_probs(cfg: HookedTransformerConfig, params: Params, rows: jax.Array) -> jax.Array:
    head = {name: params[name] for name in ("ln_final", "unembed") if name in params}
    return log_probabilities(unembed(cfg, head, rows))


@functools.partial(jax.jit, static_argnames=("cfg", "graph", "form"))
def distances(
    cfg: HookedTransformerConfig,
    graph: ResidualGraph,
    form: Form,
    params: Params,
    pairs: Pairs,
    rows: Any,
    masks: Any,
    constants: Any = None,
) -> jax.Array:
    """Computes :func:`distance_of` for a stack of masks ``[circuit, writer, reader]``, one after the other.

    Returns:
        ``[circuit, row]``.
    """
    some = pairs.take(rows)

    def one(each: tuple[Any, Any]) -> jax.Array:
        mask, own = each
        distance = distance_of(cfg, graph, form, params, some, mask[None, None, None].astype(cfg.jnp_dtype), own)
        return jnp.broadcast_to(distance, (some.n_prompts,))

    return jax.lax.map(one, (masks, constants))
