"""The running methods of a model: call it, or call it with hooks for that one run."""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from tljax.checks import is_traced, typed
from tljax.config import HookedTransformerConfig
from tljax.errors import HookError, InputError
from tljax.forward.forward import POSITIONS, excludes_tokens, run_forward
from tljax.hooks.dictionary import HookDictionary, UnusedHooksWarning
from tljax.hooks.names import select
from tljax.hooks.points import HEAD, layer_of, point_table, stage_of
from tljax.model.chunked_loss import loss_of_stream
from tljax.model.losses import check_labels, lm_cross_entropy_loss
from tljax.modules.attention_path import MATRICES, AttentionPath, attention_path, spliced_at_matrix
from tljax.modules.context import AttentionContext
from tljax.modules.readout import Readout
from tljax.offload import is_offloaded
from tljax.text.batch import Batch
from tljax.text.inputs import LayerBounds, ModelInput, layer_bounds, prepare
from tljax.text.positions import read_mask
from tljax.text.warned import level_of_caller
from tljax.typing import HookList, InputOptions, NamesFilter, Params, PromptOptions, ReturnType

if TYPE_CHECKING:
    from tljax.model.hooked_transformer import HookedTransformer
    from tljax.text.tokenizer import Tokenizer

typed_run = functools.partial(typed, receiver=prepare)
"""Decorator that checks the arguments of a method that runs an input."""
_loss = jax.jit(lm_cross_entropy_loss, static_argnames="per_token")


_NO_GRADIENT = (
    "nothing differentiates this run. For gradients with hooks write jax.grad of a function that makes the run, or "
    "model.with_hooks(bwd_hooks=hooks).run_with_grads(input, metric); for the loss run_with_cache(input, "
    'return_type="loss", incl_bwd=True).'
)


class Output(NamedTuple):
    """The output of ``return_type="both"``."""

    logits: jax.Array
    loss: jax.Array


