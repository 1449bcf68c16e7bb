"""Which lengths programs are compiled for: every shape is one more program, so arrays take a few standard sizes only.

A size less costs padding on every run, a size more costs a compilation once. So the sizes are further apart the less
their padding costs:

- Prompts of sweeps and lenses: 8, 16, 32, then two to each doubling (48, 64, 96 …), as every layer runs the padding.
- Prompts of generation: two to each doubling from 8 on (12, 16, 24 …), as a prompt of a few tokens is all that is run.
- Packed tokens and rows of a sweep: 8, 16, 24, 32, then as the others; many of them are met in one sweep.
- Texts that grow, and the logits kept of them: powers of two, for texts from 128 on, so that answers of tens of tokens
  share one program. A step of decoding reads the room, which costs little beside the weights.
- Sites measured or set together, tokens that top-k keeps: powers of two, in chunks of two sizes.
"""

from collections.abc import Iterator

_SMALLEST = 8
_SMALLEST_TEXT = 128


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below ``number``."""
    return 1 << max(number - 1, 0).bit_length()


def power_of_two_within(number: int) -> int:
    """The largest power of two that is not above ``number``, which is at least 1."""
    return 1 << (number.bit_length() - 1)


def _standard(number: int, whole_steps_to: int) -> int:
    """The smallest standard size that is not below ``number``.

    8 or a power of two up to ``whole_steps_to``; from there on halfway to the next power of two as well.
    """
    size = max(_SMALLEST, power_of_two(number))
    return size * 3 // 4 if size > whole_steps_to and number <= size * 3 // 4 else size


def prompt_length(length: int, most: int, whole_steps_to: int = 32) -> int:
    """The length that prompts of up to ``length`` tokens are padded to, at most ``most``."""
    return max(length, min(_standard(length, whole_steps_to), most))


def text_capacity(n_tokens: int, n_ctx: int) -> int:
    """The room made for texts that grow to ``n_tokens``, at most ``n_ctx``."""
    return max(n_tokens, min(n_ctx, max(_SMALLEST_TEXT, power_of_two(n_tokens))))


def packed_size(number: int) -> int:
    """The size of arrays for ``number`` packed tokens, or for rows of them."""
    return _standard(number, whole_steps_to=16)


def next_packed_size(size: int, wanted: int) -> int:
    """The packed size next to ``size`` on the way to ``wanted``."""
    if wanted > size:
        return packed_size(size + 1)
    below = packed_size(size // 2 + 1)
    return below if below < size else size // 2


def chunks(total: int, many: int, few: int) -> Iterator[tuple[int, int]]:
    """Start and size of chunks of two sizes, of which the last may reach past the end."""
    start = 0
    while start < total:
        size = many if total - start > many // 2 else few
        yield start, size
        start += size
