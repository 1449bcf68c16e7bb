"""The running methods of a model: call it, call it with hooks, call it keeping activations."""

import dataclasses
import functools
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tljax.cache.activation_cache import ActivationCache
from tljax.cache.memory import cache_bytes, warn_if_large
from tljax.cache.slices import SliceInput, is_full, read_slice
from tljax.checks import typed
from tljax.config import HookedTransformerConfig
from tljax.devices import resolve_device
from tljax.errors import HookError, InputError, refuse_unknown_options
from tljax.forward.backward import with_gradients
from tljax.forward.forward import POSITIONS, run_forward
from tljax.hooks.dictionary import HookDictionary, UnusedHooksWarning
from tljax.hooks.names import select
from tljax.hooks.points import HEAD, attention_input, block_points, layer_of, point_table, stage_of
from tljax.model.losses import check_labels, lm_cross_entropy_loss
from tljax.modules.context import AttentionContext
from tljax.text.batch import Batch
from tljax.text.inputs import ModelInput, is_traced, layer_bounds, prepare
from tljax.text.positions import NoPosition, TextCut, may_pad, read_mask, text_cut
from tljax.text.warned import level_of_caller
from tljax.typing import DeviceLike, HookList, NamesFilter, PaddingSide, Params, ReturnType

if TYPE_CHECKING:
    from tljax.model.hooked_transformer import HookedTransformer
    from tljax.text.tokenizer import Tokenizer

RETURN_TYPES = ("logits", "loss", "both", None)
_RUN_OPTIONS = (
    "loss_per_token", "prepend_bos", "padding_side", "start_at_layer", "tokens", "attention_mask", "stop_at_layer",
)  # fmt: skip
"""The arguments of a call that the other methods pass on."""
_INPUT_OPTIONS = ("prepend_bos", "padding_side", "attention_mask", "tokens", "start_at_layer")

_loss = jax.jit(lm_cross_entropy_loss, static_argnames="per_token")


_NO_GRADIENT = (
    "nothing differentiates this run. For gradients with hooks write jax.grad of a function that makes the run, or "
    'model.with_hooks(bwd_hooks=hooks).run_with_cache(input, return_type="loss", incl_bwd=True), which keeps them.'
)


class Output(NamedTuple):
    """What ``return_type="both"`` returns."""

    logits: jax.Array
    loss: jax.Array


