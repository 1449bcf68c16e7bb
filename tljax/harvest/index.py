"""The index of a store, ``index.json``: what was harvested, how, and which shards are whole."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tljax.errors import HarvestError
from tljax.fingerprint import FORM, Fingerprint
from tljax.safetensors_files import own_errors, parse_json, replace_file
from tljax.schema import mismatch

FILE = "index.json"
ACTIVATIONS, CODES = "tljax-activations-1", "tljax-codes-1"
_SHARD_FORM = {"file": str, "bytes": int, "tokens": int, "windows": int, "digest": str}
_FORM = {
    "format": {ACTIVATIONS, CODES}, "complete": bool, "model": FORM, "recipe": dict, "made_with": {str: str},
    "arrays": {str: {"dtype": str, "width": int}}, "counts": {str: int}, "shards": [_SHARD_FORM],
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """One file of a store.

    Attributes:
        file: its name.
        bytes: its size.
        tokens: rows in it.
        windows: windows that were run for it.
        digest: of the windows' tokens.
    """

    file: str
    bytes: int
    tokens: int
    windows: int
    digest: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A shard that is written, and what it adds to the index.

    Attributes:
        number: which shard of the store it is.
        shard: the shard.
        counts: ``windows`` run for it, ``tokens`` stored, and left out: ``special``, ``large_norm``.
        documents: how many documents there are up to its end.
    """

    number: int
    shard: Shard
    counts: Mapping[str, int]
    documents: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Index:
    """What a store's ``index.json`` says.

    Attributes:
        format: activations or codes.
        complete: whether the harvest came to its end.
        model: fingerprint of the model.
        recipe: every option that determines the result, as JSON values.
        made_with: versions and device, which do not have to agree when a harvest is resumed.
        arrays: dtype and width of each stored array.
        counts: ``windows`` run, ``documents`` seen, ``tokens`` stored, and left out: ``special``, ``large_norm``.
        shards: in order.
    """

    format: str
    model: Fingerprint
    recipe: Mapping[str, Any]
    made_with: Mapping[str, str]
    arrays: Mapping[str, Mapping[str, Any]]
    complete: bool = False
    counts: Mapping[str, int] = dataclasses.field(
        default_factory=lambda: dict.fromkeys(("windows", "documents", "tokens", "special", "large_norm"), 0)
    )
    shards: tuple[Shard, ...] = ()

    def with_part(self, part: "Part") -> "Index":
        """Returns the index with one more shard."""
        counts = {name: number + part.counts[name] for name, number in self.counts.items() if name in part.counts}
        counts |= {"documents": max(self.counts["documents"], part.documents)}
        return dataclasses.replace(self, shards=(*self.shards, part.shard), counts={**self.counts, **counts})

    def write(self, directory: Path) -> None:
        """Writes the index, whole or not at all."""
        stated = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        stated |= {"model": self.model.to_dict(), "shards": [dataclasses.asdict(shard) for shard in self.shards]}
        with replace_file(directory / FILE, durable=True) as stream:
            stream.write(json.dumps(stated, indent=1, sort_keys=True).encode() + b"\n")

    @classmethod
    def read(cls, directory: Path, form: str) -> "Index":
        """Reads the index of a store.

        Raises:
            HarvestError: there is none, or it is damaged, or of another kind of store.
        """
        path = directory / FILE
        if not path.is_file():
            what = "no such directory" if not directory.is_dir() else f"there is no {FILE} in it"
            raise HarvestError(
                f"{directory} is not a store: {what}. harvest(model, prompts, points, directory) makes one."
            )
        with own_errors(path, "Harvest anew into an empty directory.", HarvestError, OSError, UnicodeDecodeError):
            stated = parse_json(path.read_bytes())
            if isinstance(stated, dict) and stated.get("format") in (ACTIVATIONS, CODES) and stated["format"] != form:
                kinds = {ACTIVATIONS: "ActivationStore", CODES: "CodeStore"}
                raise HarvestError(
                    f"{directory} holds {stated['format']!r}: open it with {kinds[stated['format']]}.open."
                )
            if problem := mismatch(stated, _FORM, "the index"):
                raise ValueError(problem)
            shards = tuple(Shard(**shard) for shard in stated.pop("shards"))
            return cls(**stated | {"model": Fingerprint.from_dict(stated["model"]), "shards": shards})

    def refuse_other(self, wanted: "Index", directory: Path) -> None:
        """Raises HarvestError, naming every difference, unless both were made by one call."""
        found = [f"the model: {one}" for one in self.model.differences(wanted.model)]
        found += differences(self.recipe, wanted.recipe)
        if found:
            raise HarvestError(
                f"{directory} holds another harvest: {'; '.join(found)} (there, and in this call). Use the same model "
                "and options to go on with it, or another directory."
            )


def differences(there: Mapping[str, Any], here: Mapping[str, Any], of: str = "") -> list[str]:
    """Returns one phrase for each option that differs."""
    found = []
    for name in dict.fromkeys([*there, *here]):
        old, new = there.get(name), here.get(name)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{of}{name}: ")
        elif name not in there or name not in here:
            found.append(f"{of}{name} {'only here' if name not in there else 'only there'}")
        else:
            found.append(f"{of}{name}={old!r} and {new!r}")
    return found
