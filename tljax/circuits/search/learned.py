"""``learn_circuit``: a circuit found by gradient descent on gates of edges, with optax."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from tljax.checks import check_type, typed, whole
from tljax.circuits.graph import ResidualGraph
from tljax.circuits.search.gates import most_open
from tljax.circuits.search.learned_circuit import LearnedCircuit, LearningSettings
from tljax.circuits.search.pairs import Ablation, read_pairs
from tljax.circuits.search.runs import Schedule, Stack, Training
from tljax.circuits.search.training import Form, Method, Objective, chances
from tljax.errors import InputError
from tljax.model.hooked_transformer import HookedTransformer

_RATES = {"edge_pruning": 0.2, "subnetwork_probing": 0.1}


@typed
def learn_circuit(
    model: HookedTransformer,
    prompts: Any,
    source: Any = None,
    metric: Any = None,
    *,
    method: Method = "edge_pruning",
    ablation: Any = "patching",
    objective: Objective = "keep",
    target: float | Sequence[float] | None = None,
    penalty: float | Sequence[float] | None = None,
    node_target: float | None = None,
    node_penalty: float | None = None,
    steps: int = 1000,
    learning_rate: float | None = None,
    ramp: Literal["linear", "log"] = "linear",
    batch_size: int = 32,
    seed: int | Sequence[int] = 0,
    align: Any = None,
    graph: ResidualGraph | None = None,
    progress: bool | None = None,
) -> LearnedCircuit:
    """Learns which edges of the residual graph a behaviour needs, by gradient descent on a gate for each.

    Each step runs a few prompts, with gates drawn at random around what was learned so far, and lowers the distance of
    what the circuit does from what the model does, plus a cost of edges. One program is compiled for all steps; several
    seeds, targets or penalties are trained together by ``jax.vmap``.

    ``"edge_pruning"`` (Bhaskar et al. 2024, arXiv 2406.16778) draws hard concrete gates and adds
    ``l1 (s - t) + l2 (s - t)^2``: ``s`` is the expected share of absent edges; ``t``, the target, rises from 0 during
    the first 5/6 of the steps; ``l1``, ``l2`` ascend (from 0 and 100, at a rate of 4). ``"subnetwork_probing"`` (Cao et
    al. 2021) draws the same gates and adds ``penalty`` times the expected share of present edges. ``"ugs"``, uniform
    gradient sampling (Li and Janson 2024, arXiv 2409.09951), draws gates for each prompt and adds ``penalty`` for each
    edge expected to be present, and ``node_penalty`` for each writer, ``tanh`` of its expected number of edges. All
    use Adam.

    Args:
        model: the model, without hooks.
        prompts: the base prompts: texts, token ids ``[prompt, pos]``, or a ``Batch``.
        source: as many corrupted prompts, whose values absent edges carry. With another ``ablation``, the prompts that
            means are taken of, by default the base prompts.
        metric: what to compare, in place of the divergence of the next token after each prompt: a metric of
            :mod:`tljax.patching`, or any pytree; a Python function only if all prompts run in each step.
        method: as above.
        ablation: what absent edges carry: ``"patching"``, the value in the source run; ``"zero"``; ``"mean"``, the mean
            over prompts of the mean over tokens; ``"positional_mean"``; ``"optimal"``, a constant for each writer,
            learned together with the gates (rate 1e-3, from the mean); or constants by full hook name, such as
            :func:`~tljax.circuits.mean_activations` and :func:`optimal_constants` return.
        objective: what is wanted of ``metric``: to ``"keep"`` what it is in the model, in squared distance; or to
            ``"lower"`` or ``"raise"`` it.
        target: for ``"edge_pruning"``, the share of edges to take out, between 0 and 1; .95 by default.
        penalty: for the others; by default 10 (``"subnetwork_probing"``), .001 (``"ugs"``).
        node_target: for ``"edge_pruning"``, the share of writers to take out: each gets a gate of its own.
        node_penalty: for ``"ugs"``; by default half the penalty, at most .0002.
        steps: number of steps.
        learning_rate: by default .2, .1, and for ``"ugs"`` .15, .1 or .05 (penalties up to .0001, .0005, above), a
            fifth of it with ``"patching"``. In ``"edge_pruning"`` it rises over the first fifteenth of the steps.
        ramp: how the target rises: its share of absent edges ``"linear"``, or that of present ones by equal factors.
        batch_size: prompts in each step.
        seed: where random draws start.
        align: for prompts and sources of different lengths: for each base token the position of the source's, or -1,
            ``[prompt, pos]``. Tokens without one keep their own value.
        graph: the graph; by default ``ResidualGraph.of(model)``.
        progress: whether to show a progress bar.

    Returns:
        The circuit; a stack of circuits if seeds, targets or penalties were given as lists, one for each of them.

    Raises:
        InputError: a target outside 0 to 1, a metric without a gradient, prompts that do not match, a source that
            changes nothing.
        TrainingError: the loss stopped being a finite number.
    """
    graph = ResidualGraph.of(model) if graph is None else graph
    steps, batch_size = whole(steps, "steps", 1), whole(batch_size, "batch_size", 1)
    if isinstance(ablation, str):
        check_type(ablation, Ablation, "ablation")
    if metric is None and objective != "keep":
        raise InputError(f"objective={objective!r} is about a metric, and none was given: pass metric=.")
    stack = Stack.of(method, target, penalty, node_target, node_penalty, seed)
    rate = _default_rate(method, max(stack.penalty), ablation) if learning_rate is None else float(learning_rate)
    if not 0 < rate < np.inf:
        raise InputError(f"learning_rate={learning_rate} must be positive.")
    pairs, measure = read_pairs(model, graph, prompts, source, ablation, metric, align, batch_size)
    form = Form(method, objective, nodes=node_target is not None)
    if measure is not None:
        function = None if pairs.metric is not None else measure.metric
        form = dataclasses.replace(form, handed=measure.handed, metric=function)
    training = Training(model.cfg, graph, form, model.params, pairs, min(batch_size, pairs.n_prompts))
    optimal = isinstance(ablation, str) and ablation == "optimal"
    constants = training.mean_constants(len(stack)) if optimal else None
    empty = training.check_gap(len(stack), constants)
    learned, history = training.run(stack, Schedule(method, steps, rate, ramp), constants, progress)
    settings = LearningSettings(
        method, ablation if isinstance(ablation, str) else "values", objective, stack.seed, stack.target, stack.penalty,
        steps, training.batch_size, pairs.n_prompts, rate,
    )  # fmt: skip
    found = _found(training, learned, history, empty, settings)
    return found if stack.several else found[0]


def _found(
    training: Training, learned: dict[str, Any], history: Any, empty: Any, settings: LearningSettings
) -> LearnedCircuit:
    """Returns the circuits of what was learned: the most open gates, and how far they are from the model."""
    form, graph, n_circuits = training.form, training.graph, len(settings.seed)
    each = [{name: leaf[n] for name, leaf in learned["gates"].items()} for n in range(n_circuits)]
    scores = np.stack([_scores(form, graph, gates) for gates in each])
    counts = [_count(form, graph, gates) for gates in each]
    mask = np.stack([most_open(one, graph.edges, count) for one, count in zip(scores, counts, strict=True)])
    constants = learned.get("constants")
    if constants is not None:
        empty = training.distances(np.zeros_like(mask), constants)
    return LearnedCircuit(mask, scores, training.distances(mask, constants), empty, history, constants, graph, settings)


def _default_rate(method: Method, penalty: float, ablation: Any) -> float:
    if method != "ugs":
        return _RATES[method]
    rate = 0.15 if penalty <= 1e-4 else 0.1 if penalty <= 5e-4 else 0.05
    return rate / 5 if isinstance(ablation, str) and ablation == "patching" else rate


def _scores(form: Form, graph: ResidualGraph, gates: dict[str, np.ndarray]) -> np.ndarray:
    """Returns the log odds of each edge's gate (with a gate of the writer's, of both), -inf where there is no edge."""
    scores = np.asarray(gates["edges"], np.float64)
    if form.nodes:
        both = -np.logaddexp(0, -scores) - np.logaddexp(0, -np.asarray(gates["nodes"], np.float64))[:, None]
        scores = both - np.log(-np.expm1(np.minimum(both, -1e-300)))
    return np.where(graph.edges, scores, -np.inf).astype(np.float32)


def _count(form: Form, graph: ResidualGraph, gates: dict[str, np.ndarray]) -> int:
    """Returns how many edges the circuit has: as many as are expected to be present, or those likelier than not."""
    likely = np.asarray(chances(form, gates), np.float64)[graph.edges]
    return int((likely > 0.5).sum()) if form.method == "ugs" else graph.n_edges - round(float((1 - likely).sum()))
