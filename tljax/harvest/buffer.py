"""``ActivationBuffer``: shuffled batches of activations, computed when they are needed and stored nowhere."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from tljax import checks
from tljax.errors import HarvestError
from tljax.fingerprint import FORM, Fingerprint, fingerprint_of
from tljax.harvest.collecting import Activations, refuse_not_finite
from tljax.harvest.documents import Prompts, Reading, starts_again
from tljax.harvest.harvest import StoredDtype
from tljax.harvest.index import differences
from tljax.harvest.permutation import permute
from tljax.harvest.points import hooks_in_words, read_points
from tljax.harvest.stored import as_dtype
from tljax.harvest.token_stream import Rows, TokenStream
from tljax.harvest.windows import Separator, Short, Windows, no_windows, read_cutting, read_skipped, window_batches
from tljax.model.hooked_transformer import HookedTransformer
from tljax.schema import mismatch


class _Block(NamedTuple):
    """Tokens of a block.

    Attributes:
        number: of the block.
        rows: its activations.
        reached: how many batches of windows were read for the first of its tokens, and a digest of them.
    """

    number: int
    rows: Rows
    reached: tuple[int, str]


class ActivationBuffer:
    """Batches of tokens from prompts that are run on the fly, mixed in a buffer.

    ``buffer.batch(step)`` depends on the arguments and the step alone. The tokens of the prompts, which start again
    when they end, come in blocks of half the buffer. A seeded half of each block is given out together with the other
    half of the block before it, in a seeded order. So every token comes once an epoch, and the tokens of a window are
    spread over the batches of a whole buffer.

    Steps that go forward run every window once. Going back, or starting at a later step, tokenizes the prompts from
    their beginning and runs two blocks (one buffer): nothing else has to be restored.

    Args:
        model: the model; interventions that it carries apply.
        prompts: as in :func:`harvest`. A generator serves one pass, and cannot go back.
        points: as in :func:`harvest`.
        batch_size: tokens of a batch.
        buffer_tokens: tokens that are mixed; at least twice ``batch_size``, and rounded down to a multiple of that.
        seed: of the order.
        windows_at_once: windows that the model runs at once.
        dtype: of the activations in the buffer; batches are float32.
        context_size, packed, prepend_bos, separator, short, field, text_separator, skip_special: as in :func:`harvest`.

    Raises:
        InputError: prompts that cannot be read, or an option out of range.
        UnknownHookError: a point is unknown.
        HarvestError: the buffer is too small, or a point cannot be harvested.
    """

    @checks.typed
    def __init__(
        self,
        model: HookedTransformer,
        prompts: Prompts,
        points: Any,
        batch_size: int,
        *,
        buffer_tokens: int,
        seed: int = 0,
        windows_at_once: int = 8,
        dtype: StoredDtype = "bfloat16",
        context_size: int | None = None,
        packed: bool = True,
        prepend_bos: bool | None = None,
        separator: Separator = None,
        short: Short = "pad",
        field: str = "text",
        text_separator: str | None = None,
        skip_special: Any = False,
    ) -> None:
        self._model, self._prompts = model, prompts
        self._collector = Activations(read_points(model, points), dtype)
        self._cutting = read_cutting(
            model, prompts, context_size=context_size, packed=packed, prepend_bos=prepend_bos, separator=separator,
            short=short,
        )  # fmt: skip
        self._reading, self._skipped = Reading(field, text_separator), read_skipped(model, skip_special)
        self.batch_size = checks.whole(batch_size, "batch_size", at_least=1, error=HarvestError)
        self.seed = checks.whole(seed, "seed", error=HarvestError)
        self._at_once = checks.whole(windows_at_once, "windows_at_once", at_least=1, error=HarvestError)
        self.steps_per_block = checks.whole(buffer_tokens, "buffer_tokens", at_least=1) // (2 * self.batch_size)
        if not self.steps_per_block:
            raise HarvestError(
                f"buffer_tokens={buffer_tokens} is less than two batches of {self.batch_size} tokens: there would be "
                "nothing to mix. A hundred batches mix well."
            )
        self._size = self.steps_per_block * self.batch_size
        self._source = TokenStream(self._windows, starts_again(prompts), self._skipped, no_windows(self._cutting))
        self._following: _Block | None = None
        self._served: _Block | None = None

    def __repr__(self) -> str:
        return (
            f"ActivationBuffer({', '.join(self.points)}, batch_size={self.batch_size}, mixes {2 * self._size} tokens)"
        )

    @property
    def points(self) -> tuple[str, ...]:
        """The points it gives, in firing order."""
        return tuple(point.name for point in self._collector.points)

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """Returns a batch, float32 ``[batch, width]`` of each point.

        Raises:
            HarvestError: the prompts are a generator that has ended or would have to go back; or an activation is not
                finite.
        """
        number = checks.whole(step, "step", at_least=0, error=HarvestError)
        block, within = divmod(number, self.steps_per_block)
        if self._served is None or self._served.number != block:
            self._served = self._mixed(block)
        rows = slice(within * self.batch_size, (within + 1) * self.batch_size)
        return {name: as_dtype(values[rows], np.float32) for name, values in self._served.rows.items()}

    def __call__(self, step: int) -> Any:
        """Returns a batch ``[batch, width]`` if the buffer has one point, or else what :meth:`batch` returns."""
        values = self.batch(step)
        return values if len(values) > 1 else next(iter(values.values()))

    def state(self) -> dict[str, Any]:
        """Returns JSON values for a checkpoint: what identifies the sequence of batches, and where the buffer is."""
        described = {
            **self._collector.describe(), **vars(self._cutting), **self._reading._asdict(), "seed": self.seed,
            "batch_size": self.batch_size, "steps_per_block": self.steps_per_block, "windows_at_once": self._at_once,
            "skip_special": list(self._skipped), "hooks": hooks_in_words(self._model),
        }  # fmt: skip
        reached = (0, "") if self._served is None else self._served.reached
        return {"model": fingerprint_of(self._model).to_dict(), "options": described, "reached": list(reached)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Checks that this buffer gives the batches of the one whose :meth:`state` this is, and goes to where that was.

        Reads the prompts up to there, and runs nothing; the next batch runs one buffer.

        Raises:
            HarvestError: it would give others; names every difference.
        """
        here = self.state()
        if problem := mismatch(state, {"model": FORM, "options": dict, "reached": list}, "the state"):
            raise HarvestError(f"This is not the state of a buffer: {problem}.")
        stored = Fingerprint.from_dict(state["model"])
        found = [f"the model: {one}" for one in stored.differences(fingerprint_of(self._model))]
        found += differences(state["options"], here["options"])
        if found:
            raise HarvestError(f"The state is of another buffer: {'; '.join(found)} (there, and here).")
        batches, digest = state["reached"]
        self._served = self._following = None
        if not batches:
            return
        self._source.go_to_batch(batches)
        if self._source.digest != digest:
            raise HarvestError(
                f"The state is of a buffer with other prompts: its first {batches * self._at_once} windows had other "
                "tokens. Give the same prompts in the same order."
            )

    def _windows(self) -> Iterator[Windows]:
        return window_batches(self._model, self._prompts, self._cutting, self._reading, self._at_once)

    def _mixed(self, number: int) -> _Block:
        """Returns what a block's steps give out, in their order. The first block is half as long as others."""
        here = self._following
        if here is None or here.number != number:
            here = self._block(number)
        self._following = following = self._block(number + 1)
        half = self._size // 2
        second = self._order(number)[half:] if number else np.arange(self._size - half)
        first = self._order(number + 1)[:half]
        order = permute(np.arange(self._size), self._size, self.seed, number, 1)
        rows = {
            name: np.concatenate([values[second], following.rows[name][first]])[order]
            for name, values in here.rows.items()
        }
        return _Block(number, rows, here.reached)

    def _order(self, number: int) -> np.ndarray:
        return permute(np.arange(self._size), self._size, self.seed, number, 0)

    def _block(self, number: int) -> _Block:
        start = (number * self._size - self._size // 2) if number else 0
        stop = (number + 1) * self._size - self._size // 2
        reached = self._source.go_to(start)
        parts: list[Rows] = []
        while self._source.at < stop:
            rows = self._source.rows(self._run)
            low, high = max(start - self._source.at, 0), stop - self._source.at
            parts.append({name: values[low:high] for name, values in rows.items()})
            if self._source.end > stop:
                break
            self._source.advance()
        return _Block(number, {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, reached)

    def _run(self, windows: Windows, given: np.ndarray) -> Rows:
        values, _, finite, _ = jax.device_get(self._collector.collect(self._model, windows, given))
        if not finite.all():
            number = int(np.argmin(finite))
            raise refuse_not_finite(
                self._collector.points[number], values[number], given, windows, self._collector.dtype
            )
        return {name: value[given] for name, value in zip(self.points, values, strict=True)}
