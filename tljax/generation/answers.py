"""A generation in progress: the tokens chosen so far, where texts end, and the text, tokens or embeddings returned."""

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from tljax.checks import take
from tljax.errors import GenerationError, InputError
from tljax.generation.decoding import Decoder, Rules
from tljax.generation.hooks import TextSize, place_hooks
from tljax.generation.prompts import Prompts, check_room, check_switch
from tljax.generation.sampling import SamplingOptions, read_sampling
from tljax.generation.stopping import Ends
from tljax.hooks.points import point_table
from tljax.processes import as_numpy
from tljax.sizes import power_of_two, text_capacity
from tljax.text.tokenizer import need_tokenizer

if TYPE_CHECKING:
    from tljax.model.hooked_transformer import HookedTransformer

Returns = Literal["input", "str", "tokens", "embeds"]


class Generation:
    """One generation in progress: made from the user's arguments, advanced some tokens at a time.

    Args:
        model: the model, with its hooks.
        prompts: the prompts to continue.
        max_new_tokens: most new tokens for each prompt.
        ends: when texts end.
        options: for :func:`~tljax.generation.sampling.read_sampling`.
        keys: ``[batch]``, random keys.
        use_cache: whether to keep keys and values.
        keep_logits: whether to keep the logits that tokens were chosen from.
    """

    def __init__(
        self,
        model: "HookedTransformer",
        prompts: Prompts,
        max_new_tokens: int,
        ends: Ends,
        options: SamplingOptions,
        keys: jax.Array,
        use_cache: bool = True,
        keep_logits: bool = False,
    ) -> None:
        cfg = model.cfg
        check_room(cfg, prompts, max_new_tokens)
        if use_cache:
            check_switch(cfg, prompts, max_new_tokens)
        length = prompts.shape[1]
        if prompts.kind == "embeds" and not use_cache:
            raise InputError("Embeddings cannot run again without their cache: leave use_past_kv_cache=True.")
        self.prompts, self.ends, self.limit, self.use_cache = prompts, ends, max_new_tokens, use_cache
        self.tokenizer, self._d_vocab = model._tokenizer, cfg.d_vocab
        capacity = text_capacity(length + max_new_tokens, cfg.n_ctx)
        size = TextSize.of(prompts.mask, length + max_new_tokens, capacity)
        hooks = place_hooks(model._hooks, point_table(cfg), size)
        rules = Rules(read_sampling(cfg.d_vocab_out, **options), ends.eos, ends.fill)
        self._decoder = Decoder(model, hooks, rules, max_new_tokens)
        kept = power_of_two(max_new_tokens) if keep_logits else 0
        self._state = self._decoder.start(prompts.value, prompts.mask, capacity, keys, kept)
        self._stopped: dict[int, int] = {}
        self._length: int | None = None  # tokens until every text had ended, where strings ended them
        self._check_choices()

    @property
    def n_new(self) -> int:
        """Tokens chosen so far."""
        return int(self._state.n_new)

    @property
    def is_done(self) -> bool:
        """Whether every text has ended or is as long as it may be."""
        return self.n_new >= self.limit or bool(as_numpy(self._state.done).all())

    def advance(self, n_tokens: int) -> None:
        """Chooses up to ``n_tokens`` more tokens of each text."""
        goal = min(self.n_new + n_tokens, self.limit)
        if self.use_cache:
            self._state = self._decoder.go_on(self._state, goal)
        else:
            while self.n_new < goal and not self.is_done:
                self._state = self._decoder.restart(self._state, self.prompts.shape[1])
        self._check_choices()
        if self.ends.strings:
            self._stop_at_strings()

    def _check_choices(self) -> None:
        """Checks that every token was chosen from valid logits, and not after a token that has no embedding.

        Raises:
            GenerationError: one was not; the message names the prompt and the new token.
        """
        failed = as_numpy(self._state.failed)
        if (failed < 0).all():
            return
        row = int(np.argmax(failed >= 0))
        step, new = int(failed[row]), self.new_tokens()[row]
        if step and new[step - 1] >= self._d_vocab:
            raise GenerationError(
                f"Prompt {row} chose token {new[step - 1]} as its new token {step - 1}, and the embedding has ids 0 to "
                f"{self._d_vocab - 1} alone: the text cannot go on. Keep such tokens from being chosen (a hook at "
                "'unembed.hook_out' that puts -inf there), or stop before."
            )
        raise GenerationError(
            f"Prompt {row} has no logits to choose new token {step} by (counted from 0): they are NaN, or -inf for "
            "every token. Look at the parameters, the dtype (float16 ends at 65504) and the hooks; run_with_cache of "
            "the text so far shows where it begins."
        )

    def new_tokens(self) -> np.ndarray:
        """Returns the tokens chosen so far, ``[batch, new token]``, with fill tokens after a text's end."""
        start = self.prompts.shape[1]
        new = as_numpy(self._state.tokens)[:, start : start + self.n_new][:, : self._length].copy()
        for row, end in self._stopped.items():
            new[row, end:] = self.ends.fill[row]
        return new

    def is_text(self) -> np.ndarray:
        """Returns which new tokens belong to their text, its end included, ``[batch, new token]``."""
        new = self.new_tokens()
        ended = np.full(len(new), new.shape[1])
        if self.ends.eos is not None:
            at_end = (new[:, :, None] == self.ends.eos[:, None]).any(axis=2)
            ended = np.where(at_end.any(axis=1), at_end.argmax(axis=1) + 1, ended)
        for row, end in self._stopped.items():
            ended[row] = end
        return np.arange(new.shape[1])[None] < ended[:, None]

    def logits(self) -> tuple[jax.Array, ...]:
        """Returns the logits that each new token was chosen from."""
        assert self._state.logits is not None
        return tuple(jax.device_put(list(as_numpy(self._state.logits)[: self.n_new][: self._length])))

    def _stop_at_strings(self) -> None:
        new, text, done = self.new_tokens(), self.is_text(), as_numpy(self._state.done).copy()
        for row in range(len(new)):
            answer = new[row][text[row]]
            if row in self._stopped or not self._stands_in(row, answer):
                continue
            self._stopped[row] = next(n for n in range(1, len(answer) + 1) if self._stands_in(row, answer[:n]))
            done[row] = True
        if done.all():
            self._length = int(self.is_text().sum(axis=1).max())
        self._state = dataclasses.replace(self._state, done=jax.device_put(done))

    def _stands_in(self, row: int, new: np.ndarray) -> bool:
        """Whether an answer contains a stop string; it is decoded with its prompt, on which spaces may depend."""
        assert self.tokenizer is not None
        prompt = self.prompts.value[row][self.prompts.mask[row]].tolist() if self.prompts.kind != "embeds" else []
        before, whole = self.tokenizer.decode(prompt), self.tokenizer.decode([*prompt, *new.tolist()])
        pairs = zip(before, whole, strict=False)  # the prompt's last character may end in the answer
        answer = whole[next((n for n, (one, other) in enumerate(pairs) if one != other), len(before)) :]
        return any(string in answer for string in self.ends.strings)


