"""The text methods of a model: each asks the tokenizer, with the model's own defaults."""

from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp

from tljax.errors import TokenizerError
from tljax.text import tokens as text
from tljax.typing import PaddingSide

if TYPE_CHECKING:
    from tljax.config import HookedTransformerConfig
    from tljax.text.tokenizer import Tokenizer


class TextMethods:
    """Text to tokens and back. ``prepend_bos=None`` means ``cfg.default_prepend_bos``."""

    cfg: "HookedTransformerConfig"
    _tokenizer: "Tokenizer | None"

    def _text(self) -> "Tokenizer":
        if self._tokenizer is None:
            raise TokenizerError(
                "This model has no tokenizer. Attach one: model = model.set_tokenizer(hugging_face_tokenizer)."
            )
        return self._tokenizer

    def _bos(self, prepend_bos: bool | None) -> bool:
        return self.cfg.default_prepend_bos if prepend_bos is None else prepend_bos

    def to_tokens(
        self,
        input: str | list[str],
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
        truncate: bool = True,
    ) -> jax.Array:
        """Turns a text or a list of texts into token ids ``[batch, pos]``; BOS is added once, never doubled."""
        ids = text.to_tokens(
            self._text(), input, prepend_bos=self._bos(prepend_bos), padding_side=padding_side, truncate=truncate,
            n_ctx=self.cfg.n_ctx,
        )  # fmt: skip
        return jnp.asarray(ids)

    def to_string(self, tokens: Any) -> str | list[str]:
        """Turns ids into text: a string for one id or sequence, a list for a batch."""
        return text.to_string(self._text(), tokens, d_vocab=self.cfg.d_vocab)

    def to_str_tokens(
        self, input: Any, prepend_bos: bool | None = None, padding_side: PaddingSide | None = None
    ) -> list[str] | list[list[str]]:
        """Shows each token of a text, of ids, or of a list of texts as its own string."""
        return text.to_str_tokens(
            self._text(),
            input,
            prepend_bos=self._bos(prepend_bos),
            padding_side=padding_side,
            n_ctx=self.cfg.n_ctx,
            d_vocab=self.cfg.d_vocab,
        )

    def to_single_token(self, string: str) -> int:
        """Id of a text that is exactly one token; an error shows the pieces otherwise."""
        return text.to_single_token(self._text(), string)

    def to_single_str_token(self, int_token: int) -> str:
        """Text of one id."""
        return text.to_single_str_token(self._text(), int_token, d_vocab=self.cfg.d_vocab)

    def get_token_position(
        self,
        single_token: str | int,
        input: Any,
        mode: Literal["first", "last"] = "first",
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
    ) -> int:
        """Position of a token's ``"first"`` or ``"last"`` occurrence in a prompt."""
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
