"""Standard sizes: arrays of a few lengths only, because every shape is a program to compile."""

from collections.abc import Iterator


def power_of_two(number: int) -> int:
    """The power of two that is not below ``number``."""
    return 1 << max(number - 1, 0).bit_length()


def frame_length(length: int, most: int, whole_steps_to: int = 32) -> int:
    """The standard length that a prompt is padded to, at most ``most``.

    8 or a power of two up to ``whole_steps_to``, from there two to each doubling: 8, 16, 32, 48, 64, 96 …
    """
    frame = max(8, power_of_two(length))
    if frame > whole_steps_to and length <= frame * 3 // 4:
        frame = frame * 3 // 4
    return max(length, min(frame, most))


def chunks(total: int, many: int, few: int) -> Iterator[tuple[int, int]]:
    """Start and size of chunks of two sizes, of which the last may reach past the end."""
    start = 0
    while start < total:
        size = many if total - start > many // 2 else few
        yield start, size
        start += size
