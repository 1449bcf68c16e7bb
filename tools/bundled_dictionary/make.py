"""Trains the bundled dictionary ``tljax-tiny-res``: ``python -m tools.bundled_dictionary.make``.

Text of the kind that the bundled model was trained on is harvested at one site, in the weights that
``from_pretrained("tljax-tiny")`` gives, and a BatchTopK dictionary is trained on it by the project's own trainer.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from tljax import HookedTransformer
from tljax.dictionaries import Tap
from tljax.dictionaries.evaluation import evaluate_dictionary
from tljax.dictionaries.loading import BUNDLED
from tljax.dictionaries.training import TrainingConfig, train_dictionary
from tljax.harvest import harvest
from tools.bundled_model import data

NAME, POINT = "tljax-tiny-res", "blocks.2.hook_resid_pre"
TRAINING_SEED, EVALUATION_SEED = 1, 2
N_DOCUMENTS, N_EVALUATED = 12_000, 200


def training_config(model: HookedTransformer, d_sae: int, k: int) -> TrainingConfig:
    """How the dictionary is trained."""
    tap = Tap(reads=POINT, model_name=model.cfg.model_name, processing=model.cfg.weight_processing)
    return TrainingConfig(
        architecture="batchtopk", d_in=model.cfg.d_model, d_sae=d_sae, k=k, lr=1e-3, lr_warm_up_steps=200,
        lr_decay_steps=1000, normalize_activations="expected_average_only_in", dead_feature_window=200, tap=tap,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--d-sae", type=int, default=512)
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--out", type=Path, default=BUNDLED / NAME / POINT)
    options = parser.parse_args()
    model = HookedTransformer.from_pretrained("tljax-tiny")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        texts = data.documents(N_DOCUMENTS, TRAINING_SEED)
        store = harvest(
            model, texts, POINT, directory, packed=False, context_size=32, batch_size=64, skip_special=True,
            dtype="float32",
        )  # fmt: skip
        reader = store.reader(2048, seed=0)
        cfg = training_config(model, options.d_sae, options.k)
        result = train_dictionary(cfg, reader, steps=options.steps, batch_size=2048)
    held_out = data.documents(N_EVALUATED, EVALUATION_SEED)
    judged = evaluate_dictionary(model, result.dictionary, held_out, batch_size=20, exclude_tokens="special")
    print(judged)
    options.out.mkdir(parents=True, exist_ok=True)
    result.dictionary.save(options.out)
    facts = {
        "steps": options.steps, "batch_size": 2048, "tokens": len(store), "seconds": round(time.perf_counter() - start),
        "evaluation": {name: round(value, 4) for name, value in judged.figures.to_dict().items()},
    }  # fmt: skip
    (options.out / "TRAINING.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
