"""The text methods of a model, which call the tokenizer with the model's defaults."""

from typing import TYPE_CHECKING, Any, Literal, cast

import jax
import numpy as np

from tljax.checks import is_traced, typed
from tljax.errors import InputError
from tljax.text import tokens as text
from tljax.text.batch import Batch
from tljax.text.chat import Messages, chat_row, conversations
from tljax.text.inputs import check_ids, check_length, check_tokens, texts_in
from tljax.text.report import TokensReport, report_ids, report_texts
from tljax.text.tokenizer import check_padding_side, need_tokenizer
from tljax.typing import PaddingSide

if TYPE_CHECKING:
    from tljax.config import HookedTransformerConfig
    from tljax.text.tokenizer import Tokenizer


def token_labels(model: "TextMethods", ids: Any) -> list[str]:
    """Returns a label for each of ``ids`` ``[n]``: its text, or the id if there is no tokenizer."""
    numbers = np.asarray(ids).tolist()
    readable = model._tokenizer is not None and model._tokenizer.hf is not None
    return cast(list[str], model.to_str_tokens(numbers)) if readable else [str(number) for number in numbers]


class TextMethods:
    """Text to tokens and back. ``prepend_bos=None`` means ``cfg.default_prepend_bos``."""

    cfg: "HookedTransformerConfig"
    _tokenizer: "Tokenizer | None"

    def _text(self) -> "Tokenizer":
        return need_tokenizer(self._tokenizer)

    def _bos(self, prepend_bos: bool | None) -> bool:
        return self.cfg.default_prepend_bos if prepend_bos is None else prepend_bos

    @typed
    def to_tokens(
        self,
        input: str | list[str] | Messages | list[Messages],
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
        truncate: bool = True,
    ) -> jax.Array:
        """Turns a text or a list of texts into token ids ``[batch, pos]``; BOS is added once.

        Chat messages (``[{"role": …, "content": …}, …]``) go through :meth:`apply_chat_template`, uncut.

        Warns:
            DoubledBosWarning: a text spells BOS and gets another; once for each tokenizer.
            TruncationWarning: a text is longer than the model's context, and is cut; every time. (The model itself
                cuts nothing: given such a text it raises an InputError.)
        """
        if (chats := conversations(input)) is not None:
            return self.apply_chat_template(chats, prepend_bos=prepend_bos, padding_side=padding_side)
        ids = text.to_tokens(
            self._text(), cast(Any, input), prepend_bos=self._bos(prepend_bos), padding_side=padding_side,
            truncate=truncate, n_ctx=self.cfg.n_ctx,
        )  # fmt: skip
        return jax.device_put(ids)

    @typed
    def apply_chat_template(
        self,
        messages: Messages | list[Messages],
        add_generation_prompt: bool | None = None,
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
        **options: Any,
    ) -> jax.Array:
        """Turns a conversation, or a list of them, into token ids ``[batch, pos]`` by the tokenizer's chat template.

        Args:
            messages: ``[{"role": "user", "content": "…"}, …]``, or a list of such lists.
            add_generation_prompt: whether to append the tokens that introduce the answer; ``None`` means unless the
                last message is the assistant's.
            prepend_bos: ``None`` leaves the start as the template has it; ``True`` ensures one BOS, ``False`` none.
            padding_side: where shorter conversations are padded.
            **options: variables of the template.

        Raises:
            TokenizerError: there is no tokenizer or no chat template, or the template refuses the messages.
            InputError: ``messages`` are not messages, or longer than the model's context.
        """
        tokenizer = self._text()
        several = conversations(messages) or [messages]
        rows = [
            chat_row(tokenizer, one, prepend_bos=prepend_bos, add_generation_prompt=add_generation_prompt, **options)  # type: ignore[arg-type]
            for one in several
        ]
        return self._batch(rows, padding_side).tokens

    @typed
    def to_batch(self, prompts: Any, prepend_bos: bool | None = None, padding_side: PaddingSide | None = None) -> Batch:
        """Puts prompts of any lengths into one :class:`~tljax.Batch`, which runs each as if it were alone.

        Args:
            prompts: a text or a list of texts; token ids, ``[pos]``, ``[batch, pos]`` or a list of rows of any lengths
                (these need no tokenizer); chat messages or a list of conversations; or a ``Batch`` to pad anew.
            prepend_bos: whether texts get a BOS token; ``None`` means ``cfg.default_prepend_bos`` (and for messages:
                as the template has it).
            padding_side: where shorter prompts are filled; ``None`` means the tokenizer's side, or right without one.

        Raises:
            InputError: a prompt without tokens or longer than ``n_ctx``, or an id outside the vocabulary.
            TokenizerError: texts, and no tokenizer.
        """
        return self._to_batch(prompts, prepend_bos, padding_side)

    def _to_batch(
        self, prompts: Any, prepend_bos: bool | None, padding_side: PaddingSide | None, warn: bool = True
    ) -> Batch:
        check_padding_side(padding_side)
        if isinstance(prompts, Batch):
            if padding_side in (None, prompts.padding_side):
                return prompts
            return self._batch([np.asarray(prompts.row(index)) for index in range(len(prompts))], padding_side)
        rows: Any
        if (chats := conversations(prompts)) is not None:
            rows = [chat_row(self._text(), one, prepend_bos=prepend_bos) for one in chats]
        elif texts_in(prompts) is not None:
            rows = text.to_rows(self._text(), prompts, prepend_bos=self._bos(prepend_bos), warn=warn)
            check_length(self.cfg, max(map(len, rows)), is_text=True)
        else:
            rows = self._token_rows(prompts)
        return self._batch(rows, padding_side)

    def _token_rows(self, prompts: Any) -> list[np.ndarray]:
        if is_traced(prompts):
            raise InputError(
                "to_batch reads lengths, which a traced array does not show: make the Batch outside jax.jit and pass "
                "it in, or use Batch.from_mask(tokens, mask, padding_side=...)."
            )
        if not isinstance(prompts, list | tuple):
            return list(np.asarray(check_tokens(self.cfg, prompts)))
        if not prompts:
            raise InputError("There are no prompts in an empty list: give at least one text, or one row of token ids.")
        if not any(np.ndim(row) for row in prompts):
            prompts = [prompts]
        rows = [np.asarray(row) for row in prompts]
        for index, row in enumerate(rows):
            if row.ndim != 1:
                raise InputError(f"Prompt {index} has shape {row.shape}: give each prompt as ids [pos].")
            if row.size and not np.issubdtype(row.dtype, np.integer):
                raise InputError(f"Prompt {index} holds {row.dtype} values: token ids must be integers.")
            check_ids(self.cfg, row, f" of prompt {index}")
        return rows

    def _batch(self, rows: list[Any], padding_side: PaddingSide | None) -> Batch:
        tokenizer = self._tokenizer
        padding = tokenizer.pad_token_id if tokenizer is not None else None
        side: PaddingSide = padding_side or (tokenizer.padding_side if tokenizer is not None else "right")
        batch = Batch.from_rows(rows, side, 0 if padding is None else padding)
        check_length(self.cfg, batch.shape[1])
        return batch

    @typed
    def tokens_report(
        self, prompt: Any, prepend_bos: bool | None = None, padding_side: PaddingSide | None = None
    ) -> TokensReport:
        """Returns a report, to print, of a prompt's tokens and of who added the special ones.

        Args:
            prompt: whatever :meth:`to_batch` takes.
            prepend_bos, padding_side: as in :meth:`to_batch`.

        Returns:
            One entry per prompt, with ids, strings, the source of BOS and EOS, and padding.
        """
        tokenizer, chats, texts = self._text(), conversations(prompt), texts_in(prompt)
        batch = self._to_batch(prompt, prepend_bos, padding_side, warn=False)
        because = "cfg.default_prepend_bos" if prepend_bos is None else "prepend_bos"
        if texts is None:
            return report_ids(tokenizer, batch, None if chats is None else "template")
        return report_texts(tokenizer, batch, texts, self._bos(prepend_bos), because)

    def to_string(self, tokens: Any) -> str | list[str]:
        """Turns ids into text: a string for one id or sequence, a list for a batch."""
        return text.to_string(self._text(), tokens, d_vocab=self.cfg.d_vocab)

    @typed
    def to_str_tokens(
        self, input: Any, prepend_bos: bool | None = None, padding_side: PaddingSide | None = None
    ) -> list[str] | list[list[str]]:
        """Returns each token of a text, of ids, or of a list of texts as its own string."""
        return text.to_str_tokens(
            self._text(),
            input,
            prepend_bos=self._bos(prepend_bos),
            padding_side=padding_side,
            n_ctx=self.cfg.n_ctx,
            d_vocab=self.cfg.d_vocab,
        )

    def to_single_token(self, string: str) -> int:
        """Returns the id of a text that is exactly one token; otherwise raises an error that shows its tokens."""
        return text.to_single_token(self._text(), string)

    def to_single_str_token(self, int_token: int) -> str:
        """Returns the text of one id."""
        return text.to_single_str_token(self._text(), int_token, d_vocab=self.cfg.d_vocab)

    @typed
    def get_token_position(
        self,
        single_token: str | int,
        input: Any,
        mode: Literal["first", "last"] = "first",
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
    ) -> int:
        """Returns the position of a token's ``"first"`` or ``"last"`` occurrence in a prompt."""
        return text.get_token_position(
            self._text(),
            single_token,
            input,
            mode=mode,
            prepend_bos=self._bos(prepend_bos),
            padding_side=padding_side,
            n_ctx=self.cfg.n_ctx,
            d_vocab=self.cfg.d_vocab,
        )
