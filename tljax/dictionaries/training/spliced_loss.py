"""The loss of a dictionary by what the model does with its reconstruction, and one compiled step of training by it.

Braun et al. 2024, "Identifying functionally important features with end-to-end sparse dictionary learning"
(arXiv:2405.12241): the divergence of the model's predictions, and of later residual streams; Karvonen 2025, "Revisiting
end-to-end sparse autoencoder training" (arXiv:2503.17272), for the balance with the squared error.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from tljax.config import HookedTransformerConfig
from tljax.dictionaries.training.coefficients import Numbers, coefficients_at
from tljax.dictionaries.training.config import TrainingConfig
from tljax.dictionaries.training.losses import Params as DictionaryParams
from tljax.dictionaries.training.preparation import Preparation
from tljax.dictionaries.training.prompts import TokenBatch
from tljax.dictionaries.training.step import Metrics, TrainingState, advance, measures_of_update
from tljax.dictionaries.training.token_losses import TokenLosses, mean_of, token_losses
from tljax.forward.forward import run_forward
from tljax.hooks.dictionary import HookDictionary, HookEntry
from tljax.hooks.interventions import Replace
from tljax.hooks.points import ENTRY, point_table
from tljax.model.losses import divergences, log_probabilities, next_tokens
from tljax.modules.readout import Readout, by_positions
from tljax.splice import Splice
from tljax.typing import Params

_TINY = 1e-12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a step is compiled for, besides the dictionary's settings. Hashable.

    Attributes:
        model: the model's config.
        splice: where the dictionary reads and writes.
        downstream: full names of the later residual streams that are compared; none if empty.
        balanced: whether the divergence is scaled to the size of the squared error.
        remat: whether the backward pass computes each block again.
    """

    model: HookedTransformerConfig
    splice: Splice
    downstream: tuple[str, ...] = ()
    balanced: bool = False
    remat: bool = False

    @property
    def entry(self) -> str | None:
        """The residual stream that the spliced run starts from; ``None`` if it starts at the tokens."""
        return None if self.splice.layer is None else f"blocks.{self.splice.layer}.{ENTRY}"

    @property
    def names(self) -> tuple[str, ...]:
        """The points of the original run that are needed, in firing order."""
        wanted = {self.splice.reads, self.splice.writes, self.entry, *self.downstream}
        return tuple(name for name in point_table(self.model) if name in wanted)


class Original(NamedTuple):
    """The run without the dictionary: its final residual stream ``[batch, pos, d_model]``, and activations by name."""

    final: jax.Array
    activations: dict[str, jax.Array]


def original_run(params: Params, batch: TokenBatch, plan: Plan) -> Original:
    """Runs the model as it is."""
    return Original(*run_forward(
        plan.model, params, batch.tokens, batch.context, hooks=HookDictionary(), names=plan.names,
        stop=plan.model.n_layers,
    ))  # fmt: skip


def dictionary_rows(original: Original, splice: Splice) -> tuple[jax.Array, jax.Array | None]:
    """Returns what the dictionary encodes, ``[tokens, d_in]``, and what it reconstructs; ``None`` for the same."""

    def rows(name: str, width: int) -> jax.Array:
        value = original.activations[name]
        part = value if splice.head is None else value[:, :, splice.head]
        return part.reshape(-1, width)

    x = rows(splice.reads, splice.d_in)
    return x, None if splice.reads == splice.writes else rows(splice.writes, splice.d_out)


