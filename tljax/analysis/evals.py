"""Rough evaluations of language models: loss on text and on repeated tokens, indirect objects (Wang et al. 2022).

Nothing here downloads: where TransformerLens fetches a data set, these functions take the texts as an argument.
"""

import dataclasses
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tljax.checks import typed
from tljax.errors import InputError, TokenizerError
from tljax.model.hooked_transformer import HookedTransformer
from tljax.text.padding import pad_rows
from tljax.utils.tokenizing import tokenize_and_concatenate

TEXT = (
    "The history of science has turning points at which a new instrument was built. After the microscope, the cell "
    "could be seen, and a whole field of questions that nobody had asked before became a day's work."
)


def sanity_check(model: HookedTransformer, prompt: str = TEXT) -> Any:
    """Returns the mean loss on a plain English text, in nats: below 5 is good, above 7 something is wrong."""
    return model(prompt, return_type="loss")


@typed
def induction_loss(
    model: HookedTransformer,
    tokenizer: Any = None,
    batch_size: int = 4,
    subseq_len: int | None = None,
    prepend_bos: bool | None = None,
    *,
    seed: int = 0,
    tokens: Any = None,
) -> Any:
    """Computes the mean loss on the second copy of repeated random tokens, low if a model has induction heads.

    Args:
        model: the model.
        tokenizer: gives the BOS id; ``None`` takes the model's.
        batch_size: number of sequences.
        subseq_len: tokens in one copy; ``None`` means 384, or half the context if that is less.
        prepend_bos: whether the first token is replaced by BOS; ``None`` means the model's default. A model without a
            tokenizer has no BOS.
        seed: random seed.
        tokens: the sequences ``[batch, 2 * subseq_len]``, instead of random ones with ids of 100 to 20000.

    Returns:
        A scalar, in nats; the first token of the second copy, which cannot be predicted, does not count.

    Raises:
        InputError: two copies do not fit the context, or ``tokens`` do not have that shape.
    """
    cfg = model.cfg
    if tokens is None:
        length = min(384, cfg.n_ctx // 2) if subseq_len is None else subseq_len
        if length < 2 or 2 * length > cfg.n_ctx:
            raise InputError(f"Two copies of subseq_len={length} tokens do not fit n_ctx={cfg.n_ctx}.")
        high = min(20000, cfg.d_vocab)
        low = 100 if high > 200 else 0
        once = np.random.default_rng(seed).integers(low, high, (batch_size, length))
        repeated = np.concatenate([once, once], axis=1).astype(np.int32)
        bos = _bos_id(model, tokenizer)
        if bos is not None and (cfg.default_prepend_bos if prepend_bos is None else prepend_bos):
            repeated[:, 0] = bos
    else:
        repeated = np.asarray(tokens)
        if repeated.ndim != 2 or repeated.shape[1] < 4 or repeated.shape[1] % 2:
            raise InputError(f"tokens must be [batch, 2 * subseq_len]; got shape {repeated.shape}.")
    losses = model(repeated, return_type="loss", loss_per_token=True)
    return losses[:, repeated.shape[1] // 2 + 1 :].mean()


@typed
def make_data_loader(
    data: Any, tokenizer: Any, batch_size: int = 8, max_length: int = 1024, column_name: str = "text", seed: int = 0
) -> list[dict[str, np.ndarray]]:
    """Returns shuffled, full batches of full rows of text, ``[{"tokens": [batch_size, max_length]}, …]``.

    Args:
        data: texts, or anything :func:`tljax.utils.tokenize_and_concatenate` takes.
        tokenizer: a Hugging Face tokenizer.
        batch_size: rows in a batch.
        max_length: tokens in a row.
        column_name: key of the text, if rows are mappings.
        seed: random seed for the order of rows.
    """
    rows = tokenize_and_concatenate(data, tokenizer, max_length=max_length, column_name=column_name)["tokens"]
    rows = rows[np.random.default_rng(seed).permutation(len(rows))]
    starts = range(0, len(rows) - batch_size + 1, batch_size)
    if not starts:
        raise InputError(f"The data fill {len(rows)} rows of {max_length} tokens, less than one batch of {batch_size}.")
    return [{"tokens": rows[start : start + batch_size]} for start in starts]


@typed
def evaluate_on_dataset(model: HookedTransformer, data_loader: Iterable[Any], truncate: int = 100) -> float:
    """Averages the loss (nats) over at most ``truncate`` batches, ``{"tokens": [batch, pos]}`` or ``[batch, pos]``."""
    losses = []
    for number, batch in enumerate(data_loader):
        if number == truncate:
            break
        tokens = batch["tokens"] if isinstance(batch, Mapping) else batch
        losses.append(float(model(np.asarray(tokens), return_type="loss")))
    if not losses:
        raise InputError("There is no batch to evaluate on.")
    return float(np.mean(losses))


@typed
def evaluate(
    model: HookedTransformer,
    data: Mapping[str, Any] | None = None,
    truncate: int = 100,
    batch_size: int = 8,
    tokenizer: Any = None,
) -> dict[str, float]:
    """Computes the mean loss on several data sets.

    Args:
        model: the model.
        data: maps a name to texts, in a form that :func:`make_data_loader` takes.
        truncate: largest number of batches of each data set.
        batch_size: rows in a batch; a row is as long as the model's context, at most 1024 tokens.
        tokenizer: ``None`` takes the model's.

    Returns:
        ``{"<name>_loss": nats}``.

    Raises:
        InputError: no data.
    """
    if not data:
        raise InputError(
            "evaluate downloads nothing. Pass texts by name, data={'wiki': texts}, for example "
            "texts = datasets.load_dataset('wikitext', 'wikitext-2-v1', split='train')['text']."
        )
    hf = _tokenizer(model, tokenizer)
    length = min(1024, model.cfg.n_ctx)
    return {
        f"{name}_loss": evaluate_on_dataset(model, make_data_loader(texts, hf, batch_size, length), truncate)
        for name, texts in data.items()
    }


@dataclasses.dataclass(frozen=True)
class IOISample:
    """A sentence with its indirect object and its subject, both with a leading space."""

    text: str
    IO: str
    S: str


class IOIDataset(Sequence[dict[str, np.ndarray]]):
    """Sentences in which the subject ``[B]`` gives something to the indirect object ``[A]``.

    Indexing gives ``{"prompt", "IO", "S"}`` as token ids; the prompt ends in the indirect object.

    Args:
        tokenizer: a Hugging Face tokenizer.
        templates: sentences with ``[A]``, ``[B]`` and the keys of ``nouns`` in brackets, ending in ``[A]``.
        names: two names or more, drawn without replacement.
        nouns: maps a placeholder to words; within one sentence a placeholder always gets the same word.
        num_samples: how many sentences.
        symmetric: whether to add each sentence with the names exchanged; ``num_samples`` counts both.
        prepend_bos: whether to put the BOS token in front.
        seed: random seed; ``None`` draws anew every time.

    Attributes:
        samples: the sentences, as :class:`IOISample`.

    Raises:
        InputError: fewer than two names, no templates, or a template that lacks ``[A]`` or ``[B]`` or ends otherwise.
        TokenizerError: ``prepend_bos`` and a tokenizer without a BOS token.
    """

    TEMPLATES = (
        "When [A] and [B] went to the [LOCATION], [B] gave [OBJECT] to [A]",
        "After [B] and [A] had met at the [LOCATION], [B] handed [OBJECT] to [A]",
    )
    NAMES = ("John", "Mary")
    NOUNS: Mapping[str, Sequence[str]] = {
        "LOCATION": ("store", "market"),
        "OBJECT": ("a book", "a drink", "some bread"),
    }

    def __init__(
        self,
        tokenizer: Any,
        templates: Sequence[str] | None = None,
        names: Sequence[str] | None = None,
        nouns: Mapping[str, Sequence[str]] | None = None,
        num_samples: int = 1000,
        symmetric: bool = False,
        prepend_bos: bool = True,
        seed: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.prepend_bos = prepend_bos
        self.templates = tuple(self.TEMPLATES if templates is None else templates)
        self.names = tuple(self.NAMES if names is None else names)
        self.nouns = dict(self.NOUNS if nouns is None else nouns)
        if len(set(self.names)) < 2 or not self.templates:
            raise InputError(f"IOIDataset needs two names and a template; got {self.names} and {self.templates}.")
        for template in self.templates:
            if "[A]" not in template or "[B]" not in template or not template.rstrip(".").endswith("[A]"):
                raise InputError(
                    f"A template has [A] and [B] and ends in [A], the indirect object to predict: {template!r}."
                )
        if prepend_bos and tokenizer.bos_token_id is None:
            raise TokenizerError("This tokenizer has no BOS token: pass prepend_bos=False.")
        rng = random.Random(seed)
        drawn = num_samples // 2 if symmetric else num_samples
        self.samples = [sample for _ in range(drawn) for sample in self._draw(rng, symmetric)]

    def _draw(self, rng: random.Random, symmetric: bool) -> list[IOISample]:
        text = rng.choice(self.templates)
        for placeholder, words in self.nouns.items():
            text = text.replace(f"[{placeholder}]", rng.choice(list(words)))
        first, second = rng.sample(list(dict.fromkeys(self.names)), 2)
        pairs = [(first, second), (second, first)] if symmetric else [(first, second)]
        return [IOISample(text.replace("[A]", a).replace("[B]", b), f" {a}", f" {b}") for a, b in pairs]

    def _encode(self, text: str) -> np.ndarray:
        return np.asarray(self.tokenizer.encode(text, add_special_tokens=False), np.int32)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        sample = self.samples[index]
        front = [self.tokenizer.bos_token_id] if self.prepend_bos else []
        prompt = np.concatenate([np.asarray(front, np.int32), self._encode(sample.text)])
        return {"prompt": prompt, "IO": self._encode(sample.IO), "S": self._encode(sample.S)}


@typed
def ioi_eval(
    model: HookedTransformer,
    dataset: Any = None,
    batch_size: int = 8,
    num_samples: int = 1000,
    tokenizer: Any = None,
    symmetric: bool = False,
) -> dict[str, float]:
    """Measures how much a model prefers the indirect object to the subject.

    Args:
        model: the model.
        dataset: an :class:`IOIDataset`, or any sequence of ``{"prompt", "IO", "S"}`` whose prompts end in ``IO``.
            ``None`` makes one with the default templates and seed 0.
        batch_size: number of prompts that run together.
        num_samples: prompts of the default data set.
        tokenizer: ``None`` takes the model's.
        symmetric: whether the default data set also has every sentence with the names exchanged.

    Returns:
        ``{"Logit Difference": mean, "Accuracy": share above zero}``, at the first token where the names differ.

    Raises:
        InputError: no samples, a prompt that does not end in its ``IO``, or one name's tokens begin the other's.
        TokenizerError: no data set and no tokenizer.
    """
    if dataset is None:
        hf = _tokenizer(model, tokenizer)
        dataset = IOIDataset(
            hf, num_samples=num_samples, symmetric=symmetric, prepend_bos=hf.bos_token_id is not None, seed=0
        )
    if len(dataset) == 0:
        raise InputError("The data set has no samples.")
    differences: list[float] = []
    for batch in _batches(dataset, batch_size):
        questions = [_question(number + len(differences), sample) for number, sample in enumerate(batch)]
        logits = np.asarray(model(pad_rows([sample["prompt"] for sample in batch])[0]), np.float32)
        differences += [
            float(row[position, right] - row[position, wrong])
            for row, (position, right, wrong) in zip(logits, questions, strict=True)
        ]
    values = np.asarray(differences)
    return {"Logit Difference": float(values.mean()), "Accuracy": float((values > 0).mean())}


def _batches(dataset: Any, size: int) -> Iterator[list[Any]]:
    for start in range(0, len(dataset), size):
        yield [dataset[index] for index in range(start, min(start + size, len(dataset)))]


def _question(number: int, sample: Mapping[str, Any]) -> tuple[int, int, int]:
    """Returns the position whose logits to read, and the indirect object's and the subject's token there."""
    prompt, answer, wrong = (np.asarray(sample[key]) for key in ("prompt", "IO", "S"))
    if not len(answer) or not np.array_equal(prompt[-len(answer) :], answer):
        raise InputError(f"Prompt {number} does not end in the tokens of its IO, {answer.tolist()}.")
    shared = min(len(answer), len(wrong))
    different = np.flatnonzero(answer[:shared] != wrong[:shared])
    if not len(different):
        raise InputError(f"Sample {number}: IO and S begin with the same tokens {answer[:shared].tolist()}.")
    first = int(different[0])
    return len(prompt) - len(answer) + first - 1, int(answer[first]), int(wrong[first])


def _tokenizer(model: HookedTransformer, tokenizer: Any) -> Any:
    hf = model.tokenizer if tokenizer is None else tokenizer
    if hf is None:
        raise TokenizerError("This model has no tokenizer: pass tokenizer=, or model = model.set_tokenizer(...).")
    return hf


def _bos_id(model: HookedTransformer, tokenizer: Any) -> int | None:
    hf = model.tokenizer if tokenizer is None else tokenizer
    return None if hf is None else hf.bos_token_id
