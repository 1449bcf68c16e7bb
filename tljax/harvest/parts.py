"""Records of shards that are whole and not in the index yet, as processes leave them that harvest together."""

import dataclasses
import json
import re
from pathlib import Path

from tljax.harvest.index import Part, Shard
from tljax.safetensors_files import parse_json, replace_file
from tljax.schema import mismatch

RECORD = re.compile(r"part-(\d{5,})\.json")
FAILED = ".part-failed-"
"""Prefix of a file that says that a process failed; its place follows."""
_FORM = {
    "number": int, "documents": int, "counts": {str: int},
    "shard": {"file": str, "bytes": int, "tokens": int, "windows": int, "digest": str},
}  # fmt: skip


def record_of(number: int) -> str:
    """Returns the name of a shard's record."""
    return f"part-{number:05d}.json"


def write_part(directory: Path, part: Part) -> None:
    """Writes the record of a shard, whole or not at all."""
    with replace_file(directory / record_of(part.number), durable=True) as stream:
        stream.write(json.dumps(dataclasses.asdict(part), sort_keys=True).encode() + b"\n")


def read_parts(directory: Path) -> dict[int, Part]:
    """Returns the recorded shards of a directory whose files are there, by number."""
    found = {}
    for path in directory.iterdir():
        if not RECORD.fullmatch(path.name):
            continue
        try:
            stated = parse_json(path.read_bytes())
            if mismatch(stated, _FORM, "the record"):
                continue
            shard = Shard(**stated["shard"])
            if (directory / shard.file).stat().st_size == shard.bytes:
                found[stated["number"]] = Part(**stated | {"shard": shard})
        except (OSError, ValueError):  # half there, or gone meanwhile: then it counts as not there
            continue
    return found