class RunMethods:
    """Forward passes. Options that several methods share are documented at :meth:`__call__`."""

    cfg: HookedTransformerConfig
    params: Params
    _hooks: HookDictionary
    _tokenizer: "Tokenizer | None"

    @typed_run
    def __call__(
        self,
        input: Any,
        return_type: ReturnType = "logits",
        loss_per_token: bool = False,
        *,
        stop_at_layer: int | None = None,
        remat: bool = False,
        **options: Unpack[InputOptions],
    ) -> Any:
        """Runs the model.

        Args:
            input: a text, a list of texts, token ids ``[pos]`` or ``[batch, pos]``, a :class:`~tljax.Batch` of prompts
                of any lengths, or with ``start_at_layer`` the residual stream ``[batch, pos, d_model]`` entering that
                layer.
            return_type: ``"logits"`` ``[batch, pos, d_vocab_out]``; ``"loss"``, mean cross entropy in nats; ``"both"``,
                an :class:`Output`; ``None`` returns ``None`` and runs no further than hooks and captures need.
            loss_per_token: loss as ``[batch, pos - 1]``.
            prepend_bos: whether texts get a BOS token; ``None`` means ``cfg.default_prepend_bos``.
            padding_side: where shorter texts are padded; ``None`` means the tokenizer's side.
            start_at_layer: first layer to run (inclusive, negative counts from the end).
            tokens: token ids or a ``Batch``, when ``input`` is a residual stream and a loss is wanted.
            attention_mask: ``[batch, pos]``, 0 at padding. Made from the text when a batch is padded left.
            stop_at_layer: layer to stop before (exclusive, negative counts from the end); the call then returns the
                residual stream ``[batch, pos, d_model]`` there, which for 0 is the embedding.
            remat: inside ``jax.grad``: compute each block again in the backward pass instead of keeping what is inside.

        Returns:
            As ``return_type`` says.

        Raises:
            InputError: the input does not fit the model; the message says how and what to do.

        Recompiles for a new batch size, sequence length, or set of hooked points; never for new values.
        """
        prepared, bounds = self._read(input, stop_at_layer, options)
        output, _ = self._run(prepared, bounds, self._hooks, return_type, loss_per_token, remat=remat)
        self._warn_of_idle_hooks(output)
        return output

    forward = __call__

    @typed_run
    def run_with_hooks(
        self,
        input: Any,
        return_type: ReturnType = "logits",
        fwd_hooks: HookList = (),
        bwd_hooks: HookList = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        *,
        loss_per_token: bool = False,
        stop_at_layer: int | None = None,
        **options: Unpack[InputOptions],
    ) -> Any:
        """Runs the model with extra hooks, for this call only.

        Args:
            input, return_type: as in :meth:`__call__`.
            fwd_hooks: ``[(name | names | predicate, callable), ...]``. An intervention is compiled in; any other
                callable runs as plain Python on concrete arrays between compiled programs (inside ``jax.jit`` it is
                traced). It takes ``(activation, hook)`` and returns a new activation, or ``None`` for no change.
            bwd_hooks: the same for gradients; the call must be inside ``jax.grad``, or nothing would call them.
            reset_hooks_end, clear_contexts: accepted for TransformerLens's sake: hooks never outlive a call.
            loss_per_token, stop_at_layer, **options: as in :meth:`__call__`.

        Returns:
            As :meth:`__call__`.

        Raises:
            UnknownHookError: a name or filter matches nothing.
            HookError: a hook returned something that cannot stand in for the activation; or ``bwd_hooks`` in a run
                that nothing differentiates.
            InterventionError: an intervention does not fit its point.
        """
        refuse_persistent_hooks(reset_hooks_end)
        hooked: HookedTransformer = self.with_hooks(fwd_hooks, bwd_hooks)  # type: ignore[attr-defined]
        prepared, bounds = self._read(input, stop_at_layer, options)
        for name, _ in (*fwd_hooks, *bwd_hooks):
            reached_names(getattr(name, "name", name), self.cfg, *bounds)
        output, _ = self._run(prepared, bounds, hooked._hooks, return_type, loss_per_token)
        if bwd_hooks and not is_traced(output):
            raise HookError(f"bwd_hooks were not called: {_NO_GRADIENT}")
        return output

    @typed_run
    def input_to_embed(
        self, input: Any, **options: Unpack[PromptOptions]
    ) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]:
        """Embeds an input: ``(residual [batch, pos, d_model], tokens, pos_embed or None, attention_mask or None)``.

        The third entry is TransformerLens's ``shortformer_pos_embed``, ``[batch, pos, d_model]`` where positions are
        embedded for queries and keys alone, and otherwise ``None``.
        """
        prepared = prepare(self.cfg, self._tokenizer, input, **options)
        names = (POSITIONS,) if self.cfg.positional_embedding_type == "shortformer" else ()
        residual, placed = run_forward(
            self.cfg, self.params, prepared.value, AttentionContext.of(prepared), hooks=self._hooks, names=names, stop=0
        )
        return residual, jnp.asarray(prepared.tokens), placed.get(POSITIONS), prepared.token_mask

    @typed
    def loss_fn(self, logits: jax.Array, tokens: Any, attention_mask: Any = None, per_token: bool = False) -> jax.Array:
        """Computes the cross entropy of next tokens, in nats: see :func:`tljax.model.losses.lm_cross_entropy_loss`.

        ``tokens`` may be the :class:`~tljax.Batch` that was run.
        """
        if isinstance(tokens, Batch):
            tokens, attention_mask = tokens.tokens, tokens.mask if attention_mask is None else attention_mask
        tokens = jnp.atleast_2d(jnp.asarray(tokens))
        check_labels(logits, tokens)
        mask = None if attention_mask is None else jnp.atleast_2d(jnp.asarray(read_mask(attention_mask)))
        if mask is not None and mask.shape != tokens.shape:
            raise InputError(f"attention_mask has shape {mask.shape}; the tokens have shape {tokens.shape}.")
        return _loss(logits, tokens, mask, per_token=per_token)

    @typed
    def attention_path(
        self, pos: int, names_filter: NamesFilter = (), padded: bool = False
    ) -> tuple[AttentionPath, ...]:
        """Returns the way that attention takes in each layer of a run on jax's default device, and why.

        Where nothing names a layer's scores or pattern, and the text is long, the matrix of all queries and keys is
        never made. ``cfg.attention_path`` asks for one way everywhere; the numbers are the same but for rounding.

        Args:
            pos: the length of the prompts.
            names_filter: the points that the run keeps or hooks, as in :meth:`run_with_cache`; those where this model
                has hooks or dictionaries are named too.
            padded: whether the prompts have padding.

        >>> import tljax
        >>> model = tljax.HookedTransformer.from_pretrained("tljax-tiny")
        >>> model.attention_path(20)[0]
        AttentionPath(name='materialised', why='no more than 256 keys')
        """
        names = {*select(names_filter, point_table(self.cfg), self.cfg.n_layers)} if names_filter != () else set()
        names |= {entry.name for entry in self._hooks.entries}
        return tuple(
            attention_path(
                self.cfg,
                kind,
                pos,
                pos,
                any(f"blocks.{layer}.attn.{name}" in names for name in MATRICES) or spliced_at_matrix(kind),
                padded=padded,
            ).on_default_device()
            for layer, kind in enumerate(self.cfg.layer_kinds)
        )

    def _read(self, input: Any, stop_at_layer: int | None, options: InputOptions) -> tuple[ModelInput, LayerBounds]:
        """Returns the checked input, and the layers to start at and to stop before."""
        bounds = layer_bounds(self.cfg, options.get("start_at_layer"), stop_at_layer)
        return prepare(self.cfg, self._tokenizer, input, **options), bounds

    def _run(
        self,
        prepared: ModelInput,
        bounds: LayerBounds,
        hooks: HookDictionary,
        return_type: ReturnType,
        loss_per_token: bool = False,
        names: tuple[str, ...] = (),
        keep: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
        remat: bool | None = None,
    ) -> tuple[Any, dict[str, Any]]:
        """Returns the output, and the named activations after ``keep`` was applied.

        A derivative recomputes blocks with ``remat``; ``None`` means only those that stay on the host.
        """
        start, stop = bounds
        hooks.check(point_table(self.cfg), *prepared.batch_and_pos, prepared.text)
        named = (*names, *(entry.name for entry in hooks.entries))
        last = stop
        if return_type is None and stop is None:
            last = _last_needed(self.cfg, start or 0, named)
        loss_alone = return_type == "loss" and stop is None and not uses_head(named)
        if loss_alone:
            last = self.cfg.n_layers
        context = AttentionContext.of(prepared)
        if start is not None and prepared.tokens is not None and excludes_tokens(self.cfg):
            context = dataclasses.replace(context, tokens=jnp.asarray(prepared.tokens))
        value, cache = run_forward(
            self.cfg, self.params, prepared.value, context,
            hooks=hooks, names=names, start=start, stop=last, keep=keep,
            remat=is_offloaded(self.params) if remat is None else remat,
        )  # fmt: skip
        if loss_alone:
            _check_scored(prepared, self.cfg.d_vocab_out)
            ends = Readout.of(self.cfg, self.params)
            return loss_of_stream(ends, value, prepared.tokens, prepared.text, per_token=loss_per_token), cache
        return (value if stop is not None else _output(value, prepared, return_type, loss_per_token)), cache

    def _warn_of_idle_hooks(self, output: Any) -> None:
        idle = [entry.name for entry in self._hooks.entries if entry.direction == "bwd"]
        if idle and not is_traced(output):
            warnings.warn(
                f"The backward hook at {idle[0]} was not called: {_NO_GRADIENT}",
                UnusedHooksWarning,
                stacklevel=level_of_caller(),
            )


