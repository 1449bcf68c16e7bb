"""Writes ``docs/models.md``, the table of supported models, from what the tests measured.

Run after the tests, from the repository's root::

    pytest tests/families tests/parity --record-support docs/models.json
    python docs/make_models.py
"""

import importlib
import inspect
import json
import pkgutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tljax.checkpoints import families
from tljax.checkpoints.family import Family

DOCS = Path(__file__).parent
FIGURES = DOCS / "models.json"
TABLE = DOCS / "models.md"

NOT_SUPPORTED: dict[str, str] = {
    "GPT2LMHeadCustomModel": "SantaCoder's own code; the same weights are in `bigcode/gpt_bigcode-santacoder`, which "
    "the name `santacoder` leads to",
    "QWenLMHeadModel": "Qwen 1 runs code of its own, which transformers does not have",
    "BertForMaskedLM": "an encoder: tljax has decoders",
    "T5ForConditionalGeneration": "an encoder and a decoder: tljax has decoders",
}
"""Architecture → why."""

TOWERS_HEAD = """## Text models of multimodal checkpoints

Of these the text model is read, and what belongs to images is left out: the tensors named in the table, and the
attributes of config.json that make, place or count image tokens. Logits of text prompts are tested against
transformers' own class (float32, 5e-5). A token of text has one position, so rotary positions in three parts
(`mrope_section`) are the ordinary ones. The id of an image token is an id like any other, as in transformers
without pixels. Both names of tensors are read, older (`language_model.model.layers`, or `model.layers` beside
`visual`) and newer (`model.language_model.layers`), and configs with `text_config` as well as Qwen's flat ones of
old. `model.save_hf` writes the text model alone.

| architecture | read and written as | tensors left out |
|---|---|---|"""

STEPS = {
    "fold_ln": "fold norms",
    "center_writing_weights": "centre writing weights",
    "center_unembed": "centre unembedding",
    "fold_value_biases": "fold value biases",
}

HEAD = """# Supported models

Made by `python docs/make_models.py` from what the tests measured. Each architecture is tested on tiny checkpoints with
every parameter random, in several variants (grouped heads, tied embeddings, biases, windows, rotary scaling ...):

- **float32**: largest absolute difference of any logit to transformers' PyTorch (the tests allow 5e-5), and of
  log-probabilities after weight processing.
- **bfloat16**: root mean square difference with both in bfloat16, over that of the logits (with experts, of the median
  token); the tests allow 2e-2, to transformers' bfloat16 and to its float32. Parameters are a third as large here.
- **TransformerLens**: largest difference at any hook point to TransformerLens 3.9, where it has such a model (relative
  where an activation is larger than one).
- **hook points**: how many there are in three layers. At each of them a zero was seen to change what fires later and
  nothing that fires earlier.
- **export**: `model.save_hf` writes the checkpoint back and transformers loads it.

Every variant also passes: batches padded left and right equal single prompts; greedy text equals transformers';
patterns times values are `z`, and what is written sums to the residual stream; runs in two parts equal whole ones;
tljax's own format keeps every bit. For one variant of each architecture cached generation equals full runs, steered or
not, activation-patching sweeps equal the loop, and the attributions of all parts add up to the logit.

A `config.json` is taken as transformers takes it: what it lacks has the class's default, `architectures` decides, then
`model_type`. An attribute that is neither read nor known to change nothing is an error that names it;
`from_pretrained(..., ignore_config=["attribute"])` goes on as if the file did not have it. Published files are held to
transformers' logits at a tiny size, with all their keys.

"""


def load_families() -> dict[str, tuple[Family, str]]:
    """Architecture → its family and the first paragraph of the docstring of the file it is in."""
    found: dict[str, tuple[Family, str]] = {}
    known = {family.architecture: family for family in families.FAMILIES}
    for info in pkgutil.iter_modules(families.__path__):
        module = importlib.import_module(f"{families.__name__}.{info.name}")
        about = " ".join((module.__doc__ or "").split("\n\n")[0].split())
        source = inspect.getsource(module)
        for architecture, family in known.items():
            if f'"{architecture}"' in source and family in vars(module).values():
                found[architecture] = family, about
    return {architecture: found[architecture] for architecture in known}


def largest(figures: Iterable[dict[str, Any]], key: str) -> str:
    """The largest figure of a kind, or a dash."""
    values = [each[key] for each in figures if key in each]
    return f"{max(values):.0e}" if values else "–"


def row(architecture: str, about: str, figures: list[dict[str, Any]], golden: list[dict[str, Any]]) -> str:
    """One line of the table."""
    models, _, special = about.replace("``", "`").partition(": ")
    models = models.replace(f" (`{architecture}`)", "").replace(f"(`{architecture}`)", "")
    points = [str(each["points"] + each["split_points"]) for each in figures if "split_points" in each]  # one variant
    exact = [name for step, name in STEPS.items() if figures and all(step in each.get("steps", ()) for each in figures)]
    some = [name for step, name in STEPS.items() if any(step in each.get("steps", ()) for each in figures)]
    steps = "all" if len(exact) == len(STEPS) else ", ".join(n if n in exact else f"{n} (some)" for n in some) or "–"
    exported = figures and all(each.get("export") == "bit-equal" for each in figures)
    return " | ".join((
        f"| `{architecture}`", models, special.rstrip("."), str(len(figures)),
        points[0] if points else "–",
        f"{largest(figures, 'float32')}, {largest(figures, 'processed')}",
        largest(figures, "bfloat16"), largest(golden, "transformerlens"), steps,
        "bit-equal |" if exported else "– |",
    ))  # fmt: skip


def table(figures: dict[str, dict[str, Any]]) -> str:
    """The whole page."""
    lines = [
        "| architecture | models | what is special | variants | hook points | float32, processed | bfloat16 "
        "| TransformerLens | processing | export |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for architecture, (_, about) in load_families().items():
        found = {name: each for name, each in sorted(figures.items()) if each.get("architecture") == architecture}
        golden = [each for name, each in found.items() if name.startswith("transformerlens/")]
        own = [each for name, each in found.items() if not name.startswith("transformerlens/")]
        lines.append(row(architecture, about, own, golden))
    lines += ["", TOWERS_HEAD]
    for family in families.TOWERS:
        left_out = family.ignored[-1].replace("|", "\\|")
        lines.append(
            f"| `{family.architecture}` | `{families.TEXT_ARCHITECTURES[family.architecture]}` | `{left_out}` |"
        )
    if NOT_SUPPORTED:
        lines += ["", "## Not supported", "", "| architecture | why |", "|---|---|"]
        lines += [f"| `{architecture}` | {why} |" for architecture, why in sorted(NOT_SUPPORTED.items())]
    return HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    TABLE.write_text(table(json.loads(FIGURES.read_text()) if FIGURES.exists() else {}))
