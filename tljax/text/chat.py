"""Chat templates: a list of messages to token ids, by the tokenizer's own template."""

from collections.abc import Mapping, Sequence
from typing import Any

from tljax.errors import InputError, TokenizerError
from tljax.text.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, Any]]


def conversations(input: Any) -> list[Messages] | None:
    """Returns the conversations in an input (messages, or a list of lists of messages); ``None`` for other inputs."""
    if not isinstance(input, list | tuple) or not input:
        return None
    if isinstance(input[0], Mapping):
        return [input]
    if isinstance(input[0], list | tuple) and input[0] and isinstance(input[0][0], Mapping):
        return list(input)
    return None


def chat_row(
    tokenizer: Tokenizer,
    messages: Messages,
    *,
    prepend_bos: bool | None = None,
    add_generation_prompt: bool | None = None,
    **options: Any,
) -> list[int]:
    """Turns one conversation into ids.

    The template writes the special tokens, BOS among them, and the tokenizer adds none: there is no second BOS.

    Args:
        tokenizer: the tokenizer, with a chat template.
        messages: ``[{"role": "user", "content": "…"}, …]``.
        prepend_bos: ``None`` leaves the start as the template has it; ``True`` ensures one BOS, ``False`` none.
        add_generation_prompt: whether to append the tokens that introduce the assistant's answer; ``None`` means unless
            the last message is the assistant's.
        **options: variables of the template, such as ``tools`` or ``enable_thinking``.

    Raises:
        InputError: ``messages`` are not messages.
        TokenizerError: the tokenizer has no template, or its template refuses the messages.
    """
    _check_messages(messages)
    if getattr(tokenizer.hf, "chat_template", None) is None:
        raise TokenizerError(
            "The tokenizer has no chat template, so it does not say how messages become text. Load an instruction-"
            "tuned model's tokenizer, set one with hf_tokenizer.chat_template = '…' before passing it to the model, or "
            "write the prompt as text."
        )
    if add_generation_prompt is None:
        add_generation_prompt = messages[-1]["role"] != "assistant"
    try:
        text = tokenizer.hf.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=add_generation_prompt,
            **options,
        )  # fmt: skip
    except ImportError as error:
        raise TokenizerError(f"Chat templates need jinja2 ({error}). Install it: pip install jinja2.") from error
    except Exception as error:  # whatever the template raises, jinja2's own errors among them
        raise TokenizerError(
            f"The tokenizer's chat template refused these messages: {error}. Check their roles, their order and their "
            "contents against what the model was trained on."
        ) from error
    row = [int(token) for token in tokenizer.hf(text, add_special_tokens=False)["input_ids"]]
    return row if prepend_bos is None else _with_bos(tokenizer, row, prepend_bos)


def _with_bos(tokenizer: Tokenizer, row: list[int], wanted: bool) -> list[int]:
    bos = tokenizer.bos_token_id
    if bos is None and wanted:
        raise TokenizerError("prepend_bos=True, but the tokenizer has no BOS token. Leave prepend_bos out.")
    has = row[:1] == [bos]
    if wanted and bos is not None:
        return row if has else [bos, *row]
    return row[1:] if has else row


def _check_messages(messages: Any) -> None:
    example = '[{"role": "user", "content": "Hello"}]'
    if not isinstance(messages, list | tuple) or not messages:
        raise InputError(f"Expected messages, such as {example}, got {messages!r}.")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise InputError(f"Message {index} is {message!r}; each needs a role and a content, as in {example}.")