def _output(logits: jax.Array, prepared: ModelInput, return_type: ReturnType, per_token: bool) -> Any:
    if return_type is None:
        return None
    if return_type == "logits":
        return logits
    _check_scored(prepared, logits.shape[-1])
    loss = _loss(logits, prepared.tokens, prepared.text, per_token=per_token)
    return loss if return_type == "loss" else Output(logits, loss)


def _check_scored(prepared: ModelInput, d_vocab_out: int) -> None:
    """Checks that every token to score has a logit, and that there is something to score.

    Raises:
        InputError: there are no tokens; a token has no logit, or no prompt has two tokens next to each other.
    """
    if prepared.tokens is None:
        raise InputError("A loss from start_at_layer= needs the token ids: pass tokens= as well.")
    if prepared.tokens.shape[1] < 2:
        raise InputError("A loss needs at least two tokens: each is scored on predicting the next.")
    tokens, mask = prepared.tokens, prepared.text
    if is_traced(tokens, mask):
        return
    following = np.asarray(tokens)[:, 1:]
    counted = np.ones(following.shape, bool) if mask is None else np.asarray(mask)[:, 1:] & np.asarray(mask)[:, :-1]
    if not counted.any():
        raise InputError("There is nothing to score: no prompt has two tokens that stand next to each other.")
    beyond = np.argwhere(counted & (following >= d_vocab_out))
    if len(beyond):
        row, place = map(int, beyond[0])
        raise InputError(
            f"Token {int(following[row, place])} at batch {row}, position {place + 1} cannot be predicted: the model "
            f"has logits for 0 to {d_vocab_out - 1} alone (d_vocab_out). Leave it out of the loss: "
            'model(tokens, return_type="logits"), and score the positions that count.'
        )


