"""Trains the bundled dictionary ``tljax-tiny-res``: ``python -m tools.bundled_dictionary.make``."""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tljax import HookedTransformer
from tljax.checkpoints.files.hub import MODELS
from tljax.dictionaries import Dictionary, Tap
from tljax.dictionaries.evaluation import evaluate_dictionary
from tljax.dictionaries.evaluation.evaluation import DictionaryEvaluation
from tljax.dictionaries.training import TrainingConfig, train_dictionary
from tljax.harvest import harvest
from tools.bundled_model import data

MODEL = "tljax-tiny"
NAME = "tljax-tiny-res"
POINT = "blocks.2.hook_resid_pre"
DIRECTORY = MODELS / NAME

TRAINING_SEED, EVALUATION_SEED = 77, 78
"""Seeds of the text: training and evaluation have documents of their own."""


def config(model: HookedTransformer, steps: int) -> TrainingConfig:
    """Returns the settings: BatchTopK with ten features a token."""
    return TrainingConfig(
        architecture="batchtopk", d_in=model.cfg.d_model, d_sae=512, k=10, lr=2e-3, lr_warm_up_steps=steps // 30,
        lr_decay_steps=steps // 2, dead_feature_window=200, normalize_activations="expected_average_only_in",
        n_batches_for_norm_estimate=20, seed=1,
        tap=Tap(reads=POINT, model_name=MODEL, processing=tuple(model.cfg.weight_processing)),
    )  # fmt: skip


def make(directory: Path, *, steps: int = 3000, n_documents: int = 20_000) -> tuple[Dictionary, DictionaryEvaluation]:
    """Trains the dictionary and writes it.

    Args:
        directory: the dictionary goes into its folder :data:`POINT`, a card beside it.
        steps: training steps of 1,024 tokens.
        n_documents: training documents, of about 19 tokens each.
    """
    model = HookedTransformer.from_pretrained(MODEL)
    with tempfile.TemporaryDirectory() as scratch:
        texts = data.documents(n_documents, seed=TRAINING_SEED)
        store = harvest(model, texts, [POINT], scratch, batch_size=128, context_size=32, packed=False)
        reader = store.reader(batch_size=1024, seed=0)
        result = train_dictionary(config(model, steps), reader, steps=steps, on_log=_show)
    texts = data.documents(300, seed=EVALUATION_SEED)
    evaluation = evaluate_dictionary(model, result.dictionary, texts, batch_size=64, exclude_tokens="special")
    result.dictionary.save(directory / POINT)
    (directory / "README.md").write_text(_card(steps, n_documents, evaluation), encoding="utf-8")
    return result.dictionary, evaluation


def _show(entry: dict) -> None:
    if entry["step"] % 500 == 0:
        print(f"step {entry['step']}: explained variance {entry['explained_variance']:.4f}", file=sys.stderr)


def _card(steps: int, n_documents: int, evaluation: DictionaryEvaluation) -> str:
    return f"""# {NAME}

A sparse autoencoder of 512 features at `{POINT}` of the bundled model `{MODEL}` (with its default weight processing),
trained by tljax's own trainer: BatchTopK with ten features a token, {steps:,} steps of 1,024 tokens of {n_documents:,}
templated documents. Made by `python -m tools.bundled_dictionary.make`.

```python
from tljax.dictionaries import SAE

sae = SAE.from_pretrained("{NAME}", "{POINT}")
```

On 300 documents that it was not trained on, special tokens left out, with 95 % bootstrap intervals over documents:

```
{evaluation}
```
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=DIRECTORY, help="where to write it")
    parser.add_argument("--steps", type=int, default=3000)
    given = parser.parse_args(arguments)
    _, evaluation = make(given.out, steps=given.steps)
    print(evaluation)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
