"""``ShardingTable``: where every parameter lies, and why some are whole on every device."""

import dataclasses
import re
from collections.abc import Iterator, Mapping

from jax.sharding import PartitionSpec

from tljax.scale.layout import Placement


@dataclasses.dataclass(frozen=True, repr=False)
class ShardingTable:
    """Where every array of a model lies; prints as a table, in which equal layers share a line.

    Attributes:
        rows: placement of each array by its dotted path.
        mesh_shape: length of each axis of the mesh.
    """

    rows: Mapping[str, Placement]
    mesh_shape: Mapping[str, int]

    def __getitem__(self, path: str) -> Placement:
        return self.rows[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def bytes_per_device(self) -> int:
        """Bytes of parameters that each device holds."""
        return sum(row.bytes_per_device for row in self.rows.values())

    def __repr__(self) -> str:
        groups: dict[tuple[str, Placement], list[str]] = {}
        for path, row in self.rows.items():
            name = re.sub(r"^blocks\.\d+\.", "blocks.*.", path)
            groups.setdefault((name, row), []).append(path)
        lines = [("parameter", "axes", "shape", "over", "bytes a device", "whole because")]
        for (name, row), paths in groups.items():
            count = f" × {len(paths)}" if len(paths) > 1 else ""
            label = paths[0] if len(paths) == 1 else name
            shape = "×".join(map(str, row.shape))
            size = f"{row.bytes_per_device:,}{count}"
            lines.append((label, " ".join(row.axes), shape, show_spec(row.spec), size, row.why))
        widths = [max(len(line[column]) for line in lines) for column in range(5)]
        shown = ["  ".join([*(text.ljust(width) for text, width in zip(line, widths, strict=False)), line[5]]).rstrip()
                 for line in lines]  # fmt: skip
        mesh = " × ".join(f"{name}={length}" for name, length in self.mesh_shape.items()) or "one device"
        return "\n".join([f"Mesh: {mesh}; {self.bytes_per_device:,} bytes of parameters on each device", *shown])


def show_spec(spec: PartitionSpec) -> str:
    """Returns a spec as one word for each axis: ``"· model ·"``; a dot is an axis that is whole everywhere."""
    words = ["·" if one is None else one if isinstance(one, str) else "+".join(one) for one in spec]
    return " ".join(words) or "·"
