"""``train_dictionary_end_to_end``: a dictionary trained on what the model does with its reconstruction."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from tljax import checks
from tljax.dictionaries.dictionary import Dictionary
from tljax.dictionaries.maths.config import DictionaryConfig
from tljax.dictionaries.training.batches import digest, pairs
from tljax.dictionaries.training.checkpoint import Run
from tljax.dictionaries.training.coefficients import numbers_of, structure_of
from tljax.dictionaries.training.config import TrainingConfig
from tljax.dictionaries.training.loop import Loop, LoopOptions, TrainingResult, begin, run_steps
from tljax.dictionaries.training.prompts import TokenBatch, token_batches
from tljax.dictionaries.training.spliced_loss import Plan, dictionary_rows, original_run, spliced_step
from tljax.dictionaries.training.step import Metrics, TrainingState
from tljax.errors import ConfigError, InputError
from tljax.fingerprint import fingerprint_of
from tljax.hooks.names import resolve
from tljax.hooks.points import ENTRY, point_table
from tljax.hooks.splices import refuse_splices
from tljax.model.hooked_transformer import HookedTransformer
from tljax.model.splice_sites import SpliceOptions, excluded_tokens, splice_of
from tljax.splice import Splice

_typed = functools.partial(checks.typed, receiver=Loop)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Objective:
    """The settings of the loss besides those of the dictionary; see :func:`train_dictionary_end_to_end`."""

    kl_coefficient: float | Literal["balanced"]
    mse_coefficient: float
    downstream_coefficient: float
    downstream_layers: tuple[int, ...]
    exclude_tokens: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in ("kl_coefficient", "mse_coefficient", "downstream_coefficient"):
            value = getattr(self, name)
            if value != "balanced" and not 0 <= value < np.inf:
                raise ConfigError(f"{name}={value!r} must be at least 0 and finite.")
        if self.kl_coefficient == "balanced" and not self.mse_coefficient:
            raise ConfigError(
                'kl_coefficient="balanced" gives the divergence the size of the squared error, which has no weight: '
                "mse_coefficient=1.0."
            )
        if not (self.kl_coefficient or self.downstream_layers):
            raise ConfigError(
                "kl_coefficient=0 and no downstream_layers: nothing depends on what the model does with the "
                "reconstruction. train_dictionary trains on activations alone."
            )

    @property
    def numbers(self) -> dict[str, jax.Array]:
        """The coefficients as data."""
        balanced = self.kl_coefficient == "balanced"
        values = {
            "kl_coefficient": 1.0 if balanced else self.kl_coefficient,
            "mse_coefficient": self.mse_coefficient,
            "downstream_coefficient": self.downstream_coefficient,
        }
        return {name: jnp.asarray(value, jnp.float32) for name, value in values.items()}


@_typed
def train_dictionary_end_to_end(
    model: HookedTransformer,
    cfg: TrainingConfig,
    prompts: Any,
    *,
    steps: int,
    batch_size: int = 16,
    start: Any = None,
    kl_coefficient: float | Literal["balanced"] = 1.0,
    mse_coefficient: float = 0.0,
    downstream_coefficient: float = 1.0,
    downstream_layers: Sequence[int] | Literal["all"] | None = None,
    exclude_tokens: Any = None,
    prepend_bos: bool | None = None,
    remat: bool = False,
    **options: Unpack[LoopOptions],
) -> TrainingResult:
    """Trains a dictionary so that the model with its reconstruction predicts what the model itself predicts.

    The loss is ``kl_coefficient * KL(original || spliced)``, plus the terms of ``cfg`` that make features sparse (of
    ``gated`` also the one that trains its gate) or train dead ones (``aux_loss_coefficient=0`` leaves that out), plus
    what the options add (Braun et al. 2024, arXiv:2405.12241). Divergences and errors are summed
    over the vocabulary or the width, and averaged over the tokens that count; padding does not. The dictionary is
    spliced in without its error. A step is one compiled program: the original run once, the spliced one from the
    dictionary's block on, and its backward pass. The model does not change.

    Args:
        model: the model; in any dtype. The dictionary is trained in float32.
        cfg: the settings; ``tap`` says which point is read, and of transcoders which one is written.
            :meth:`TrainingConfig.of` makes them from a dictionary to go on from.
        prompts: texts, token ids ``[prompt, pos]`` or a ``Batch``, in another order in each epoch; or a function from
            the step (0, 1, ...) to such. Because a batch depends on its step alone, an interrupted run goes on exactly
            as it would have.
        steps: optimizer steps.
        batch_size: prompts in a step, unless ``prompts`` is a function.
        start: see :func:`train_dictionary`.
        kl_coefficient: weight of the divergence. ``"balanced"`` weighs it anew in each step, so that it is as large as
            the squared error (Karvonen 2025, arXiv:2503.17272, for a short training that starts from a dictionary).
        mse_coefficient: weight of the squared error of the reconstruction, which
            :func:`train_dictionary` trains on.
        downstream_coefficient: weight of the squared errors of later residual streams, averaged over layers.
        downstream_layers: the layers that these enter (``hook_resid_pre``), ``"all"`` after the dictionary's ("e2e+ds"
            in the paper), or ``None`` for none.
        exclude_tokens: ids of tokens that do not count and keep the model's own value; ``"special"`` means the
            tokenizer's special tokens.
        prepend_bos: whether texts get a BOS token; ``None`` means ``cfg.default_prepend_bos``.
        remat: compute each block again in the backward pass instead of keeping what is inside.
        **options: as for :func:`train_dictionary`.

    Returns:
        The dictionary, and the history: the terms of the loss (``kl_loss`` and ``downstream_loss`` among them), and
        without their coefficients ``kl``, ``mse``, ``downstream``; next-token losses ``ce_original`` and
        ``ce_spliced``; ``l0`` and the rest as for :func:`train_dictionary`.

    Raises:
        ConfigError: the settings cannot be trained so; ``directory`` holds a state and ``resume`` is off.
        DictionaryError: the dictionary does not fit its point.
        InputError: the model carries hooks or dictionaries, a batch has no token that counts, or ``start`` does not
            fit.
        CheckpointError: the state is damaged or belongs to another run; says what differs.
        TrainingError: the loss stopped being finite; names the step.

    Recompiles for another batch size or length.

    >>> import numpy as np, tljax
    >>> from tljax.dictionaries import Tap
    >>> model = tljax.HookedTransformer.from_pretrained("tljax-tiny")
    >>> tokens = np.random.default_rng(0).integers(0, model.cfg.d_vocab, (8, 6))
    >>> tap = Tap(reads="blocks.2.hook_resid_pre")
    >>> cfg = TrainingConfig(architecture="topk", d_in=64, d_sae=96, k=8, lr=1e-2, tap=tap)
    >>> result = train_dictionary_end_to_end(model, cfg, tokens, steps=8, batch_size=8)
    >>> bool(result.history["kl"][-1] < result.history["kl"][0])
    True
    """
    for name, value in {"steps": steps, "batch_size": batch_size}.items():
        checks.whole(value, name, at_least=1)
    _check(model, cfg, mse_coefficient)
    loop, splice = Loop(**options), site_of(model, cfg)
    cfg = cfg.replace(tap=_filled(cfg, splice, model))
    _check_start(start, splice, model)
    special = None if model.tokenizer is None else model.tokenizer.all_special_ids
    objective = _Objective(
        kl_coefficient=kl_coefficient, mse_coefficient=mse_coefficient, downstream_coefficient=downstream_coefficient,
        downstream_layers=_layers(downstream_layers, splice, model.cfg.n_layers),
        exclude_tokens=excluded_tokens(exclude_tokens, model.cfg, special),
    )  # fmt: skip
    streams = tuple(f"blocks.{layer}.{ENTRY}" for layer in objective.downstream_layers)
    plan = Plan(
        model=model.cfg.computation, splice=splice.computation, downstream=streams,
        balanced=kl_coefficient == "balanced", remat=remat,
    )  # fmt: skip
    batch = token_batches(model, prompts, batch_size, cfg.seed, objective.exclude_tokens, prepend_bos)
    first = batch(0)
    run = Run(
        [cfg], steps, batch_size, digest((np.asarray(first.tokens), first.counts)), loop.optimizer_name,
        dataclasses.asdict(objective), fingerprint_of(model),
    )  # fmt: skip
    source = _activations(model, batch, plan)
    begun = begin([cfg], source, pairs(source, cfg)(0), None if start is None else [start], run, loop, stacked=False)
    numbers, structure = numbers_of(cfg, steps) | objective.numbers, structure_of(cfg, cfg.k)

    def one_step(state: TrainingState, number: int) -> tuple[TrainingState, Metrics]:
        given = batch(number)
        return spliced_step(state, model.params, given, numbers, begun.preparation, plan, structure, loop.optimizer)

    return run_steps(one_step, begun, run, loop)[0]


def _check(model: HookedTransformer, cfg: TrainingConfig, mse_coefficient: float) -> None:
    refuse_splices(
        model.cfg.splices,
        "End-to-end training splices its own dictionary into the model",
        "Take it out: model.without_dictionaries(). To train it further pass it as start=.",
    )
    if model._hooks.entries:
        raise InputError(
            "The model carries hooks, and end-to-end training runs the model without them: pass model.reset_hooks()."
        )
    if cfg.n_sources or cfg.architecture == "matching_pursuit":
        what = "A crosscoder has no one place in a model" if cfg.n_sources else "matching_pursuit has no encoder"
        raise ConfigError(f"{what}, so that it cannot be trained end to end. train_dictionary trains it.")
    if cfg.tap.reads is None:
        raise ConfigError(
            'The settings do not say which activation the dictionary reads: tap=Tap(reads="blocks.8.hook_resid_pre").'
        )
    if cfg.transcoder and cfg.tap.writes is None:
        raise ConfigError(
            f"A transcoder reconstructs another activation than {cfg.tap.reads}: say which, "
            'tap=Tap(reads=..., writes="blocks.8.hook_mlp_out").'
        )
    if cfg.matryoshka_widths and not mse_coefficient:
        raise ConfigError(
            f"matryoshka_widths={cfg.matryoshka_widths} are prefixes that reconstruct the activation alone, and that "
            "error has no weight: mse_coefficient=1.0, or leave them out."
        )


def _check_start(start: Any, splice: Splice, model: HookedTransformer) -> None:
    """Raises InputError if a dictionary to start from says that it reads another point."""
    if not isinstance(start, Dictionary) or start.cfg.tap.reads is None:
        return
    table = point_table(model.cfg)
    if resolve(start.cfg.tap.reads, table, model.cfg.n_layers) != splice.reads:
        raise InputError(
            f"The dictionary to start from reads {start.cfg.tap.reads}, and the config's tap {splice.reads}. To train "
            "it at another point say so: start=dictionary.replace(cfg=dictionary.cfg.replace(tap=Tap(reads=...)))."
        )


def site_of(model: HookedTransformer, cfg: TrainingConfig) -> Splice:
    """Returns where the dictionary sits, checked as for one that is spliced in; its parameters are not needed."""
    config = DictionaryConfig(
        d_in=cfg.d_in, d_sae=1, d_out=cfg.d_out, transcoder=cfg.transcoder, tap=cfg.tap,
        apply_b_dec_to_input=cfg.subtracts_b_dec,
    )  # fmt: skip
    shapes = {"W_enc": (cfg.d_in, 1), "b_enc": (1,), "W_dec": (1, cfg.width_out), "b_dec": (cfg.width_out,)}
    stand_in = Dictionary({name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, config)
    options = SpliceOptions(error="drop", gradient="stop", skip=True, exclude_tokens=())
    return splice_of(model, None, stand_in, options)[0]


def _filled(cfg: TrainingConfig, splice: Splice, model: HookedTransformer) -> Any:
    """Returns the tap with the full names of its points and with what the model says of itself."""
    writes = None if splice.reads == splice.writes else splice.writes
    tap = cfg.tap.replace(reads=splice.reads, writes=writes, merged_heads=splice.merged_heads)
    return tap.known(model_name=model.cfg.model_name, processing=tuple(model.cfg.weight_processing))


def _layers(given: Sequence[int] | str | None, splice: Splice, n_layers: int) -> tuple[int, ...]:
    """Returns the numbers of the layers whose input is compared.

    Raises:
        ConfigError: a layer does not come after the dictionary, or there is none.
    """
    if given is None:
        return ()
    first = 0 if splice.layer is None else splice.layer + 1
    layers = tuple(range(first, n_layers)) if isinstance(given, str) else tuple(given)
    wrong = [layer for layer in layers if not first <= checks.whole(layer, "downstream_layers") < n_layers]
    if wrong or not layers:
        there = f"layers {first} to {n_layers - 1}" if first < n_layers else "none"
        raise ConfigError(
            f"downstream_layers={given!r}: the layers that come after {splice.writes} are {there}. Leave it out to "
            "compare the predictions alone."
        )
    return tuple(sorted(set(layers)))


def _activations(model: HookedTransformer, batch: Callable[[int], TokenBatch], plan: Plan) -> Callable[[int], Any]:
    """Returns the activations of a step's tokens that count, as :func:`train_dictionary` reads them."""

    def activations(step: int) -> Any:
        given = batch(step)
        found = _rows(model.params, given, dataclasses.replace(plan, downstream=(), balanced=False, remat=False))
        kept = given.counts.reshape(-1)
        x, y = (None if one is None else np.asarray(one)[kept] for one in found)
        return x if y is None else (x, y)

    return activations


@functools.partial(jax.jit, static_argnames="plan")
def _rows(params: Any, batch: TokenBatch, plan: Plan) -> tuple[jax.Array, jax.Array | None]:
    return dictionary_rows(original_run(params, batch, plan), plan.splice)