def uses_head(names: Sequence[str]) -> bool:
    """Whether one of the points comes after the blocks."""
    return any(stage_of(name)[0] == HEAD for name in names)


def _last_needed(cfg: HookedTransformerConfig, start: int, names: Sequence[str]) -> int | None:
    """Returns where a run without output may stop: after the last named block, or ``None`` if the head is named."""
    if uses_head(names):
        return None
    return max([start, *(layer + 1 for name in names if (layer := layer_of(name)) is not None)])


def _reached(name: str, start: int | None, stop: int | None) -> bool:
    layer = layer_of(name)
    if layer is not None:
        return (start or 0) <= layer and (stop is None or layer < stop)
    return stop is None if stage_of(name)[0] == HEAD else start is None


@functools.lru_cache(maxsize=256)
def _every_reached_name(cfg: HookedTransformerConfig, start: int | None, stop: int | None) -> tuple[str, ...]:
    names = select(None, point_table(cfg), cfg.n_layers)
    return tuple(name for name in names if _reached(name, start, stop))


def reached_names(
    names_filter: Any, cfg: HookedTransformerConfig, start: int | None, stop: int | None
) -> tuple[str, ...]:
    """Returns the points that a filter picks in this run: a predicate skips points that the run does not reach.

    Raises:
        InputError: a named point lies outside the run, or a predicate matches only such points.
    """
    if names_filter is None:
        return _every_reached_name(cfg, start, stop)
    names = select(names_filter, point_table(cfg), cfg.n_layers)
    reached = tuple(name for name in names if _reached(name, start, stop))
    if len(reached) < len(names) and not (reached and callable(names_filter)):
        missed = next(name for name in names if name not in reached)
        first, last = start or 0, cfg.n_layers if stop is None else stop
        covered = f"blocks {first} to {last - 1} only" if last > first else "no block"
        raise InputError(f"{missed} never fires: this run covers {covered} (start_at_layer, stop_at_layer).")
    return reached


def refuse_persistent_hooks(reset_hooks_end: bool) -> None:
    if not reset_hooks_end:
        raise InputError(
            "reset_hooks_end=False cannot work: a tljax model never changes, so hooks cannot outlive the call. For a "
            "hooked model write model = model.with_hooks(fwd_hooks) or model.add_hook(name, hook)."
        )
