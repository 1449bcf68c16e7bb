"""``optimal_constants``: what absent edges of a circuit carry if that is chosen to do the least harm."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from tljax.checks import typed, whole
from tljax.circuits.graph import ResidualGraph
from tljax.circuits.search.pairs import read_pairs
from tljax.circuits.search.runs import Schedule, Stack, Training
from tljax.circuits.search.training import Form
from tljax.errors import InputError
from tljax.model.hooked_transformer import HookedTransformer


@typed
def optimal_constants(
    model: HookedTransformer,
    prompts: Any,
    mask: Any,
    *,
    steps: int = 1000,
    batch_size: int = 32,
    seed: int = 0,
    graph: ResidualGraph | None = None,
    progress: bool | None = None,
) -> dict[str, np.ndarray]:
    """Learns a constant for each writer that its absent edges carry, so that a circuit stays near the model.

    This is optimal ablation (Li and Janson 2024, arXiv 2409.09951): constants start at the mean of what writers write
    and lower ``KL(model || circuit)`` of the next token after each prompt, by Adam with a rate of .001.

    Args:
        model: the model, without hooks.
        prompts: texts, token ids ``[prompt, pos]``, or a ``Batch``.
        mask: the circuit's edges, ``[writer, reader]``, or a stack of them, each of which gets its own constants.
        steps: number of steps.
        batch_size: prompts in each step.
        seed: where the order of the prompts starts.
        graph: the graph; by default ``ResidualGraph.of(model)``.
        progress: whether to show a progress bar.

    Returns:
        The constants: activations by full hook name, each with the leading axes of ``mask``. ``Circuit.run`` and
        :func:`learn_circuit` take them as ``ablation=``.

    Raises:
        InputError: a mask of another shape than the graph, or the whole model, which has no absent edges.
        TrainingError: the divergence stopped being a finite number.
    """
    graph = ResidualGraph.of(model) if graph is None else graph
    masks = np.asarray(mask)
    if masks.shape[-2:] != graph.shape:
        raise InputError(f"mask has shape {masks.shape}; this graph's is [writer, reader] = {graph.shape}.")
    masks = masks.reshape(-1, *graph.shape).astype(np.float32)
    if (masks[:, graph.edges] == 1).all(axis=1).any():
        raise InputError("The mask has every edge, so that no constant is ever used: give one that leaves some out.")
    pairs, _ = read_pairs(model, graph, prompts, None, "mean", None, None, whole(batch_size, "batch_size", 1))
    form = Form("fixed")
    training = Training(model.cfg, graph, form, model.params, pairs, min(batch_size, pairs.n_prompts))
    stack = Stack.of("edge_pruning", None, None, None, None, [seed] * len(masks))
    schedule = Schedule("fixed", whole(steps, "steps", 1), 0.0, "linear")
    start = training.mean_constants(len(masks))
    learned, _ = training.run(stack, schedule, start, progress, {"edges": jnp.asarray(masks)})
    stacked = np.shape(mask)[:-2]
    return {name: value.reshape(*stacked, *value.shape[1:]) for name, value in learned["constants"].items()}
