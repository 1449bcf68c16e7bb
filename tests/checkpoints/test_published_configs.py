"""Every published config.json at a tiny size gives transformers' logits, or is refused for a reason named here."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hf_models import make_of
from published import TEXT, VOCAB, shrink

from tljax import HookedTransformer
from tljax.errors import UnsupportedModelError

FOLDER = Path(__file__).parents[3] / "shared" / "data" / "published_configs"
FILES = sorted(
    file.name for file in FOLDER.glob("*.json") if not file.name.endswith((".generation_config.json", "er_config.json"))
)
QUANTIZED = "whose quant_method tljax does not read"
REFUSED = {
    "c4ai-command-r7b-12-2024-8bit": QUANTIZED,
    "aya_23_35b_exl2": QUANTIZED,
    "swahili_gpt2_4bit": "inputs first",  # GPT-2's matrices, quantised
    "caoyu-noob-Multi-GPT2": "shared_module=True",  # layers that share their weights
    "jokersoft-helper-gpt-j-6B": "rotary=True",  # a GPT-J under GPT-Neo's name
    "cwm-snapshots_dnakov": "sliding_window=5",  # a window under Llama's name, whose class has none
    "bunny-phi-2-siglip": "mm_vision_tower",  # reads images too
    "Qwen1.5-moe-8x0.5B": "code of its own",
}
"""Part of a file's name → part of the reason."""


def refusal(name: str) -> str | None:
    return next((reason for part, reason in REFUSED.items() if part in name), None)


def hf_model(attributes: dict[str, Any], directory: Path) -> Any:
    """transformers' model of ``attributes``, saved in ``directory`` next to them as they are."""
    import torch
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING[attributes["model_type"]].from_dict(json.loads(json.dumps(attributes)))
    vars(config).pop("quantization_config", None)  # random weights are not packed
    model = make_of(config, directory, dtype=torch.float32, attn_implementation="eager")
    (directory / "config.json").write_text(json.dumps(attributes))
    return model


@pytest.mark.skipif(not FILES, reason="shared/data/published_configs is not here")
@pytest.mark.parametrize("name", FILES or ["none"])
def test_published(name: str, tmp_path: Path) -> None:
    import torch

    attributes = shrink(json.loads((FOLDER / name).read_text()))
    if reason := refusal(name):
        (tmp_path / "config.json").write_text(json.dumps(attributes))
        with pytest.raises(UnsupportedModelError, match=reason):
            HookedTransformer.from_pretrained_no_processing(tmp_path)
        return
    reference = hf_model(attributes, tmp_path)
    tokens = np.random.default_rng(0).integers(0, VOCAB, (2, TEXT))
    with torch.no_grad():
        wanted = reference(torch.tensor(tokens)).logits.numpy()
    got = HookedTransformer.from_pretrained_no_processing(tmp_path)(jnp.asarray(tokens))
    np.testing.assert_allclose(np.asarray(got), wanted, rtol=0, atol=5e-5)
