"""What older or unusual configs of Gemma, Qwen 3 and SmolLM3 say, read as meant or refused."""

import pytest
from hf_layer_kinds import VARIANTS
from read_config import read

from tljax.errors import UnsupportedModelError


@pytest.mark.parametrize("variant", VARIANTS)
def test_configs_of_transformers_are_read_whole(variant: str) -> None:
    assert read(variant).n_layers == 3


@pytest.mark.parametrize(
    ("changes", "act_fn"),
    [
        ({"hidden_act": "gelu"}, "gelu_pytorch_tanh"),
        ({"hidden_act": "gelu", "hidden_activation": "silu"}, "silu"),
        ({"hidden_act": None}, "gelu_pytorch_tanh"),
        ({"hidden_act": "relu"}, "relu"),
    ],
)
def test_gemma_means_the_approximate_gelu(changes: dict[str, object], act_fn: str) -> None:
    assert read("gemma_mqa_tied", **changes).act_fn == act_fn


def test_layers_that_rotate() -> None:
    assert read("smollm3_gqa").rotary_layers == (True, False, True)
    assert read("smollm3_gqa", no_rope_layers=[1, 1, 1]).rotary_layers is None
    window = read("smollm3_window", layer_types=None)
    assert window.attn_types == ("local", "global", "local")


@pytest.mark.parametrize(
    ("variant", "changes", "named"),
    [
        ("smollm3_gqa", {"no_rope_layers": [1, 0]}, "no_rope_layers"),
        ("gemma_mqa_tied", {"mlp_bias": True}, "mlp_bias"),
        ("gemma_mqa_tied", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("qwen3_gqa", {"rope_parameters": {"rope_type": "axial"}}, "axial"),
    ],
)
def test_what_cannot_be_computed_is_refused(variant: str, changes: dict[str, object], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        read(variant, **changes)
