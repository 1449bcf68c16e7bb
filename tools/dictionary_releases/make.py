"""Writes the table of dictionary releases, ``tljax/dictionaries/formats/releases.json``.

``python -m tools.dictionary_releases.make pretrained_saes.yaml`` takes the names, repositories, paths and stated
figures from the list of SAELens (in its repository and its package), and keeps facts only: which folder of which
repository a dictionary is, for which model, its L0 and the scale of its activations where they are stated. What a
release reads, where only its name says so, is in the rules here.
"""

import argparse
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

TARGET = Path(__file__).parents[2] / "tljax" / "dictionaries" / "formats" / "releases.json"

FORMATS = {
    None: "saelens",
    "gemma_2": "gemma_scope",
    "gemma_2_transcoder": "gemma_scope",
    "gemma_3": "gemma_scope_2",
    "dictionary_learning_1": "dictionary_learning",
    "llama_scope": "llama_scope",
    "llama_scope_r1_distill": "llama_scope",
    "connor_rob_hook_z": "connor_rob",
    "goodfire": "goodfire",
    "deepseek_r1": "goodfire",
    "mwhanna_transcoder": "circuit_tracer",
    "qwen_scope": "qwen_scope",
}
"""SAELens's converters → formats here; releases of other converters are left out."""

SITES = (
    (r"gemma-scope-\w+-\w+-res", "blocks.{layer}.hook_resid_post", None),
    (r"gemma-scope-\w+-\w+-mlp", "blocks.{layer}.hook_mlp_out", None),
    (r"gemma-scope-\w+-\w+-att", "blocks.{layer}.attn.hook_z", None),
    (r"gemma-scope-\w+-pt-transcoders", "blocks.{layer}.ln2.hook_normalized", "blocks.{layer}.hook_mlp_out"),
    (r"mwhanna-", "blocks.{layer}.mlp.hook_in", "blocks.{layer}.hook_mlp_out"),
    (r"(sae_bench|saebench|goodfire|qwen-scope|.*-andyrdt)", "blocks.{layer}.hook_resid_post", None),
    (r"deepseek-r1-distill-llama-8b-qresearch", "blocks.{layer}.hook_resid_post", None),
    (r"gpt2-small-hook-z-kk", "blocks.{layer}.attn.hook_z", None),
)  # fmt: skip
"""Pattern of a release's name → the points that its dictionaries read and, of transcoders, write. Gemma Scope 2, Llama
Scope and SAELens's own files name them."""


def number_of(text: str) -> "re.Match[str] | None":
    """Returns the number in an id that varies most within a release: L0, trainer or step if it has them, else layer."""
    numbers = list(re.finditer(r"\d+", text))
    return None if not numbers else numbers[-1 if re.search("average_l0|trainer", text) else 0]


def rows_of(saes: Sequence[Mapping[str, Any]], scales: bool) -> list[dict[str, Any]]:
    """Returns rows that expand to a release's ids and paths: see ``releases.py``."""
    groups: dict[tuple[str, str], list[tuple[str, str, Mapping[str, Any]]]] = {}
    for sae in saes:
        name, path = sae["id"], str(sae["path"])
        match = number_of(name)
        value = match[0] if match else ""
        template = f"{name[: match.start()]}{{}}{name[match.end() :]}" if match else name
        target, second = path, ""
        if name.endswith("/canonical"):
            target, second = re.fullmatch(r"(.*_)(\d+)", path).groups()  # type: ignore[union-attr]
            target += "{1}"
        if value:
            found = list(re.finditer(rf"(?<![\dl{{]){value}(?![\d}}])", target))
            for one in reversed(found[-1:] if "trainer" in name else found):
                target = f"{target[: one.start()]}{{0}}{target[one.end() :]}"
        groups.setdefault((template, "=" if name == path else target), []).append((value, second, sae))
    return [row_of(template, path, entries, scales) for (template, path), entries in groups.items()]


def row_of(
    template: str, path: str, entries: Sequence[tuple[str, str, Mapping[str, Any]]], scales: bool
) -> dict[str, Any]:
    """Returns one row of a release."""
    row: dict[str, Any] = {"id": template}
    row |= {} if path == "=" else {"path": path}
    row |= {"values": packed([value for value, _, _ in entries])} if entries[0][0] else {}
    row |= {"second": ",".join(second for _, second, _ in entries)} if entries[0][1] else {}
    stated = [sae.get("l0") for _, _, sae in entries]
    if any(one is not None for one in stated) and "average_l0" not in template + path:
        whole = [None if one is None else int(one) if one == int(one) else one for one in stated]
        row["l0"] = whole[0] if len(set(whole)) == 1 else whole
    norms = [sae.get("norm_scaling_factor") for _, _, sae in entries]
    if scales and any(one is not None for one in norms):
        row["scale"] = norms
    return row


def packed(values: Sequence[str]) -> str:
    """Returns numbers as text, runs of them as ``first-last``."""
    parts: list[list[int]] = []
    for value in map(int, values):
        if parts and value == parts[-1][-1] + 1:
            parts[-1].append(value)
        else:
            parts.append([value])
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def releases_of(listed: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the releases that tljax has a reader for."""
    for name, entry in sorted(listed.items()):
        converter = entry.get("conversion_func")
        if converter not in FORMATS:
            continue
        kept: dict[str, Any] = {"repo": entry["repo_id"], "format": FORMATS[converter], "model": entry["model"]}
        overrides = {
            key: value for key, value in (entry.get("config_overrides") or {}).items() if key != "dataset_path"
        }
        kept |= {"overrides": overrides} if overrides else {}
        for pattern, reads, writes in SITES:
            if converter is not None and converter != "gemma_3" and re.match(pattern, name):
                kept |= {"reads": reads} | ({"writes": writes} if writes else {})
                break
        yield name, kept | {"saes": rows_of(entry["saes"], converter is None)}


def main() -> None:
    import yaml

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("list", type=Path, help="SAELens's pretrained_saes.yaml")
    listed = yaml.safe_load(parser.parse_args().list.read_text())
    lines = [f"{json.dumps(name)}: {text(entry)}" for name, entry in releases_of(listed)]
    TARGET.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def text(entry: Mapping[str, Any]) -> str:
    """Returns a release as JSON, one row a line."""
    head = json.dumps({key: value for key, value in entry.items() if key != "saes"})
    rows = ",\n  ".join(json.dumps(row, separators=(",", ":")) for row in entry["saes"])
    return f'{head[:-1]}, "saes": [\n  {rows}\n]}}'


if __name__ == "__main__":
    main()