def finish(generation: Generation, model: "HookedTransformer", return_type: Returns) -> Any:
    """Returns the result of ``generate``: text, tokens or the model's embeddings, prompt included."""
    prompts, new = generation.prompts, generation.new_tokens()
    kind = return_type if return_type != "input" else "str" if prompts.kind == "list" else prompts.kind
    if kind == "embeds":
        W_E, before = model.W_E, prompts.value
        after = take(W_E, new)
        before = before if prompts.kind == "embeds" else take(W_E, before)
        return jnp.concatenate([before, after], axis=1)
    before = new[:, :0] if prompts.kind == "embeds" else prompts.value
    whole = np.concatenate([before, new], axis=1)
    if kind == "tokens":
        return jax.device_put(whole)
    need_tokenizer(generation.tokenizer, 'return_type="str"', ', or ask for return_type="tokens"')
    shown = prompts.mask[:, : before.shape[1]]
    prompts_ids = [ids[seen].tolist() for ids, seen in zip(before, shown, strict=True)]
    answers = [ids[seen].tolist() for ids, seen in zip(new, generation.is_text(), strict=True)]
    texts = [_text(generation, row, *ids) for row, ids in enumerate(zip(prompts_ids, answers, strict=True))]
    return texts[0] if prompts.kind == "str" or (prompts.kind != "list" and len(texts) == 1) else texts


def _text(generation: Generation, row: int, prompt: list[int], answer: list[int]) -> str:
    """Returns a row's text, without the BOS that was added to it and the token that ended it."""
    assert generation.tokenizer is not None
    if generation.ends.eos is not None and answer and answer[-1] in generation.ends.eos[row]:
        answer = answer[:-1]
    return generation.tokenizer.decode([*prompt[generation.prompts.added_bos :], *answer])