def spliced_run(
    params: Params, output: jax.Array, original: Original, batch: TokenBatch, plan: Plan
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Runs the model from the dictionary's block on, with a reconstruction in place of what it reconstructs.

    Args:
        params: the model's.
        output: ``[tokens, d_out]``, for raw activations; tokens that do not count keep the model's own value.
        original: the run without the dictionary.
        batch: the tokens.
        plan: what is compared.

    Returns:
        The final residual stream, and the later residual streams by name.
    """
    splice, own = plan.splice, original.activations[plan.splice.writes]
    part = own if splice.head is None else own[:, :, splice.head]
    counts = batch.counts.reshape(*batch.counts.shape, *(1,) * (part.ndim - 2))
    part = jnp.where(counts, output.reshape(part.shape).astype(own.dtype), part)
    value = part if splice.head is None else own.at[:, :, splice.head].set(part)
    start = batch.tokens if plan.entry is None else original.activations[plan.entry]
    return run_forward(
        plan.model, params, start, batch.context, hooks=HookDictionary((HookEntry(splice.writes, Replace(value)),)),
        names=plan.downstream, start=splice.layer, stop=plan.model.n_layers, remat=plan.remat,
    )  # fmt: skip


def spliced_loss(
    own: DictionaryParams,
    params: Params,
    original: Original,
    batch: TokenBatch,
    numbers: Numbers,
    dead: jax.Array,
    preparation: Preparation,
    plan: Plan,
    cfg: TrainingConfig,
    guess: jax.Array,
) -> tuple[jax.Array, tuple[Metrics, TokenLosses]]:
    """Computes the loss; to be differentiated by ``own``, the dictionary's parameters.

    Returns:
        The total; what was measured (the terms that add up to the total among it), and what the tokens gave.
    """
    counts = batch.counts.reshape(-1)
    with jax.default_matmul_precision(cfg.precision):
        x, y = preparation.apply(*dictionary_rows(original, plan.splice))
        tokens = token_losses(own, x, y, counts, numbers, dead, cfg, guess)
        output = preparation.undo(tokens.reconstruction)
    final, streams = spliced_run(params, output, original, batch, plan)
    kl, cross_entropies = compared(Readout.of(plan.model, params), original.final, final, batch)
    terms = {name: term for name, term in tokens.terms.items() if "mse_loss" not in name}
    errors = {name: term for name, term in tokens.terms.items() if "mse_loss" in name}
    terms |= {name: numbers["mse_coefficient"] * term for name, term in errors.items()}
    terms["kl_loss"] = numbers["kl_coefficient"] * kl
    if plan.balanced:
        error = numbers["mse_coefficient"] * errors["mse_loss"]
        terms["kl_loss"] *= jax.lax.stop_gradient(error / jnp.maximum(kl, _TINY))
    measured = {"kl": kl, "mse": errors["mse_loss"]}
    if plan.downstream:
        changes = [_squared_change(streams[name], original.activations[name], batch) for name in plan.downstream]
        measured["downstream"] = jnp.stack(changes).mean()
        terms["downstream_loss"] = numbers["downstream_coefficient"] * measured["downstream"]
    total = jnp.stack(list(terms.values())).sum()
    measured |= cross_entropies
    error = errors["mse_loss"] / _variance(y, counts)
    measured |= {"l0": tokens.fired.sum() / counts.sum().astype(jnp.float32), "explained_variance": 1 - error}
    bad = sum(((~jnp.isfinite(value)) & counts[:, None]).sum(dtype=jnp.int32) for value in (x, y))
    measured["bad_inputs"] = jnp.asarray(bad).astype(jnp.float32)
    return total, ({"loss": total, **terms, **measured}, tokens)


def _squared_change(after: jax.Array, before: jax.Array, batch: TokenBatch) -> jax.Array:
    change = after.astype(jnp.float32) - before.astype(jnp.float32)
    return mean_of((change**2).sum(axis=-1), batch.counts)


def _variance(y: jax.Array, counts: jax.Array) -> jax.Array:
    """Returns the mean squared distance of tokens from their mean."""
    kept = jnp.where(counts[:, None], y, 0)
    mean = kept.sum(axis=0) / counts.sum().astype(jnp.float32)
    return mean_of(((y - mean[None]) ** 2).sum(axis=-1), counts)


def compared(readout: Readout, original: jax.Array, spliced: jax.Array, batch: TokenBatch) -> tuple[jax.Array, Metrics]:
    """Returns how far the spliced run's predictions are from the original ones, and both runs' losses of next tokens.

    Args:
        readout: the end of the model.
        original, spliced: final residual streams ``[batch, pos, d_model]``.
        batch: the tokens.
    """
    following, counted = next_tokens(batch.tokens, batch.text, readout.module.cfg.d_vocab_out)
    following = jnp.pad(following, ((0, 0), (0, 1)))
    kl, *losses = by_positions(_compare, readout, original, spliced, following, n_logits=2)
    counted = counted & batch.counts[:, :-1]
    before, after = (mean_of(loss[:, :-1], counted) for loss in losses)
    return mean_of(kl, batch.counts), {"ce_original": before, "ce_spliced": after}


def _compare(readout: Readout, original: jax.Array, spliced: jax.Array, following: jax.Array) -> tuple[jax.Array, ...]:
    log_p, log_q = (log_probabilities(readout.logits(one)) for one in (original, spliced))
    losses = (-jnp.take_along_axis(one, following[..., None], axis=-1)[..., 0] for one in (log_p, log_q))
    return divergences(log_p, log_q), *losses


@functools.partial(jax.jit, static_argnames=("plan", "cfg", "optimizer"), donate_argnames=("state",))
def spliced_step(
    state: TrainingState,
    params: Params,
    batch: TokenBatch,
    numbers: Numbers,
    preparation: Preparation,
    plan: Plan,
    cfg: TrainingConfig,
    optimizer: optax.GradientTransformation | None,
) -> tuple[TrainingState, Metrics]:
    """One step: the original run once, the spliced one from the dictionary's block on, and its backward pass.

    Args:
        state: the state before; its memory is reused.
        params: the model's parameters, which do not change.
        batch: the tokens.
        numbers: the numbers of the run, the loss's coefficients among them.
        preparation: what is done to activations first.
        plan: what else the program is compiled for.
        cfg: the structure of the dictionary's settings.
        optimizer: used instead of Adam.

    Returns:
        The state after, and what the step measured.
    """
    now = coefficients_at(numbers, state.step)
    dead = state.quiet > numbers["dead_feature_window"].astype(jnp.int32)
    original = original_run(params, batch, plan)
    differentiate = jax.grad(spliced_loss, has_aux=True)
    grads, (metrics, tokens) = differentiate(
        state.params, params, original, batch, now, dead, preparation, plan, cfg, state.latest
    )
    n_tokens = batch.counts.sum(dtype=jnp.int32).astype(jnp.float32)
    after, rate, norm = advance(state, grads, tokens.fired, tokens.cut, n_tokens, now, cfg, optimizer)
    return after, metrics | measures_of_update(after, now, rate, norm, dead, cfg)
