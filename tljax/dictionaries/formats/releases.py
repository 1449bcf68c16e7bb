"""Released dictionaries by SAELens's names: which repository and folder each is, and what is known of it."""

import dataclasses
import functools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tljax.checks import typed
from tljax.errors import DictionaryError, nearest

_TABLE = Path(__file__).with_name("releases.json")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Release:
    """One dictionary of a release.

    Attributes:
        repo: hub id of the repository.
        path: the folder or file in it.
        format: name of the format; ``None`` means that the files tell.
        facts: for :attr:`tljax.dictionaries.formats.read.Format.reads`.
        l0: number of active features for each token, as stated.
    """

    repo: str
    path: str
    format: str | None
    facts: Mapping[str, Any]
    l0: float | None = None


class _Releases(Mapping[str, Mapping[str, Any]]):
    """The table, read when it is first used."""

    @functools.cached_property
    def _content(self) -> dict[str, dict[str, Any]]:
        return json.loads(_TABLE.read_text(encoding="utf-8"))

    def __getitem__(self, name: str) -> Mapping[str, Any]:
        return self._content[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._content)

    def __len__(self) -> int:
        return len(self._content)


RELEASES: Mapping[str, Mapping[str, Any]] = _Releases()
"""Releases by name. A release has ``repo``, ``format``, ``model``, and perhaps ``overrides`` of its files' config, and
the points ``reads`` and ``writes``; and rows ``saes``. A row's ``id`` and ``path`` (the same if absent) hold ``{}`` or
``{0}`` for each of its ``values``, and ``{1}`` for each of ``second``; ``l0`` and ``scale`` are one number or one each.
"""


def find_release(name: str, sae_id: str | None) -> Release:
    """Returns a dictionary of a release.

    Args:
        name: a key of :data:`RELEASES`.
        sae_id: which one; may be ``None`` for a release of one.

    Raises:
        DictionaryError: the release has no such dictionary.
    """
    entry = RELEASES[name]
    saes = {one["id"]: one for row in entry["saes"] for one in _expanded(row)}
    if sae_id is None and len(saes) == 1:
        sae_id = next(iter(saes))
    if sae_id is None or sae_id not in saes:
        listed = f"{', '.join(list(saes)[:16])}{', ...' if len(saes) > 16 else ''}"
        problem = (
            "needs sae_id, one" if sae_id is None else f"has no {sae_id!r}.{nearest(sae_id, saes)} It has {len(saes)}"
        )
        raise DictionaryError(f"Release {name!r} {problem}: {listed}.")
    one = saes[sae_id]
    facts = {"model_name": entry["model"], "config_overrides": entry.get("overrides"), "repo": entry["repo"]}
    facts |= _sites(entry, sae_id) | {"norm_scaling_factor": one["scale"]}
    known = {key: value for key, value in facts.items() if value is not None}
    return Release(repo=entry["repo"], path=one["path"], format=entry["format"], facts=known, l0=one["l0"])


def releases() -> list[str]:
    """Returns the names of the releases that :meth:`~tljax.dictionaries.Dictionary.from_pretrained` knows."""
    return list(RELEASES)


@typed
def sae_ids(release: str) -> list[str]:
    """Returns the ids of a release's dictionaries.

    Raises:
        DictionaryError: there is no such release.

    >>> from tljax.dictionaries import sae_ids
    >>> sae_ids("gpt2-small-res-jb")[-2:]
    ['blocks.11.hook_resid_pre', 'blocks.11.hook_resid_post']
    """
    if release not in RELEASES:
        raise DictionaryError(f"There is no release {release!r}.{nearest(release, RELEASES)}")
    return [one["id"] for row in RELEASES[release]["saes"] for one in _expanded(row)]


def _sites(entry: Mapping[str, Any], sae_id: str) -> dict[str, Any]:
    """Returns the layer and points that an id means."""
    match = re.match(r"(?:\D*layer_?|blocks\.|l)(\d+)", sae_id)
    layer = None if match is None else int(match[1])
    if sae_id.startswith("embedding"):
        return {"reads": "hook_embed"}
    if layer is None or "reads" not in entry:
        return {"layer": layer}
    reads, writes = entry["reads"].format(layer=layer), entry.get("writes")
    return {"layer": layer, "reads": reads, "writes": None if writes is None else writes.format(layer=layer)}


def _expanded(row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    values = list(_numbers(row["values"])) if "values" in row else [""]
    second = row["second"].split(",") if "second" in row else [""] * len(values)
    for number, (value, other) in enumerate(zip(values, second, strict=True)):
        sae_id = row["id"].format(value)
        path = row["path"].format(value, other) if "path" in row else sae_id
        stated = _one(row.get("l0"), number)
        if stated is None and (match := re.search(r"average_l0_(\d+)$", path)):
            stated = float(match[1])
        yield {"id": sae_id, "path": path, "l0": stated, "scale": _one(row.get("scale"), number)}


def _numbers(text: str) -> Iterator[str]:
    for part in text.split(","):
        first, _, last = part.partition("-")
        yield from map(str, range(int(first), int(last or first) + 1))


def _one(given: Any, number: int) -> float | None:
    value = given[number] if isinstance(given, list) else given
    return None if value is None else float(value)