class RunMethods:
    """Forward passes. Options that several methods share are documented at :meth:`__call__`."""

    cfg: HookedTransformerConfig
    params: Params
    _hooks: HookDictionary
    _tokenizer: "Tokenizer | None"

    def __call__(
        self,
        input: Any,
        return_type: ReturnType = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
        start_at_layer: int | None = None,
        tokens: Any = None,
        attention_mask: Any = None,
        stop_at_layer: int | None = None,
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
            stop_at_layer: layer to stop before (exclusive, negative counts from the end); returns the residual stream
                ``[batch, pos, d_model]`` there, and 0 the embedding.

        Returns:
            As ``return_type`` says.

        Raises:
            InputError: the input does not fit the model; the message says how and what to do.

        Recompiles for a new batch size, sequence length, or set of hooked points; never for new values.
        """
        output, _ = self._run(
            input, self._hooks, (), None, return_type=return_type, loss_per_token=loss_per_token,
            prepend_bos=prepend_bos, padding_side=padding_side, start_at_layer=start_at_layer, tokens=tokens,
            attention_mask=attention_mask, stop_at_layer=stop_at_layer,
        )  # fmt: skip
        self._warn_of_idle_hooks(output)
        return output

    forward = __call__

    @typed
    def run_with_hooks(
        self,
        input: Any,
        return_type: ReturnType = "logits",
        fwd_hooks: HookList = (),
        bwd_hooks: HookList = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **options: Any,
    ) -> Any:
        """Runs the model with extra hooks, for this call only.

        Args:
            input, return_type: as in :meth:`__call__`.
            fwd_hooks: ``[(name | names | predicate, callable), ...]``. An intervention is compiled in; any other
                callable runs as plain Python on concrete arrays between compiled programs (inside ``jax.jit`` it is
                traced). It takes ``(activation, hook)`` and returns a new activation, or ``None`` for no change.
            bwd_hooks: the same for gradients; the call must be inside ``jax.grad``, or nothing would call them.
            reset_hooks_end, clear_contexts: accepted for TransformerLens's sake: hooks never outlive a call.
            **options: the other arguments of :meth:`__call__`.

        Returns:
            As :meth:`__call__`.

        Raises:
            UnknownHookError: a name or filter matches nothing.
            HookError: a hook returned something that cannot stand in for the activation; or ``bwd_hooks`` in a run
                that nothing differentiates.
            InterventionError: an intervention does not fit its point.
        """
        refuse_unknown_options(RunMethods.run_with_hooks, options, _RUN_OPTIONS)
        _refuse_persistent_hooks(reset_hooks_end)
        hooked: HookedTransformer = self.with_hooks(fwd_hooks, bwd_hooks)  # type: ignore[attr-defined]
        bounds = layer_bounds(self.cfg, options.get("start_at_layer"), options.get("stop_at_layer"))
        for name, _ in (*fwd_hooks, *bwd_hooks):
            _reached_names(getattr(name, "name", name), self.cfg, *bounds)
        output = self._run(input, hooked._hooks, (), None, return_type=return_type, **options)[0]
        if bwd_hooks and not any(map(is_traced, jax.tree.leaves(output))):
            raise HookError(f"bwd_hooks were not called: {_NO_GRADIENT}")
        return output

    @typed
    def run_with_cache(
        self,
        input: Any,
        return_type: ReturnType = "logits",
        *,
        names_filter: NamesFilter = None,
        device: DeviceLike = None,
        remove_batch_dim: bool = False,
        return_cache_object: bool = True,
        incl_bwd: bool = False,
        pos_slice: SliceInput = None,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **options: Any,
    ) -> tuple[Any, Any]:
        """Runs the model and keeps activations.

        Args:
            input, return_type: as in :meth:`__call__`.
            names_filter: which points to keep: a name, a list, a predicate on full names; ``None`` keeps every point
                that is not optional. Only what is kept is computed apart and returned from the compiled programs.
            device: where to put the activations, layer by layer (``"cpu"`` spares GPU memory).
            remove_batch_dim: drop the batch axis (batch of one).
            return_cache_object: ``False`` returns a plain dict.
            incl_bwd: also keep ``name + "_grad"``, the gradient of the loss at each point; needs a scalar loss.
            pos_slice: positions to keep (query positions of patterns), of each prompt's own text; a number keeps an
                axis of one.
            reset_hooks_end, clear_contexts: as in :meth:`run_with_hooks`.
            **options: the other arguments of :meth:`__call__`.

        Returns:
            The model's output, and an :class:`~tljax.cache.ActivationCache`.

        Warns:
            LargeCacheWarning: the cache will take more than a quarter of the free memory.
        """
        refuse_unknown_options(RunMethods.run_with_cache, options, _RUN_OPTIONS)
        _refuse_persistent_hooks(reset_hooks_end)
        bounds = layer_bounds(self.cfg, options.get("start_at_layer"), options.get("stop_at_layer"))
        names = _reached_names(names_filter, self.cfg, *bounds)
        target = resolve_device(device)
        prepared = prepare(
            self.cfg, self._tokenizer, input,
            **{key: value for key, value in options.items() if key in _INPUT_OPTIONS},
        )  # fmt: skip
        keep = Keep(self.cfg, pos_slice, target, _text_cut(prepared, pos_slice))
        if incl_bwd:
            output, cache = self._run_with_gradients(prepared, names, keep, return_type, options)
        else:
            output, cache = self._run(prepared, self._hooks, names, keep, return_type=return_type, **options)
            self._warn_of_idle_hooks((output, cache))
        if return_cache_object or remove_batch_dim:
            wrapped = ActivationCache(cache, self, **keep.masks(prepared.text))  # type: ignore[arg-type]
            wrapped = wrapped.remove_batch_dim() if remove_batch_dim else wrapped
            return output, (wrapped if return_cache_object else wrapped.cache_dict)
        return output, cache

    def input_to_embed(
        self,
        input: Any,
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
        attention_mask: Any = None,
    ) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]:
        """Embeds an input: ``(residual [batch, pos, d_model], tokens, pos_embed or None, attention_mask or None)``.

        The third entry is TransformerLens's ``shortformer_pos_embed``, ``[batch, pos, d_model]`` where positions are
        embedded for queries and keys alone, and otherwise ``None``.
        """
        prepared = prepare(
            self.cfg, self._tokenizer, input, prepend_bos=prepend_bos, padding_side=padding_side,
            attention_mask=attention_mask,
        )  # fmt: skip
        names = (POSITIONS,) if self.cfg.positional_embedding_type == "shortformer" else ()
        residual, placed = run_forward(
            self.cfg, self.params, prepared.value, AttentionContext.of(prepared), hooks=self._hooks, names=names, stop=0
        )
        return residual, jnp.asarray(prepared.tokens), placed.get(POSITIONS), prepared.token_mask

    @typed
    def loss_fn(self, logits: jax.Array, tokens: Any, attention_mask: Any = None, per_token: bool = False) -> jax.Array:
        """Cross entropy of next tokens, in nats: see :func:`tljax.model.losses.lm_cross_entropy_loss`.

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
    def _run(
        self,
        input: Any,  # what the user passed, or already a ModelInput
        hooks: HookDictionary,
        names: tuple[str, ...],
        keep: "Keep | None",
        *,
        return_type: ReturnType = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
        start_at_layer: int | None = None,
        tokens: Any = None,
        attention_mask: Any = None,
        stop_at_layer: int | None = None,
    ) -> tuple[Any, dict[str, Any]]:
        if return_type not in RETURN_TYPES:
            raise InputError(f"return_type={return_type!r} is not one of {RETURN_TYPES}.")
        start, stop = layer_bounds(self.cfg, start_at_layer, stop_at_layer)
        prepared = input if isinstance(input, ModelInput) else prepare(
            self.cfg, self._tokenizer, input, prepend_bos=prepend_bos, padding_side=padding_side,
            attention_mask=attention_mask, tokens=tokens, start_at_layer=start,
        )  # fmt: skip
        batch, pos = prepared.batch_and_pos
        hooks.check(point_table(self.cfg), batch, pos, prepared.text)
        if names and not is_traced(prepared.value):
            self._warn_if_large(names, batch, pos, keep)
        stop_early = stop
        if return_type is None and stop is None:
            stop_early = _last_needed(self.cfg, start or 0, [*names, *(entry.name for entry in hooks.entries)])
        value, cache = run_forward(
            self.cfg, self.params, prepared.value, AttentionContext.of(prepared),
            hooks=hooks, names=names, start=start, stop=stop_early, keep=keep,
        )  # fmt: skip
        if stop is not None:
            return value, cache
        return _output(value, prepared, return_type, loss_per_token), cache

    def _run_with_gradients(
        self,
        prepared: ModelInput,
        names: tuple[str, ...],
        keep: "Keep",
        return_type: ReturnType,
        options: dict[str, Any],
    ) -> tuple[Any, dict[str, Any]]:
        if return_type != "loss" or options.get("loss_per_token") or options.get("stop_at_layer") is not None:
            raise InputError(
                'incl_bwd=True differentiates a scalar: call run_with_cache(input, return_type="loss", incl_bwd=True). '
                "For another metric use jax.grad with respect to a tljax.Add at the point."
            )
        table, size = point_table(self.cfg), prepared.batch_and_pos
        shapes = {name: table[name].shape(*size) for name in names if self._has_one_gradient(name, names)}

        def run(hooks: HookDictionary) -> tuple[Any, dict[str, Any]]:
            return self._run(prepared, hooks, names, keep, return_type="loss", **options)

        loss, cache, gradients = with_gradients(run, self._hooks, shapes)
        in_order = {name: cache[name] for name in names}  # jax.grad hands dicts back sorted by key
        return loss, in_order | {f"{name}_grad": value for name, value in keep(gradients).items()}

    def _has_one_gradient(self, name: str, names: tuple[str, ...]) -> bool:
        """Whole numbers have no gradient; ``ln1`` has three where queries, keys and values read apart."""
        table, layer = point_table(self.cfg), layer_of(name)
        if layer is None or len(table[name].read_by) < 2:
            return not table[name].holds_numbers
        in_use = [stage_of(other)[1] for other in names if layer_of(other) == layer]
        return attention_input(block_points(self.cfg, self.cfg.layer_kind(layer)), in_use) != "split"

    def _warn_of_idle_hooks(self, output: Any) -> None:
        idle = [entry.name for entry in self._hooks.entries if entry.direction == "bwd"]
        if idle and not any(map(is_traced, jax.tree.leaves(output))):
            warnings.warn(
                f"The backward hook at {idle[0]} was not called: {_NO_GRADIENT}",
                UnusedHooksWarning,
                stacklevel=level_of_caller(),
            )

    def _warn_if_large(self, names: tuple[str, ...], batch: int, pos: int, keep: "Keep | None") -> None:
        kept = pos if keep is None else len(_positions(pos, keep.pos_slice))
        device = keep.device if keep is not None and isinstance(keep.device, jax.Device) else None
        warn_if_large(cache_bytes(self.cfg, names, batch, pos) * kept // pos, len(names), device)


def _output(logits: jax.Array, prepared: ModelInput, return_type: ReturnType, per_token: bool) -> Any:
    if return_type is None:
        return None
    if return_type == "logits":
        return logits
    if prepared.tokens is None:
        raise InputError("A loss from start_at_layer= needs the token ids: pass tokens= as well.")
    if prepared.tokens.shape[1] < 2:
        raise InputError("A loss needs at least two tokens: each is scored on predicting the next.")
    _check_scored(prepared, logits.shape[-1])
    loss = _loss(logits, prepared.tokens, prepared.text, per_token=per_token)
    return loss if return_type == "loss" else Output(logits, loss)


def _check_scored(prepared: ModelInput, d_vocab_out: int) -> None:
    """Refuses tokens that no logit is of, and prompts without a pair of tokens to score.

    Raises:
        InputError: there is such a token, or no such pair.
    """
    tokens, mask = prepared.tokens, prepared.text
    if is_traced(tokens) or is_traced(mask):
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


def _last_needed(cfg: HookedTransformerConfig, start: int, names: Sequence[str]) -> int | None:
    """Where a run without output may stop: after the last named block, or ``None`` if the head is named."""
    if any(stage_of(name)[0] == HEAD for name in names):
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


def _reached_names(
    names_filter: Any, cfg: HookedTransformerConfig, start: int | None, stop: int | None
) -> tuple[str, ...]:
    """The points a filter picks in this run: a predicate means those the run reaches, a name must be reached.

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


def _refuse_persistent_hooks(reset_hooks_end: bool) -> None:
    if not reset_hooks_end:
        raise InputError(
            "reset_hooks_end=False cannot work: a tljax model never changes, so hooks cannot outlive the call. For a "
            "hooked model write model = model.with_hooks(fwd_hooks) or model.add_hook(name, hook)."
        )


def _text_cut(prepared: ModelInput, pos_slice: SliceInput) -> TextCut | None:
    """The positions to keep of each prompt, where the run has padding; ``None``: the same entries of every row."""
    mask = prepared.text
    if is_full(pos_slice) or mask is None or not may_pad(mask):
        return None
    index = read_slice(pos_slice, mask.shape[-1])
    try:
        return text_cut(mask, index if isinstance(index, slice) else np.atleast_1d(index))
    except NoPosition as error:
        raise InputError(f"pos_slice={pos_slice!r}: {error}") from None


def _positions(pos: int, pos_slice: SliceInput) -> np.ndarray:
    if is_full(pos_slice):
        return np.arange(pos, dtype=np.int32)
    index = read_slice(pos_slice, pos)
    try:
        return np.atleast_1d(np.arange(pos, dtype=np.int32)[index])
    except IndexError as error:
        raise InputError(f"pos_slice={pos_slice!r} is out of range for {pos} positions.") from error


@functools.partial(jax.jit, static_argnums=1)
def _take_positions(
    values: dict[str, jax.Array], axes: tuple[tuple[str, int], ...], positions: jax.Array
) -> dict[str, jax.Array]:
    return {name: jnp.take(values[name], positions, axis=axis) for name, axis in axes}


@functools.partial(jax.jit, static_argnums=1)
def _take_of_text(
    values: dict[str, jax.Array], axes: tuple[tuple[str, int], ...], taken: TextCut
) -> dict[str, jax.Array]:
    return {name: taken(values[name], axis, 0) for name, axis in axes}


@dataclasses.dataclass(frozen=True)
class Keep:
    """What happens to a stage's recorded activations: positions are sliced, arrays moved to a device.

    ``taken`` says which positions of each prompt, where some have padding.
    """

    cfg: HookedTransformerConfig
    pos_slice: SliceInput = None
    device: Any = None
    taken: TextCut | None = None

    def __call__(self, recorded: dict[str, Any]) -> dict[str, Any]:
        """Returns the activations as they are kept."""
        if not is_full(self.pos_slice):
            table = point_table(self.cfg)
            named = {name: table[name.removesuffix("_grad")].axes for name in recorded}
            axes = tuple((name, axis.index("pos" if "pos" in axis else "query_pos")) for name, axis in named.items())
            length = recorded[axes[0][0]].shape[axes[0][1]]
            if self.taken is not None:
                recorded = _take_of_text(recorded, axes, self.taken)
            else:
                recorded = _take_positions(recorded, axes, _positions(length, self.pos_slice))
        return recorded if self.device is None else jax.device_put(recorded, self.device)

    def masks(self, token_mask: Any) -> dict[str, Any]:
        """Padding marks of what is kept, as :class:`ActivationCache` takes them; ``token_mask`` is ``[batch, pos]``."""
        if token_mask is None or is_full(self.pos_slice):
            return {"token_mask": token_mask}
        if self.taken is not None:
            return {"token_mask": self.taken.mask, "key_mask": token_mask}
        kept = _positions(token_mask.shape[-1], self.pos_slice)
        return {"token_mask": token_mask[..., kept], "key_mask": token_mask}
