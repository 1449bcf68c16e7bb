"""Makes ``lenses_transformerlens.safetensors``: attributions and Jacobian lenses of TransformerLens 3.9.

``tests/parity/test_transformerlens_lenses.py`` reads it. Run it where ``transformer-lens<4``, torch and transformers
are installed; it downloads nothing and always writes the same::

    python tests/golden/make_lenses.py

Direct logit attribution runs on the processed models of ``make_cache.py`` (its ``HookedTransformer`` reads the final
norm as folded); for ``gemma2`` its heads leave the norms after attention out, so only the other units are kept. The
Jacobian lens takes raw weights through ``TransformerBridge``: random checkpoints of ``tests/hf_models.py``, whose
fingerprints the header's ``record`` holds beside the calls and versions.
"""

import importlib.metadata
import json
import logging
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from make_cache import FOLDER, gemma2, models
from make_patching import read
from safetensors.torch import save_file
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.tools.analysis import JacobianLens, direct_logit_attribution

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "analysis"))
import hf_models
from fingerprint import fingerprint
from words import word_tokenizer

PACKAGES = ("transformer-lens", "torch", "transformers", "safetensors")
UNITS = ("component", "layer", "head")
LENSES = ("gpt2", "llama_gqa_bias", "gemma2_gqa_tied")
PROMPTS = [[3, 17, 5, 38, 0, 22, 9, 30], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [30, 29, 28, 27, 26]]
SKIP = 2


def attributions() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Every unit on every processed model."""
    _, _, tokens = read("gpt2")
    tensors: dict[str, torch.Tensor] = {"input": tokens.int()}
    labels: dict[str, list[str]] = {}
    for case in ("gpt2", "llama", "gemma2"):
        config, params = gemma2() if case == "gemma2" else read(case)[:2]
        model = models(config, params)["folded"]
        for unit in UNITS[:2] if case == "gemma2" else UNITS:
            for pos in (-1, None):
                found = direct_logit_attribution(model, tokens, torch.tensor(5), torch.tensor(8), unit=unit, pos=pos)
                name = f"{case}/{unit}/{pos}"
                tensors[name] = found.attribution.contiguous().clone()
                labels[name] = found.labels
    return tensors, labels


def jacobians(variant: str) -> tuple[torch.Tensor, str]:
    """The matrices ``[layer, d_model, d_model]`` of a checkpoint, and its fingerprint."""
    with tempfile.TemporaryDirectory() as folder:
        hf_models.make_hf_model(variant, Path(folder))
        weights = fingerprint(Path(folder))
        word_tokenizer().save_pretrained(folder)
        model = TransformerBridge.boot_transformers(folder, device="cpu")
    model.to_tokens = lambda row: torch.tensor([row])
    lens = JacobianLens.fit(model, PROMPTS, corpus="tiny", skip_first_positions=SKIP, show_progress=False)
    return torch.stack([lens.jacobians[layer] for layer in lens.source_layers]), weights


def main() -> None:
    """Writes the file."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    with torch.no_grad():
        tensors, labels = attributions()
    fingerprints = {}
    for variant in LENSES:
        tensors[f"jacobian/{variant}"], fingerprints[variant] = jacobians(variant)
    record = {
        "labels": labels, "tokens": [5, 8], "prompts": PROMPTS, "skip": SKIP, "fingerprints": fingerprints,
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
    }  # fmt: skip
    path = FOLDER / "lenses_transformerlens.safetensors"
    save_file(tensors, path, metadata={"record": json.dumps(record, separators=(",", ":"))})
    print(f"{path.name}: {len(tensors)} tensors, {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
