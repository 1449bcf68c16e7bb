"""The hook table as people see it: printed, in notebooks, and in docs/hook_points.md."""

from pathlib import Path

from tljax import HookedTransformerConfig
from tljax.hooks.listing import HookPointList
from tljax.hooks.points import point_table

PAGE = Path(__file__).parents[2] / "docs" / "hook_points.md"
INTRO = """# Hook points

Every activation of a decoder that can be named, in the order they fire, as `print(model.hook_points())` shows them for
your model. Names, shapes and meaning are TransformerLens 3.9's. Points marked *only when named* exist only in runs
whose hooks or filter name them (or whose config switches them on), and cost nothing otherwise. (TransformerLens
flattens batch, position and head of `q_norm` and `k_norm` into one axis; here they keep their axes.)

"""
COMMON = {"d_model": 16, "n_layers": 1, "n_heads": 4, "n_ctx": 8, "d_vocab": 50}
MODELS = {
    "Learned positions, plain MLP (GPT-2)": HookedTransformerConfig(**COMMON, act_fn="gelu_new"),
    "Rotary positions, grouped keys and values, gated MLP (Llama)": HookedTransformerConfig(
        **COMMON, n_key_value_heads=2, positional_embedding_type="rotary", gated_mlp=True, act_fn="silu",
        normalization_type="RMS",
    ),
    "Norms before and after, normalised queries and keys (Gemma 3)": HookedTransformerConfig(
        **COMMON, n_key_value_heads=2, positional_embedding_type="rotary", gated_mlp=True, act_fn="gelu_pytorch_tanh",
        normalization_type="RMS", use_qk_norm=True, use_normalization_before_and_after=True,
    ),
    "Parallel attention and MLP (Pythia)": HookedTransformerConfig(
        **COMMON, positional_embedding_type="rotary", rotary_dim=2, parallel_attn_mlp=True, act_fn="gelu"
    ),
}  # fmt: skip


def page() -> str:
    sections = [
        f"## {title}\n\nFor `d_model` 16, 4 heads, `d_mlp` 64, `d_vocab` 50.\n\n"
        + HookPointList(point_table(cfg).values()).to_markdown()
        for title, cfg in MODELS.items()
    ]
    return INTRO + "\n".join(sections)


def test_the_page_is_the_table() -> None:
    """To write it anew: ``python -c "import test_listing as t; t.PAGE.write_text(t.page())"`` in this folder."""
    assert PAGE.read_text() == page()


def test_printed_table_aligns_and_shows_sizes() -> None:
    lines = str(HookPointList(point_table(MODELS["Learned positions, plain MLP (GPT-2)"]).values(), pos=6)).splitlines()
    assert lines[0].split() == ["name", "axes", "shape", "meaning"]
    pattern = next(line for line in lines if "hook_pattern" in line)
    assert "[batch, 4, 6, 6]" in pattern
    assert len({line.index("[") for line in lines[1:]}) == 1


def test_notebook_table_has_a_row_for_each_point() -> None:
    table = HookPointList(point_table(MODELS["Parallel attention and MLP (Pythia)"]).values())
    assert table._repr_html_().count("<tr>") == len(table) + 1
