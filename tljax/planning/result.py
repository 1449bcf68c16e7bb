"""The plan of a run: bytes on each device, whether they fit, and what to change if they do not."""

import dataclasses
from collections.abc import Mapping
from typing import Any


def in_words(size: int) -> str:
    """Returns a number of bytes for people.

    >>> in_words(141_110_000_000), in_words(2_500)
    ('141.1 GB', '2.5 kB')
    """
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size} B"


@dataclasses.dataclass(frozen=True)
class Moment:
    """What lies in a device's memory at one moment of a run, beside the parameters, in bytes.

    Attributes:
        stage: the part of the run.
        activations: residual streams, logits, and what a backward pass needs.
        cache: activations that are kept for the caller, gradients among them, and keys and values.
        temporaries: what the program at work takes besides.
    """

    stage: str
    activations: int
    cache: int
    temporaries: int

    @property
    def bytes(self) -> int:
        return self.activations + self.cache + self.temporaries


@dataclasses.dataclass(frozen=True)
class Change:
    """A change of a run that makes it smaller.

    Attributes:
        options: the arguments of :func:`tljax.plan` that differ.
        what: the same in words.
        bytes: what a device needs then.
        fits: whether that fits.
    """

    options: Mapping[str, Any]
    what: str
    bytes: int
    fits: bool

    def __str__(self) -> str:
        return f"{self.what}: {in_words(self.bytes)}{', fits' if self.fits else ''}"


@dataclasses.dataclass(frozen=True, repr=False)
class MemoryPlan:
    """What a run will take of each device's memory.

    Attributes:
        model_name: the model.
        what: the run.
        n_devices: how many devices the mesh has.
        dtype: dtype of parameters and activations.
        batch, pos: prompts of the run on all devices together, and their tokens.
        parameters: bytes of the parameters that a device holds.
        moments: the moments at which the run may be largest, in order.
        memory: bytes that a device has for it; ``None`` if that is unknown.
        replicated: axes that the mesh does not divide, whole on every device.
        changes: changes that make it smaller, if it does not fit; those that fit come first.
    """

    model_name: str
    what: str
    n_devices: int
    dtype: str
    batch: int
    pos: int
    parameters: int
    moments: tuple[Moment, ...]
    memory: int | None
    replicated: tuple[str, ...] = ()
    changes: tuple[Change, ...] = ()

    @property
    def peak(self) -> Moment:
        """The moment at which most lies in memory."""
        return max(self.moments, key=lambda moment: moment.bytes)

    @property
    def activations(self) -> int:
        """Bytes of residual streams, logits and what a backward pass needs, at the peak."""
        return self.peak.activations

    @property
    def cache(self) -> int:
        """Bytes of what is kept for the caller and of keys and values, at the peak."""
        return self.peak.cache

    @property
    def temporaries(self) -> int:
        """Bytes that the program at work takes besides, at the peak."""
        return self.peak.temporaries

    @property
    def bytes(self) -> int:
        """Bytes that a device needs."""
        return self.parameters + self.peak.bytes

    @property
    def fits(self) -> bool | None:
        """Whether a device has room; ``None`` if its memory is unknown."""
        return None if self.memory is None else self.bytes <= self.memory

    def __repr__(self) -> str:
        devices = "one device" if self.n_devices == 1 else f"each of {self.n_devices} devices"
        lines = [f"{self.model_name}, {self.what} of {self.batch} x {self.pos} tokens in {self.dtype}, on {devices}:"]
        parts = ("parameters", "activations", "cache", "temporaries")
        rows = [(part, in_words(getattr(self, part))) for part in parts]
        rows.append(("together", f"{in_words(self.bytes)}, largest {self.peak.stage}"))
        if self.memory is not None:
            rows.append(("memory", f"{in_words(self.memory)}: {'fits' if self.fits else 'DOES NOT FIT'}"))
        if self.replicated:
            rows.append(("replicated", ", ".join(self.replicated)))
        lines += [f"  {name:<12} {value}" for name, value in rows]
        if self.changes:
            lines += ["  To make it smaller:", *(f"    {change}" for change in self.changes)]
        return "\n".join(lines)
