"""The generation methods of a model: ``generate``, ``generate_stream`` and ``generate_with_cache``."""

import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Unpack, cast

import jax
import numpy as np

from tljax.cache.activation_cache import ActivationCache
from tljax.checks import typed
from tljax.config import HookedTransformerConfig
from tljax.errors import InputError
from tljax.generation.answers import Generation, Returns, finish
from tljax.generation.few_rows import TransposedWeights
from tljax.generation.hooks import TextSize, place_hooks
from tljax.generation.prompts import check_room, read_prompts
from tljax.generation.sampling import SamplingOptions, read_key, read_sampling, row_keys
from tljax.generation.stopping import read_ends
from tljax.hooks.dictionary import HookDictionary
from tljax.hooks.points import point_table
from tljax.progress import Progress
from tljax.typing import HookList, NamesFilter, PaddingSide, Params, PromptOptions

if TYPE_CHECKING:
    from tljax.model.hooked_transformer import HookedTransformer
    from tljax.text.tokenizer import Tokenizer

_PER_ROUND = 32
"""Tokens generated between two updates of the progress bar and two searches for stop strings."""


class GenerateOptions(SamplingOptions, PromptOptions, total=False):
    """Options of generation, documented at :meth:`GenerationMethods.generate`."""

    stop_at_eos: bool
    eos_token_id: Any
    use_past_kv_cache: bool
    stop_strings: str | Sequence[str] | None
    fwd_hooks: HookList
    seed: int | None
    key: Any


class GenerateOutput(NamedTuple):
    """The output of generation with ``output_logits=True``.

    Attributes:
        sequences: the output without ``output_logits``.
        logits: for each new token, the logits it was chosen from, ``[batch, d_vocab]``.
    """

    sequences: Any
    logits: tuple[jax.Array, ...]


@functools.partial(typed, receiver=read_sampling)
def begin(
    model: "HookedTransformer",
    input: Any,
    max_new_tokens: int,
    output_logits: bool = False,
    *,
    stop_at_eos: bool = True,
    eos_token_id: Any = None,
    use_past_kv_cache: bool = True,
    prepend_bos: bool | None = None,
    padding_side: PaddingSide | None = None,
    stop_strings: str | Sequence[str] | None = None,
    fwd_hooks: HookList = (),
    attention_mask: Any = None,
    seed: int | None = None,
    key: Any = None,
    **sampling: Unpack[SamplingOptions],
) -> Generation:
    """Checks the arguments of a generation and runs the prompts."""
    prompts = read_prompts(model, input, prepend_bos, padding_side, attention_mask)
    batch = prompts.shape[0]
    ends = read_ends(model.cfg, model._tokenizer, batch, stop_at_eos, eos_token_id, stop_strings)
    if seed is None and key is None:
        seed = int(np.random.default_rng().integers(2**32))
    keys = row_keys(read_key(key, seed), batch)
    hooked = model.with_hooks(fwd_hooks)
    return Generation(hooked, prompts, max_new_tokens, ends, sampling, keys, use_past_kv_cache, output_logits)


_typed = functools.partial(typed, receiver=begin)


