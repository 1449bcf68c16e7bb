"""``InterchangePairs``: base and source prompts, with the answers that a causal model gives after an interchange."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from tljax.cache.activation_cache import ActivationCache
from tljax.checks import is_traced, typed
from tljax.errors import InputError
from tljax.model.hooked_transformer import HookedTransformer
from tljax.text import positions
from tljax.text.batch import Batch

TaskLogits = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class InterchangePairs:
    """Pairs of a base and a source prompt, each with the counterfactual answer; made by :meth:`of`.

    Attributes:
        base: the prompts that run, ``[pair]``.
        source: the prompts whose activations are put in, ``[pair]``; or their cache.
        targets: the class that the causal model answers after the interchange, an index into the task logits, int32
            ``[pair]``.
        task_logits: the classes: token ids ``[class]``; ``None`` for the whole vocabulary; or a function from logits
            ``[pair, pos, d_vocab]`` to task logits ``[pair, class]``.
        read_pos: position of each base prompt's text where token ids are read, int32 ``[pair]``.
        keys: what an arbitrary label would depend on, one text a pair (:func:`arbitrary_targets`).
        named_pos: positions that differ from pair to pair, by name: in the base's and in the source's text, int32
            ``[pair]`` each.
        n_classes: number of task logits; ``None`` if only ``task_logits`` knows.
    """

    base: Batch
    source: Batch | ActivationCache
    targets: np.ndarray
    task_logits: np.ndarray | TaskLogits | None
    read_pos: np.ndarray
    keys: tuple[str, ...]
    named_pos: Mapping[str, tuple[np.ndarray, np.ndarray]]
    n_classes: int | None

    @classmethod
    @typed
    def of(
        cls,
        model: HookedTransformer,
        base: Any,
        source: Any,
        targets: Any,
        *,
        task_logits: Any = None,
        pos: Mapping[str, Any] | None = None,
        source_pos: Mapping[str, Any] | None = None,
        read_pos: Any = -1,
        keys: Sequence[str] | None = None,
    ) -> "InterchangePairs":
        """Reads and checks pairs.

        Args:
            model: the model that they are for.
            base: texts, token ids ``[pair, pos]`` or a ``Batch``: the prompts that run.
            source: the same for the prompts whose activations are put in, of any lengths; or an
                :class:`~tljax.ActivationCache` of them.
            targets: the counterfactual answers ``[pair]``: indices into the task logits. Texts of one token are looked
                up there.
            task_logits: what is answered with. Token ids or texts of one token, ``[class]``, read at ``read_pos``;
                ``None`` for the whole vocabulary there; or a function from logits ``[pair, pos, d_vocab]`` to
                ``[pair, class]``, as in TransformerLens.
            pos: names for positions of the base prompts that differ from pair to pair: ``{"name": [3, 5, ...]}``, one
                for each pair (or one number for all), counted in each prompt's text.
            source_pos: the same positions in the sources; by default those of ``pos``.
            read_pos: the position of the answer in each base prompt, a number or ``[pair]``; by default the last.
            keys: for the control with arbitrary labels: pairs with one key get one label. By default the source prompt.

        Raises:
            InputError: other numbers of bases, sources and targets; a target that is no class; a position outside a
                prompt; a function of logits of prompts that are padded on the right.
            TokenizerError: a text that is not one token.
        """
        if is_traced(targets):
            raise InputError("InterchangePairs checks its targets: make it outside jax.jit, jax.grad and jax.vmap.")
        whole = model.to_batch(base)
        given = source if isinstance(source, ActivationCache) else model.to_batch(source)
        if isinstance(given, ActivationCache):
            given.check_model(model, "The source cache")
        classes = _read_classes(model, task_logits, whole)
        n_classes = (
            len(classes) if isinstance(classes, np.ndarray) else model.cfg.d_vocab_out if classes is None else None
        )
        answers = _read_targets(model, targets, classes, n_classes)
        count = _count_of(given)
        if not len(whole) == count == len(answers):
            raise InputError(
                f"There are {len(whole)} base prompts, {count} source prompts and {len(answers)} targets: a pair "
                "needs one of "
                "each. To try every source with every base, repeat them: base=[b for b in prompts for s in prompts]."
            )
        if keys is not None and len(keys) != len(whole):
            raise InputError(f"There are {len(keys)} keys for {len(whole)} pairs: give one for each.")
        theirs = pos if source_pos is None else source_pos
        if set(pos or ()) != set(theirs or ()):
            raise InputError(f"pos names {list(pos or ())} and source_pos {list(theirs or ())}: give the same names.")
        named = {
            str(name): (
                numbers_in(whole.mask, value, f"pos[{name!r}]"),
                numbers_in(source_mask(given), (theirs or {})[name], f"source_pos[{name!r}]"),
            )
            for name, value in (pos or {}).items()
        }
        return cls(
            base=whole, source=given, targets=answers, task_logits=classes,
            read_pos=numbers_in(whole.mask, read_pos, "read_pos"), named_pos=named, n_classes=n_classes,
            keys=tuple(keys) if keys is not None else _default_keys(given),
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.base)

    def __repr__(self) -> str:
        classes = "a function's" if self.n_classes is None else self.n_classes
        return f"InterchangePairs({len(self)} pairs, {classes} classes, {len(set(self.keys))} keys)"

    def take(self, rows: Any) -> "InterchangePairs":
        """Returns the pairs with these numbers, or where a boolean mask is ``True``."""
        rows = np.arange(len(self))[np.asarray(rows)]
        if not rows.size:
            raise InputError("This leaves no pairs.")
        source = (
            _cut(self.source, rows) if isinstance(self.source, Batch) else self.source.apply_slice_to_batch_dim(rows)
        )
        keys = tuple(self.keys[row] for row in rows)
        named = {name: (base[rows], theirs[rows]) for name, (base, theirs) in self.named_pos.items()}
        return dataclasses.replace(
            self, base=_cut(self.base, rows), source=source, targets=self.targets[rows], read_pos=self.read_pos[rows],
            keys=keys, named_pos=named,
        )  # fmt: skip

    def join(self, other: "InterchangePairs") -> "InterchangePairs":
        """Returns these pairs followed by others with the same classes and names of positions.

        Raises:
            InputError: the classes or the names differ, or the sources are caches.
        """
        if not isinstance(self.source, Batch) or not isinstance(other.source, Batch):
            raise InputError("Pairs whose sources are a cache cannot be joined: pass the source prompts.")
        if not self.has_classes_of(other) or set(self.named_pos) != set(other.named_pos):
            raise InputError(
                "The two sets of pairs have other classes or names of positions: make both with the same task_logits "
                f"and the same names; got {list(self.named_pos)} and {list(other.named_pos)}."
            )
        both = {name: tuple(map(np.concatenate, zip(value, other.named_pos[name], strict=True)))
                for name, value in self.named_pos.items()}  # fmt: skip
        return dataclasses.replace(
            self, base=_joined(self.base, other.base), source=_joined(self.source, other.source),
            targets=np.concatenate([self.targets, other.targets]), keys=self.keys + other.keys, named_pos=both,
            read_pos=np.concatenate([self.read_pos, other.read_pos]),
        )  # fmt: skip

    @typed
    def split(self, share: float = 0.5, seed: int = 0) -> "tuple[InterchangePairs, InterchangePairs]":
        """Splits the pairs in two that have no key in common, so that nothing learned of a key helps on the other part.

        Args:
            share: share of the keys in the first part.
            seed: seed of the split.

        Raises:
            InputError: there is only one key, or ``share`` is not between 0 and 1.
        """
        names = sorted(set(self.keys))
        if len(names) < 2 or not 0 < share < 1:
            raise InputError(f"A split needs two keys or more and 0 < share < 1; got {len(names)} and share={share}.")
        order = np.random.default_rng(seed).permutation(len(names))
        first = {names[n] for n in order[: min(max(1, round(share * len(names))), len(names) - 1)]}
        inside = np.asarray([key in first for key in self.keys])
        return self.take(inside), self.take(~inside)

    def has_classes_of(self, other: "InterchangePairs") -> bool:
        """Whether both sets of pairs have the same task logits."""
        mine, theirs = self.task_logits, other.task_logits
        if isinstance(mine, np.ndarray) and isinstance(theirs, np.ndarray):
            return np.array_equal(mine, theirs)
        return mine is theirs

    def with_pos(self, name: str, pos: Any, source_pos: Any) -> "InterchangePairs":
        """Returns the same pairs with one more named position, in the base's text and in the source's."""
        here = numbers_in(self.base.mask, pos, f"pos[{name!r}]")
        there = numbers_in(source_mask(self.source), source_pos, f"source_pos[{name!r}]")
        return dataclasses.replace(self, named_pos={**self.named_pos, name: (here, there)})

    def with_targets(self, targets: np.ndarray) -> "InterchangePairs":
        """Returns the same pairs with other targets."""
        return dataclasses.replace(self, targets=np.asarray(targets, np.int32))


@typed
def arbitrary_targets(keys: Sequence[str], classes: Any, seed: int = 0) -> np.ndarray:
    """Returns a label for each key that means nothing: a hash of the key, the same on every machine.

    What learns such labels memorises: on keys that it was not trained on it must be at chance.

    Args:
        keys: one text for each pair.
        classes: the labels to choose from, ``[class]``, or their number.
        seed: another seed gives other labels.

    Returns:
        One of ``classes`` for each key, int32 ``[pair]``.
    """
    choices = np.arange(classes) if np.ndim(classes) == 0 else np.asarray(classes)
    if not len(choices):
        raise InputError("There are no classes to choose from.")
    digests = [hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=8).digest() for key in keys]
    return choices[[int.from_bytes(digest, "big") % len(choices) for digest in digests]].astype(np.int32)


def numbers_in(mask: Any, pos: Any, name: str) -> np.ndarray:
    """Returns a position for each prompt, counted in its text, int32 ``[prompt]``.

    Args:
        mask: ``[prompt, pos]``.
        pos: a position, or one for each prompt.
        name: the argument, for the error.

    Raises:
        InputError: they are not whole numbers, as many as prompts; or a prompt lacks its position.
    """
    mask, numbers = np.asarray(mask).astype(bool), np.asarray(pos)
    if numbers.dtype.kind not in "iu" or numbers.shape not in ((), mask.shape[:1]):
        raise InputError(
            f"{name} takes a whole number, or one for each of the {len(mask)} pairs; got {numbers.dtype} of shape "
            f"{numbers.shape}."
        )
    numbers = np.broadcast_to(numbers, mask.shape[:1]).astype(np.int32)
    lengths = mask.sum(axis=1)
    if (wrong := np.flatnonzero((numbers < -lengths) | (numbers >= lengths))).size:
        prompt = int(wrong[0])
        raise InputError(f"{name}: {positions.no_such_position(prompt, int(numbers[prompt]), int(lengths[prompt]))}")
    return numbers


def entries_of(mask: Any, numbers: np.ndarray) -> np.ndarray:
    """Returns the array entries of positions ``[prompt]`` that :func:`numbers_in` checked, int32 ``[prompt]``."""
    return np.asarray(positions.find(np.asarray(mask).astype(bool), numbers[:, None])[0])[:, 0]


def source_mask(source: Batch | ActivationCache) -> np.ndarray:
    """Returns which entries of the sources are text, ``[pair, pos]``."""
    if isinstance(source, Batch):
        return np.asarray(source.mask)
    if source.token_mask is not None:
        return np.atleast_2d(np.asarray(source.token_mask))
    return np.ones(next(iter(source.values())).shape[:2], bool)


def _joined(one: Batch, two: Batch) -> Batch:
    rows = [np.asarray(batch.row(index)) for batch in (one, two) for index in range(len(batch))]
    return Batch.from_rows(rows, one.padding_side)


def _cut(batch: Batch, rows: np.ndarray) -> Batch:
    return dataclasses.replace(batch, tokens=batch.tokens[rows], mask=batch.mask[rows], positions=batch.positions[rows])


def _count_of(source: Batch | ActivationCache) -> int:
    if isinstance(source, Batch):
        return len(source)
    first = next(iter(source.values()), None)
    if first is None or not source.has_batch_dim:
        raise InputError("The source cache holds no activation with a batch axis: run the prompts, [pair, pos].")
    return first.shape[0]


def _default_keys(source: Batch | ActivationCache) -> tuple[str, ...]:
    if isinstance(source, Batch):
        rows = [np.asarray(row)[np.asarray(mask)] for row, mask in zip(source.tokens, source.mask, strict=True)]
    else:
        rows = list(np.asarray(next(iter(source.values())), np.float32))
    return tuple(hashlib.blake2b(row.tobytes(), digest_size=8).hexdigest() for row in rows)


def _read_classes(model: HookedTransformer, task_logits: Any, base: Batch) -> Any:
    if task_logits is None:
        return None
    if callable(task_logits):
        if not bool(np.asarray(base.mask)[:, -1].all()):
            raise InputError(
                "task_logits is a function of padded logits, and the prompts have different lengths: logits[:, -1] is "
                "padding there. Pass the classes' token ids, which are read at read_pos of each prompt, or pad the "
                "prompts left: model.to_batch(base, padding_side='left')."
            )
        return task_logits
    ids = _tokens(model, task_logits, "task_logits")
    if ids.ndim != 1 or len(ids) < 2 or len(set(ids.tolist())) < len(ids):
        raise InputError(f"task_logits needs the ids of two classes or more, each once; got shape {ids.shape}.")
    if ids.min() < 0 or ids.max() >= model.cfg.d_vocab_out:
        raise InputError(
            f"task_logits holds {ids.max() if ids.min() >= 0 else ids.min()}, which is no id of the output "
            f"vocabulary: ids are 0 to {model.cfg.d_vocab_out - 1}."
        )
    return ids


def _tokens(model: HookedTransformer, tokens: Any, name: str) -> np.ndarray:
    if isinstance(tokens, str):
        tokens = [tokens]
    if isinstance(tokens, list | tuple) and any(isinstance(one, str) for one in tokens):
        tokens = [model.to_single_token(one) for one in tokens]
    ids = np.asarray(tokens)
    if ids.dtype.kind not in "iu":
        raise InputError(f"{name} takes whole numbers, or texts of one token each; got dtype {ids.dtype}.")
    return ids.astype(np.int32)


def _read_targets(model: HookedTransformer, targets: Any, classes: Any, n_classes: int | None) -> np.ndarray:
    named = isinstance(targets, list | tuple) and any(isinstance(one, str) for one in targets)
    answers = _tokens(model, targets, "targets")
    if answers.ndim != 1:
        raise InputError(f"targets needs one class for each pair, [pair]; got shape {answers.shape}.")
    if named and isinstance(classes, np.ndarray):
        known = {int(token): number for number, token in enumerate(classes)}
        if absent := [text for text, token in zip(targets, answers, strict=True) if int(token) not in known]:
            raise InputError(f"The target {absent[0]!r} is not among the {len(classes)} classes of task_logits.")
        answers = np.asarray([known[int(token)] for token in answers], np.int32)
    outside = answers[(answers < 0) | (answers >= (n_classes or np.inf))]
    if outside.size:
        size = "" if n_classes is None else f" (0 to {n_classes - 1})"
        raise InputError(
            f"The target {int(outside[0])} is no index into the task logits{size}. With task_logits=token ids, targets "
            "count the classes in that order; they are not token ids."
        )
    return answers


def check_task(model: HookedTransformer, pairs: InterchangePairs) -> None:
    """Raises InputError if a function returns other than a row of task logits for each pair, or too few classes."""
    if not callable(pairs.task_logits):
        return
    shape = (*pairs.base.shape, model.cfg.d_vocab_out)
    found = jax.eval_shape(pairs.task_logits, jax.ShapeDtypeStruct(shape, model.cfg.jnp_dtype)).shape
    if len(found) != 2 or found[0] != len(pairs):
        raise InputError(
            f"task_logits returned shape {found} for {len(pairs)} pairs: return [pair, class], such as logits[:, -1]."
        )
    if (most := int(pairs.targets.max())) >= found[1]:
        raise InputError(f"The target {most} is no index into the task logits: the function gives {found[1]} classes.")
