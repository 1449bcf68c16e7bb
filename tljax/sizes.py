"""Standard array sizes. Every shape needs its own compiled program, so arrays are padded to a few sizes only.

With fewer sizes every run has more padding; with more sizes more programs are compiled. So the sizes are further apart
where padding costs less:

- Prompts of sweeps and lenses: 8, 16, 32, then two per doubling (48, 64, 96 …), because every layer runs the padding.
- Prompts of generation: two per doubling from 8 on (12, 16, 24 …), because the run may be a prompt of a few tokens.
- Packed tokens and rows of a sweep: 8, 16, 24, 32, then two per doubling; one sweep meets many of these sizes.
- Capacity for texts that grow and for their logits: powers of two, for texts from 128 on, so that answers of tens of
  tokens share one program. A decoding step reads the whole capacity, which costs little beside the weights.
- Sites measured or set together, and tokens that top-k keeps: powers of two, in chunks of two sizes.
"""

from collections.abc import Iterator

_SMALLEST = 8
_SMALLEST_TEXT = 128


def power_of_two(number: int) -> int:
    """Returns the smallest power of two that is not below ``number``."""
    return 1 << max(number - 1, 0).bit_length()


def power_of_two_within(number: int) -> int:
    """Returns the largest power of two that is not above ``number``, which is at least 1."""
    return 1 << (number.bit_length() - 1)


def _standard(number: int, whole_steps_to: int) -> int:
    """Returns the smallest standard size that is not below ``number``.

    Standard sizes are powers of two from 8 on, and above ``whole_steps_to`` also the sizes halfway between them.
    """
    size = max(_SMALLEST, power_of_two(number))
    return size * 3 // 4 if size > whole_steps_to and number <= size * 3 // 4 else size


def prompt_length(length: int, most: int, whole_steps_to: int = 32) -> int:
    """Returns the padded length for prompts of up to ``length`` tokens, at most ``most``."""
    return max(length, min(_standard(length, whole_steps_to), most))


def text_capacity(n_tokens: int, n_ctx: int) -> int:
    """Returns the capacity, in tokens, for texts that grow to ``n_tokens``, at most ``n_ctx``."""
    return max(n_tokens, min(n_ctx, max(_SMALLEST_TEXT, power_of_two(n_tokens))))


def packed_size(number: int) -> int:
    """Returns the padded size of arrays for ``number`` packed tokens, or for rows of them."""
    return _standard(number, whole_steps_to=16)


def next_packed_size(size: int, wanted: int) -> int:
    """Returns the next packed size from ``size`` towards ``wanted``."""
    if wanted > size:
        return packed_size(size + 1)
    below = packed_size(size // 2 + 1)
    return below if below < size else size // 2


def chunks(total: int, many: int, few: int) -> Iterator[tuple[int, int]]:
    """Yields start and size of chunks of size ``many`` or ``few`` that cover ``total``; the last may pass the end."""
    start = 0
    while start < total:
        size = many if total - start > many // 2 else few
        yield start, size
        start += size