class GenerationMethods:
    """Methods that continue texts."""

    cfg: HookedTransformerConfig
    params: Params
    _hooks: HookDictionary
    _tokenizer: "Tokenizer | None"

    @functools.cached_property
    def _transposed(self) -> TransposedWeights:
        """Transposed weights for generation on a CPU, kept as long as this model or a hooked version of it exists."""
        return TransposedWeights()

    @_typed
    def generate(
        self,
        input: Any = "",
        max_new_tokens: int = 10,
        *,
        return_type: Returns = "input",
        verbose: bool | None = None,
        output_logits: bool = False,
        **options: Unpack[GenerateOptions],
    ) -> Any:
        """Continues prompts.

        Args:
            input: a text, a list of texts, token ids ``[pos]`` or ``[batch, pos]``, or embeddings ``[batch, pos,
                d_model]``. Several texts are padded on the left.
            max_new_tokens: most new tokens for each prompt.
            stop_at_eos: whether an EOS token ends a text, ``True`` by default. Positions after it are filled with
                ``cfg.pad_token_id`` if the checkpoint's own EOS tokens are used and it has a PAD, otherwise with EOS.
            eos_token_id: a token id, several, or a list of them for each prompt; ``None`` takes ``cfg.eos_token_ids``,
                and the tokenizer's EOS where the checkpoint declares none.
            do_sample: ``True``, the default, samples; ``False`` always takes the likeliest token.
            top_k, top_p: keep only the ``k`` likeliest tokens, or the likeliest that together reach probability ``p``.
            temperature: divides the logits, 1 by default; 0 means the likeliest token.
            freq_penalty: subtracted from a token's logit, after the temperature, for each time it occurs in the text.
            use_past_kv_cache: ``False`` runs the whole text again for every token.
            prepend_bos, padding_side, attention_mask: as in :meth:`__call__`.
            return_type: ``"input"`` returns the same type as ``input``; or ``"str"``, ``"tokens"``, ``"embeds"``.
            verbose: whether to show a progress bar; ``None`` shows one after three seconds.
            repetition_penalty: as in Hugging Face: logits of tokens that occur are divided by it (multiplied if
                negative).
            stop_strings: strings that end an answer once it contains them.
            output_logits: also return the logits each token was chosen from, as a :class:`GenerateOutput`.
            fwd_hooks: hooks for this generation, in addition to the model's. Interventions address positions of
                the whole text: ``pos=3``, ``pos="prompt"``, ``pos="new"``; plain functions see each step's activations.
            seed, key: source of the random draws; by default each call draws differently.

        Returns:
            Prompt and continuation: a string, a list of strings, ``[batch, pos]`` or ``[batch, pos, d_model]``. For
            input embeddings, text and tokens hold only the continuation.

        Raises:
            InputError: the text would exceed ``n_ctx``, a prompt is empty without BOS, an argument is out of range.
            InterventionError: a hook addresses a position the text will not have.

        Recompiles for a new batch size, capacity for the text (128, 256, 512 … tokens), set of hooked points, or type
        of sampling; never for other lengths, strengths or values.
        """
        generation = begin(cast("HookedTransformer", self), input, max_new_tokens, output_logits, **options)
        _run(generation, verbose)
        output = finish(generation, cast("HookedTransformer", self), return_type)
        return GenerateOutput(output, generation.logits()) if output_logits else output

    @_typed
    def generate_stream(
        self,
        input: Any = "",
        max_new_tokens: int = 10,
        max_tokens_per_yield: int = 25,
        *,
        return_type: Returns = "tokens",
        verbose: bool | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Iterator[Any]:
        """Continues prompts piece by piece.

        Args:
            input, max_new_tokens: as in :meth:`generate`.
            max_tokens_per_yield: most new tokens in a piece.
            return_type: ``"str"``, or token ids.
            verbose: ignored: the pieces show the progress.
            **options: as in :meth:`generate`.

        Yields:
            The prompt with the first new tokens, then the tokens that follow: ids ``[batch, pos]``, or text (the new
            part of it) with ``return_type="str"``.
        """
        if max_tokens_per_yield < 1:
            raise InputError(f"max_tokens_per_yield={max_tokens_per_yield} must be at least 1.")
        kind: Returns = "str" if return_type == "str" else "tokens"
        generation = begin(cast("HookedTransformer", self), input, max_new_tokens, **options)
        shown: Any = None
        while True:
            generation.advance(max_tokens_per_yield - (shown is None))
            whole = finish(generation, cast("HookedTransformer", self), kind)
            news = _news(whole, shown, generation.is_done)
            yield news
            shown = whole if kind == "tokens" else news if shown is None else _joined(shown, news)
            if generation.is_done:
                return

    @_typed
    def generate_with_cache(
        self,
        input: Any = "",
        max_new_tokens: int = 10,
        *,
        names_filter: NamesFilter = None,
        return_type: Returns = "input",
        verbose: bool | None = None,
        **options: Unpack[GenerateOptions],
    ) -> tuple[Any, ActivationCache]:
        """Continues prompts, and also returns the activations of prompt and continuation.

        They come from one run over the finished text, with the same hooks. (A plain function among the hooks is called
        in that run as well; it then sees the whole text. A hook at positions that the text did not reach is an error.)

        Args:
            input, max_new_tokens, return_type, verbose: as in :meth:`generate`.
            names_filter: which activations to keep, as in :meth:`run_with_cache`.
            **options: as in :meth:`generate`.

        Returns:
            The output of :meth:`generate`, and the cache, with positions after a text's end marked as padding.
        """
        if getattr(input, "ndim", 0) == 3:
            raise InputError("generate_with_cache takes text or tokens; for embeddings run the finished text yourself.")
        generation = begin(cast("HookedTransformer", self), input, max_new_tokens, **options)
        check_room(self.cfg, generation.prompts, max_new_tokens, runs_last=True)
        _run(generation, verbose)
        prompts, new = generation.prompts, generation.new_tokens()
        mask = np.concatenate([prompts.mask, generation.is_text()], axis=1)
        model = cast("HookedTransformer", self).with_hooks(options.get("fwd_hooks", ()))
        total = mask.shape[1]
        hooks = place_hooks(model._hooks, point_table(self.cfg), TextSize.of(prompts.mask, total, total))
        tokens = np.concatenate([prompts.value, new], axis=1)
        _, cache = model._with_hooks(hooks).run_with_cache(
            tokens, return_type=None, names_filter=names_filter, attention_mask=mask
        )
        return finish(generation, model, return_type), cache


def _run(generation: Generation, verbose: bool | None) -> None:
    with Progress(generation.limit, verbose, "generate", "token") as bar:
        bar.advance(generation.n_new)
        while not generation.is_done:
            before = generation.n_new
            generation.advance(_PER_ROUND)
            bar.advance(generation.n_new - before)


def _news(whole: Any, shown: Any, is_done: bool) -> Any:
    """Returns the part of ``whole`` after ``shown``, without a last character that is not complete yet."""
    if isinstance(whole, list):
        return [_news(text, None if shown is None else shown[row], is_done) for row, text in enumerate(whole)]
    if isinstance(whole, str):
        text = whole if is_done else whole.rstrip("\ufffd")
        return text[len(shown or "") :]
    return whole if shown is None else whole[:, shown.shape[1] :]


def _joined(shown: Any, news: Any) -> Any:
    return [one + more for one, more in zip(shown, news, strict=True)] if isinstance(shown, list) else shown + news
