"""Makes the golden file that ``tests/analysis/test_transformerlens_analysis.py`` reads: TransformerLens 3.9's answers.

Run it where ``transformer-lens<4`` and torch are installed. It downloads nothing and always writes the same::

    python tests/golden/make_analysis.py

The models are those of ``make_transformerlens.py`` (the parameters are in its files; ``softcaps`` stands for Gemma 2),
unprocessed and processed.
Results are stored as ``case/state/what``; the header's ``record`` says, as JSON, what was asked for and what
``test_prompt`` printed.
"""

import contextlib
import io
import itertools
import json
import logging
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

os.environ["COLUMNS"] = "200"  # rich must not wrap what test_prompt prints
import torch
from make_transformerlens import CONFIGS, build, config_of, random_parameters
from safetensors.torch import save_file
from transformer_lens import HookedTransformer, SVDInterpreter, utilities
from transformer_lens.head_detector import HEAD_NAMES, detect_head
from transformers import AutoTokenizer

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "analysis"))
from words import word_tokenizer  # noqa: E402

CASES = ("gpt2", "llama", "softcaps")
SEQUENCES = ("w5 w9 w5 w9 w7 w5 w9", "w3 w3 w8 w3")
FLAGS = [dict(zip(("exclude_bos", "exclude_current_token"), pair, strict=True))
         for pair in itertools.product((False, True), repeat=2)]  # fmt: skip
HEADS = [(0, 1), (1, 3)]
PROMPTS = {
    "one": ("w5 w9 w7", "w2", {"top_k": 3}),
    "long": ("w5 w9 w7", "w2 w31", {"top_k": 4}),
    "several": ("w5 w9 w7", ["w2", "w40", "w11"], {"top_k": 2, "prepend_bos": False}),
    "quiet": ("w5 w9 w7", ["w2", "w40"], {"print_details": False}),
}
SVD = [("OV", 1, 2), ("OV", 0, 3), ("w_in", 0, None), ("w_out", 1, None)]
VECTORS = 4

Results = dict[str, torch.Tensor]


def factored(model: HookedTransformer) -> Results:
    """Operations on QK and OV; singular vectors only in forms without a sign."""
    QK, OV = model.QK, model.OV
    generator = torch.Generator().manual_seed(3)
    stream = torch.randn(5, model.cfg.d_model, generator=generator)
    even = OV.make_even()
    return {
        "stream": stream,
        "QK.AB": QK.AB, "OV.AB": OV.AB, "QK.S": QK.S, "OV.S": OV.S, "OV.norm": OV.norm(), "QK.T": QK.T.AB,
        "OV.BA": OV.BA, "OV.trace": OV.eigenvalues.sum(-1).real, "OV.largest": OV.eigenvalues.abs().max(-1).values,
        "QK@OV": (QK @ OV).AB, "stream@OV": (stream @ OV).AB, "OV@stream": (OV @ stream[0]),
        "stream[0]@OV": stream[0] @ OV,
        "OV*2": (OV * 2).AB, "OV[1]": OV[1].AB, "OV[:, 2]": OV[:, 2].AB, "OV[1, 2, 3]": OV[1, 2, 3].AB,
        "OV[0, 1, 2:5, 4]": OV[0, 1, 2:5, 4].AB, "unsqueeze": OV.unsqueeze(1).AB, "corner": OV.get_corner(),
        "even.left": even.A.transpose(-1, -2) @ even.A, "even.AB": even.AB,
        "collapse_l": OV.collapse_l().norm(dim=-1), "collapse_r": OV.collapse_r().norm(dim=-2),
        "U@V": OV.U @ OV.V.transpose(-1, -2),
        "paired": utilities.composition_scores(OV, QK, broadcast_dims=False),
    }  # fmt: skip


def weights(model: HookedTransformer) -> Results:
    """Composition scores and accumulated biases."""
    scores = {f"composition.{mode}": model.all_composition_scores(mode) for mode in "QKV"}
    layers = model.cfg.n_layers
    biases = {
        f"bias.{layer}.{int(mlp_input)}.{int(mlp)}": model.accumulated_bias(layer, mlp_input, mlp)
        for layer in range(layers + 1)
        for mlp_input, mlp in itertools.product((False, True), repeat=2)
        if not (mlp_input and layer == layers)
    }
    return scores | biases


