"""Standard sizes: arrays of a few lengths only, because every shape is a program to compile."""


def power_of_two(number: int) -> int:
    """The power of two that is not below ``number``."""
    return 1 << max(number - 1, 0).bit_length()
