"""Makes ``patching_transformerlens.safetensors``: what TransformerLens 3.9's patching functions give.

``tests/patching/test_transformerlens_patching.py`` reads it. Run it where ``transformer-lens<4`` and torch are
installed; it downloads nothing and always writes the same::

    python tests/golden/make_patching.py

Models and clean tokens are those of the golden files that ``make_transformerlens.py`` made. Stored are the corrupted
tokens as ``case:corrupted``, and each function's result as ``case/function``. The header's ``record`` holds, as JSON,
the cases, the tokens whose logits the metric subtracts, the columns of each function's index and the versions.
"""

import importlib.metadata
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from make_transformerlens import VOCAB, build
from safetensors import safe_open
from safetensors.torch import save_file
from transformer_lens import patching

FOLDER = Path(__file__).parent
CASES = ("gpt2", "llama", "neox")
ANSWER, WRONG = 3, 11
PACKAGES = ("transformer-lens", "torch", "safetensors", "numpy")


def read(case: str) -> tuple[dict[str, Any], dict[str, torch.Tensor], torch.Tensor]:
    """The config, parameters and tokens of a case."""
    with safe_open(FOLDER / f"transformerlens_{case}.safetensors", framework="pt") as file:
        record = json.loads(file.metadata()["record"])

        def tensor(key: str) -> torch.Tensor:
            return file.get_tensor(record["aliases"].get(key, key))

        params = {name: tensor(f"params/{name}") for name in record["params"]}
        return record["config"], params, tensor("tokens")


def corrupt(tokens: torch.Tensor) -> torch.Tensor:
    """Other tokens from position two on in the first prompt, at position three alone in the second."""
    corrupted = tokens.clone()
    corrupted[0, 2:] = (tokens[0, 2:] + 17) % VOCAB
    corrupted[1, 3] = (tokens[1, 3] + 5) % VOCAB
    return corrupted


def metric(logits: torch.Tensor) -> torch.Tensor:
    """The mean difference of two logits at the last position."""
    return (logits[:, -1, ANSWER] - logits[:, -1, WRONG]).mean()


def main() -> None:
    """Writes the file."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    names = sorted(name for name in dir(patching) if name.startswith("get_act_patch_"))
    tensors: dict[str, torch.Tensor] = {}
    columns: dict[str, list[str]] = {}
    for case in CASES:
        config, params, tokens = read(case)
        model = build(config, params)
        corrupted = corrupt(tokens)
        _, cache = model.run_with_cache(tokens)
        tensors[f"{case}:corrupted"] = corrupted.to(torch.int32)
        for name in names:
            if name.endswith("resid_mid") and model.cfg.parallel_attn_mlp:
                continue
            function = getattr(patching, name)
            if name.endswith("_every"):
                result = function(model, corrupted, cache, metric)
            else:
                result, index = function(model, corrupted, cache, metric, return_index_df=True)
                columns[name] = list(index.columns)
            tensors[f"{case}/{name}"] = result.cpu().contiguous().clone()
    record = {
        "cases": CASES, "answer": ANSWER, "wrong": WRONG, "columns": columns,
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
    }  # fmt: skip
    path = FOLDER / "patching_transformerlens.safetensors"
    save_file(tensors, path, metadata={"record": json.dumps(record, separators=(",", ":"))})
    print(f"{path.name}: {len(tensors)} tensors, {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