def singular_vectors(model: HookedTransformer) -> Results:
    """Each kind of vectors; for grouped value heads, which 3.9's interpreter does not know, by its FactoredMatrix."""
    interpreter, found = SVDInterpreter(model), {}
    for kind, layer, head in SVD:
        if kind == "OV" and model.cfg.n_key_value_heads is not None:
            matrix = model.OV[layer, head]
            value = (matrix.V[:, :VECTORS].T @ model.W_U).T[:, None]
        else:
            value = interpreter.get_singular_vectors(kind, layer, num_vectors=VECTORS, head_index=head)
        found[f"svd.{kind}.{layer}.{head}"] = value
    return found


def detected(model: HookedTransformer) -> Results:
    """Scores of every pattern by every measure, of one prompt, a list, some heads, and a pattern of shares."""
    found = {}
    for name, measure, flags in itertools.product(HEAD_NAMES, ("mul", "abs"), FLAGS):
        key = f"{name}.{measure}.{int(flags['exclude_bos'])}.{int(flags['exclude_current_token'])}"
        found[f"detect.{key}"] = detect_head(model, SEQUENCES[0], name, error_measure=measure, **flags)
    found["detect.list"] = detect_head(model, list(SEQUENCES), "induction_head")
    found["detect.heads"] = detect_head(model, SEQUENCES[0], "previous_token_head", heads=HEADS)
    shares = torch.tril(torch.ones(8, 8))
    shares = shares / shares.sum(-1, keepdim=True)
    found["detect.shares"] = detect_head(model, SEQUENCES[0], shares, error_measure="abs")
    found["detect.shares.mul"] = detect_head(model, SEQUENCES[0], shares)
    return found


def losses(model: HookedTransformer) -> Results:
    """Loss and accuracy, with and without a mask and each token's own."""
    tokens = model.to_tokens(list(SEQUENCES), padding_side="right")
    mask = torch.ones_like(tokens)
    mask[1, 5:] = 0
    logits = model(tokens, attention_mask=mask)
    return {
        "tokens": tokens, "mask": mask, "logits": logits,
        "loss": utilities.lm_cross_entropy_loss(logits, tokens),
        "loss.masked": utilities.lm_cross_entropy_loss(logits, tokens, mask),
        "loss.each": utilities.lm_cross_entropy_loss(logits, tokens, mask, per_token=True),
        "accuracy": utilities.lm_accuracy(logits, tokens),
        "accuracy.each": utilities.lm_accuracy(logits, tokens, per_token=True),
    }  # fmt: skip


def printed(model: HookedTransformer) -> dict[str, str]:
    """What test_prompt prints."""
    texts = {}
    for name, (prompt, answer, options) in PROMPTS.items():
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            utilities.test_prompt(prompt, answer, model, **options)
        texts[name] = out.getvalue()
    return texts


def models(case: str, directory: str) -> dict[str, HookedTransformer]:
    """The model with a tokenizer, unprocessed and processed."""
    config = config_of(case)
    params = random_parameters(config, list(CONFIGS).index(case))
    tokenizer = AutoTokenizer.from_pretrained(directory)
    plain, processed = build(config, params), build(config, None)
    centred = config.get("output_logits_soft_cap", -1.0) <= 0  # under a soft cap centring would change probabilities
    processed.load_and_process_state_dict(dict(params), center_unembed=centred)
    for model in (plain, processed):
        model.set_tokenizer(tokenizer, default_padding_side="right")
    return {"plain": plain, "processed": processed}


def main() -> None:
    """Asks TransformerLens and writes the file."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    tensors: Results = {}
    record: dict[str, Any] = {"sequences": SEQUENCES, "heads": HEADS, "prompts": PROMPTS, "svd": SVD, "printed": {}}
    with tempfile.TemporaryDirectory() as directory:
        word_tokenizer().save_pretrained(directory)
        for case in CASES:
            for state, model in models(case, directory).items():
                found = weights(model) | singular_vectors(model)
                if state == "plain":
                    found |= factored(model) | detected(model) | losses(model)
                    record["printed"][case] = printed(model)
                tensors |= {f"{case}/{state}/{name}": value.detach().contiguous() for name, value in found.items()}
    path = HERE / "analysis_transformerlens.safetensors"
    save_file(tensors, path, metadata={"record": json.dumps(record, separators=(",", ":"))})
    print(f"{path.name}: {len(tensors)} tensors, {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
