"""Generation token by token: the prompt in one pass, then many tokens in one compiled program.

The program is a loop over tokens whose state, the key-value cache included, stays on the device; how many tokens it
runs is data. Hooks that are data (interventions) are compiled into it. With plain Python hooks every step runs block by
block instead, so that they get concrete arrays.
"""

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from tljax.config import HookedTransformerConfig
from tljax.forward.forward import run_forward
from tljax.generation.few_rows import in_pieces, size_of_copies
from tljax.generation.key_values import KeyValueCache, past_names
from tljax.generation.sampling import Sampling, count_tokens, next_tokens
from tljax.hooks.dictionary import HookDictionary
from tljax.hooks.point import Window, is_compiled
from tljax.hooks.points import point_table
from tljax.memory import free_bytes, is_large
from tljax.modules.attention import KEYS_AND_VALUES
from tljax.modules.context import AttentionContext
from tljax.offload import is_offloaded
from tljax.processes import as_numpy
from tljax.sizes import prompt_length
from tljax.text.padding import pad_axis
from tljax.text.positions import count_positions
from tljax.typing import Params

if TYPE_CHECKING:
    from tljax.model.hooked_transformer import HookedTransformer

_ROWS_WORTH_COPIES = 4
_TOKENS_WORTH_COPIES = 20
"""Transposed weights save a quarter of a step and take ten steps' time to make (gpt2-small's shape, 16 rows)."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rules:
    """Rules by which tokens are chosen and texts end.

    Attributes:
        sampling: how a token is chosen.
        eos: ``[batch, n]``, tokens that end a text (negative where a row has fewer), or ``None``.
        fill: ``[batch]``, the token that fills the positions after a text's end.
    """

    sampling: Sampling
    eos: Any
    fill: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """The state of a generation. The last token chosen has not been run yet.

    Attributes:
        cache: keys and values of what has run.
        tokens: ``[batch, pos]``, prompt and answer.
        done: ``[batch]``, whether a text has ended.
        n_new: tokens chosen so far, an int32 scalar.
        failed: ``[batch]``, the first new token, counted from 0, that could not be chosen: its logits were NaN (also
            after a token that has no embedding) or all ``-inf``; -1 if there is none.
        keys: ``[batch]`` random keys.
        counts: ``[batch, d_vocab]``, how often each token occurs, or ``None``.
        logits: ``[new token, batch, d_vocab]``, the logits each token was chosen from, or ``None``.
    """

    cache: KeyValueCache
    tokens: jax.Array
    done: jax.Array
    n_new: jax.Array
    failed: jax.Array
    keys: jax.Array
    counts: jax.Array | None
    logits: jax.Array | None


class Decoder:
    """Continues texts.

    Args:
        model: the model; it keeps transposed weights for later generations.
        hooks: its hooks, placed in the text (:func:`tljax.generation.hooks.place_hooks`).
        rules: how the texts go on.
        limit: most tokens of an answer.
    """

    def __init__(self, model: "HookedTransformer", hooks: HookDictionary, rules: Rules, limit: int) -> None:
        self.cfg, self.params = model.cfg.computation, model.params
        self.hooks, self.rules, self.limit = hooks, rules, limit
        compiled = all(is_compiled(entry.function) for entry in hooks.entries)
        self.is_compiled = compiled and not is_offloaded(self.params)
        self._transposed = model._transposed
        self._layouts: Params | None = None

    def start(self, prompt: Any, mask: np.ndarray, capacity: int, keys: jax.Array, keep_logits: int) -> State:
        """Runs the prompts and chooses each text's first new token.

        Args:
            prompt: token ids ``[batch, pos]``, or embeddings ``[batch, pos, d_model]``.
            mask: ``[batch, pos]``, ``False`` at padding, which is on the left.
            capacity: most tokens of a text, as :func:`~tljax.sizes.text_capacity` gives it.
            keys: ``[batch]``, random keys.
            keep_logits: for how many tokens to keep logits.
        """
        logits, cache = self._run_prompt(prompt, mask, capacity)
        batch, length = mask.shape
        tokens, counted = np.zeros((batch, capacity), np.int32), np.zeros((batch, capacity), bool)
        sampling, counts = self.rules.sampling, None
        if np.ndim(prompt) == 2:
            tokens[:, :length], counted[:, :length] = prompt, mask
        if sampling.freq_penalty is not None or sampling.repetition_penalty is not None:
            counts = _count_compiled(*jax.device_put((tokens, counted)), self.cfg.d_vocab_out)
        kept = np.zeros((keep_logits, batch, self.cfg.d_vocab_out), logits.dtype) if keep_logits else None
        well = np.full(batch, -1, np.int32)
        room_for_tokens, done, n_new, failed = jax.device_put((tokens, np.zeros(batch, bool), np.int32(0), well))
        kept_logits = None if kept is None else jax.device_put(kept)
        state = State(cache, room_for_tokens, done, n_new, failed, keys, counts, kept_logits)
        return _choose_compiled(state, logits, self.rules)

    def go_on(self, state: State, n_new: int) -> State:
        """Runs until ``n_new`` tokens of each text are chosen, or all texts have ended. ``state`` is donated."""
        if self._layouts is None:
            self._layouts = self._lay_out(len(state.done))
        weights = self.params, self._layouts
        if self.is_compiled:
            pieces = len(state.done) == 1 and _on_cpu(self.params)
            return decode_tokens(self.cfg, pieces, weights, self.hooks, self.rules, state, np.int32(n_new))
        while int(state.n_new) < n_new and bool(_goes_on(state)):
            logits, cache = _run_token(self.cfg, weights, self.hooks, state)
            state = _choose_compiled(dataclasses.replace(state, cache=cache), logits, self.rules)
        return state

    def restart(self, state: State, n_prompt: int) -> State:
        """Chooses one token by running the whole text so far, without the cache of ``state``."""
        length = n_prompt + int(state.n_new)
        seen = as_numpy(state.cache.mask)[:, :n_prompt]
        mask = pad_axis(seen, length, fill=True)
        tokens = as_numpy(state.tokens)[:, :length]
        logits, cache = self._run_prompt(tokens, mask, state.cache.capacity)
        return _choose_compiled(dataclasses.replace(state, cache=cache), logits, self.rules)

    def _lay_out(self, rows: int) -> Params:
        """Returns transposed weights for steps of ``rows`` texts, or ``{}`` where they would not pay off."""
        if is_offloaded(self.params) or not copies_pay(rows, self.limit, _on_cpu(self.params)):
            return {}
        free = free_bytes(next(iter(self.params["embed"]["W_E"].devices())))
        return {} if free is None or is_large(size_of_copies(self.params), free) else self._transposed.of(self.params)

    def _run_prompt(self, prompt: Any, mask: np.ndarray, capacity: int) -> tuple[jax.Array, KeyValueCache]:
        """Returns the logits ``[batch, 1, d_vocab]`` after the prompts, and the cache."""
        cfg, length = self.cfg, mask.shape[1]
        framed = prompt_length(length, capacity, whole_steps_to=8) if self.is_compiled else length
        seen, text = pad_axis(mask, framed), pad_axis(mask, capacity, fill=True)
        context = AttentionContext(
            *jax.device_put((count_positions(seen), seen)),
            window=Window(np.int32(0), capacity),
            text=None if mask.all() else jax.device_put(text),
        )
        names = tuple(f"blocks.{n}.{name}" for name in KEYS_AND_VALUES for n in range(cfg.n_layers))
        embedded = np.ndim(prompt) == 3
        value = pad_axis(prompt if embedded else np.asarray(prompt), framed)
        final, recorded = run_forward(
            cfg, self.params, value, context, hooks=self.hooks, names=names, start=0 if embedded else None,
            stop=cfg.n_layers,
        )  # fmt: skip
        last = dataclasses.replace(context, window=Window(np.int32(length - 1), capacity))
        logits, _ = run_forward(
            cfg, self.params, _token_at(final, np.int32(length - 1)), last, hooks=self.hooks, start=cfg.n_layers
        )
        keys, values = ([recorded[name] for name in half] for half in (names[: cfg.n_layers], names[cfg.n_layers :]))
        whole_text = any("key_pos" in point_table(cfg)[entry.name].axes for entry in self.hooks.entries)
        cache = _fill(cfg, keys, values, context.token_mask, np.int32(length), capacity, whole_text)
        return logits, cache


def copies_pay(rows: int, n_new: int, on_cpu: bool) -> bool:
    """Returns whether transposed weights pay off where ``rows`` texts get up to ``n_new`` tokens each."""
    return on_cpu and rows >= _ROWS_WORTH_COPIES and n_new >= _TOKENS_WORTH_COPIES


def _on_cpu(params: Params) -> bool:
    """Whether the weights are jax arrays on a CPU. (NumPy arrays can change in place, so no copy of them is kept.)"""
    W_E = params["embed"]["W_E"]
    return isinstance(W_E, jax.Array) and all(device.platform == "cpu" for device in W_E.devices())


@jax.jit
def _token_at(stream: jax.Array, pos: jax.Array) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(stream, pos, 1, axis=1)


@functools.partial(jax.jit, static_argnums=(0, 5, 6))
def _fill(
    cfg: HookedTransformerConfig,
    keys: list[jax.Array],
    values: list[jax.Array],
    mask: jax.Array,
    length: jax.Array,
    capacity: int,
    whole_text: bool,
) -> KeyValueCache:
    return KeyValueCache.init_cache(cfg, mask.shape[0], capacity, whole_text).filled(keys, values, mask, length)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=5)
def decode_tokens(
    cfg: HookedTransformerConfig,
    pieces: bool,
    weights: tuple[Params, Params],
    hooks: HookDictionary,
    rules: Rules,
    state: State,
    n_new: Any,
) -> State:
    if pieces:
        weights = weights[0], in_pieces(weights[0])

    def goes_on(state: State) -> jax.Array:
        return (state.n_new < n_new) & _goes_on(state)

    def step(state: State) -> State:
        logits, cache = _run_token(cfg, weights, hooks, state)
        return _choose(dataclasses.replace(state, cache=cache), logits, rules)

    return jax.lax.while_loop(goes_on, step, state)


def _run_token(
    cfg: HookedTransformerConfig, weights: tuple[Params, Params], hooks: HookDictionary, state: State
) -> tuple[jax.Array, KeyValueCache]:
    """Runs the last token chosen; returns its logits ``[batch, 1, d_vocab]`` and the cache that includes it.

    ``weights`` are the parameters, and other layouts of some of them.
    """
    (params, layouts), (context, mask, token) = weights, _next_input(state)
    names = past_names(cfg)
    logits, recorded = run_forward(cfg, params, token, context, hooks=hooks, names=names, layouts=layouts)
    return logits, _after(state.cache, recorded, mask)


@jax.jit
def _next_input(state: State) -> tuple[AttentionContext, jax.Array, jax.Array]:
    context, mask = state.cache.next_context()
    return context, mask, jax.lax.dynamic_slice_in_dim(state.tokens, state.cache.length, 1, axis=1)


@jax.jit
def _after(cache: KeyValueCache, recorded: dict[str, jax.Array], mask: jax.Array) -> KeyValueCache:
    return cache.after(recorded, mask)


def _goes_on(state: State) -> jax.Array:
    return ~state.done.all() & (state.failed < 0).all()


def _choose(state: State, logits: jax.Array, rules: Rules) -> State:
    """Chooses each text's next token from logits ``[batch, 1, d_vocab]``, for the position after the cache's last."""
    logits = logits[:, 0]
    keys = jax.vmap(jax.random.fold_in, (0, None))(state.keys, state.n_new)
    seen = None if state.counts is None else state.counts > 0
    token = next_tokens(logits, rules.sampling, state.counts, seen, keys)
    something = logits.max(axis=1) > -jnp.inf  # False for NaN too
    failed = jnp.where((state.failed < 0) & ~state.done & ~something, state.n_new, state.failed)
    token = jnp.where(state.done, rules.fill, token)
    done = state.done
    if rules.eos is not None:
        done = done | (token[:, None] == rules.eos).any(axis=1)
    counts = state.counts
    if counts is not None:
        counts = counts.at[jnp.arange(len(token)), token].add((~state.done).astype(jnp.int32))
    tokens = jax.lax.dynamic_update_slice_in_dim(state.tokens, token[:, None], state.cache.length, axis=1)
    kept = state.logits
    if kept is not None:
        kept = jax.lax.dynamic_update_slice_in_dim(kept, logits[None].astype(kept.dtype), state.n_new, axis=0)
    return State(state.cache, tokens, done, state.n_new + 1, failed, state.keys, counts, kept)


_choose_compiled = jax.jit(_choose, donate_argnums=0)
_count_compiled = jax.jit(lambda tokens, mask, d_vocab: count_tokens(tokens, d_vocab, mask), static_argnums=2)
