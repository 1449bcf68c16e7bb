"""The hook table as people see it: printed, in notebooks, and in docs/hook_points.md."""

from pathlib import Path

from tljax import HookedTransformerConfig
from tljax.hooks.listing import HookPointList
from tljax.hooks.points import point_table
from tljax.splice import Splice

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
    "Keys and values from a latent (DeepSeek 2)": HookedTransformerConfig(
        **COMMON, d_head=6, d_value=5, kv_lora_rank=8, q_lora_rank=9, positional_embedding_type="rotary", rotary_dim=2,
        gated_mlp=True, act_fn="silu", normalization_type="RMS",
    ),
    "A mixture of experts, one of them shared (Qwen 2 MoE)": HookedTransformerConfig(
        **COMMON, positional_embedding_type="rotary", gated_mlp=True, act_fn="silu", normalization_type="RMS",
        num_experts=8, experts_per_token=2, d_expert=24, d_shared_expert=32, gate_shared_expert=True,
    ),
}  # fmt: skip
EXPERTS = """
Here 8 experts of width 24, 2 for each token, and a shared one of width 32. How a token is routed:

- `mlp.hook_expert_weights` is what the chosen experts' weights are taken from (and divided by their sum, under
  `norm_topk_prob`). Under `router="softmax"` (Mixtral, Qwen, OLMoE) and `"sigmoid"` (DeepSeek 3) it covers all experts
  and decides the choice, so an edit changes both. Under `"chosen_softmax"` (Granite, gpt-oss) and `"sparsemixer"`
  (Phi-3.5-MoE) the choice is made on `mlp.hook_router_scores`; then `mlp.hook_expert_indices` fires before
  `mlp.hook_expert_weights`, which is zero for experts that were not chosen.
- Other numbers put into `mlp.hook_expert_indices` are the experts that run, each with its own weight. (TransformerLens
  keeps the weights of the experts chosen before.) A number that no expert has is an error; under your own `jax.jit`,
  where nobody can look at it, the token's activations become NaN.
- `mlp.experts.*` have an axis `choice` in the order of `mlp.hook_expert_indices`. TransformerLens has `hook_gate`,
  `hook_pre` and `hook_post` at `mlp.experts.{e}.`, each `[tokens that chose e, d_mlp]`; they are `hook_pre`,
  `hook_pre_linear` and `hook_post` here, as in a gated MLP. What expert 3 did is where
  `cache["blocks.0.mlp.hook_expert_indices"] == 3` in `cache["blocks.0.mlp.experts.hook_post"]`.
"""

BY_ARCHITECTURE = """
## What the points mean where a block is built in another way

- **`hook_attn_out` and `hook_mlp_out` are what is added to the residual stream**, in every architecture but GPT-1:
  after the norms that Gemma 2 and 3, GLM-4-0414, OLMo 2 and 3 and EXAONE 4 have there (`ln1_post`, `ln2_post`), after
  Granite's multiplier. BLOOM's hold no residual stream either. So `hook_embed` (with `hook_pos_embed`) and all of them
  sum to `hook_resid_post` and to the final residual stream.
- **Norms after attention and MLP only** (OLMo 2 and 3, EXAONE 4): there is no `ln1` and `ln2`; the norms are called
  `ln1_post` and `ln2_post`, as where a model has both. TransformerLens calls these two `ln1` and `ln2`.
- **GPT-1 normalises the residual stream itself**: `ln1` and `ln2` fire after what attention and the MLP put out was
  added, and `hook_resid_mid` and `hook_resid_post` follow them. There is no sum of outputs, and no `ln_final`; path
  patching and decompositions refuse such a model, sweeps take it.
- **`hook_embed` is what enters the first block**: after Gemma's and Granite's multiplier, and after BLOOM's layer norm,
  whose own points are `embed.ln.hook_scale` and `embed.ln.hook_normalized`.
- **`attn.hook_q`, `hook_k`, `hook_v` come first**: before norms over queries and keys, before clipping (OLMo 1, OLMoE,
  MPT), before rotation. `pattern @ v` is `z` with `v` clipped likewise. A norm over all heads together (OLMo 2, OLMoE)
  has `q_norm.hook_normalized` of shape [batch, pos, heads * d_head]; HunYuan's norms come after `hook_rot_q`.
- **Attention sinks** (gpt-oss): rows of `attn.hook_pattern` sum to less than one; the rest went to the sink, which is
  not in `attn.hook_attn_scores`.
- **ALiBi** (BLOOM, MPT, Falcon-RW) is in `attn.hook_attn_scores`.
- **Latent attention**: `hook_q_latent` and `hook_kv_latent` are the latents as the up-projections read them, weight of
  their norm included; the last `rotary_dim` dimensions of `hook_k` are the same for every head.
"""

DICTIONARIES = """
## Dictionaries

A model that dictionaries are spliced into (`model.with_dictionaries`) has points of theirs, each right after the point
that the dictionary writes. That one keeps its name, and the value that the model computed; what the model goes on with
is `hook_sae_output`. Here for an autoencoder of 32 features at `blocks.0.hook_resid_pre` of the first model above.
Under `error="drop"` there is no `hook_sae_error`, and in matching pursuit no `hook_sae_acts_pre`. Where heads are read
as one vector (`attn.hook_z`), `hook_sae_input` and `hook_sae_recons` are [batch, pos, heads * d_head]. A transcoder's
points are under the name that it writes. All are in the dictionary's dtype but the output.

"""


def dictionary_points() -> HookPointList:
    """The points of a dictionary, after the one that it writes."""
    site = "blocks.0.hook_resid_pre"
    splice = Splice(reads=site, writes=site, d_in=16, d_out=16, d_sae=32, dtype="float32")
    cfg = HookedTransformerConfig(**COMMON, splices=(splice,))
    return HookPointList(row for name, row in point_table(cfg).items() if name.startswith(site))


def page() -> str:
    sections = [
        f"## {title}\n\nFor `d_model` 16, 4 heads, `d_mlp` 64, `d_vocab` 50.\n\n"
        + HookPointList(point_table(cfg).values()).to_markdown()
        for title, cfg in MODELS.items()
    ]
    spliced = DICTIONARIES + dictionary_points().to_markdown()
    return INTRO + "\n".join(sections) + EXPERTS + BY_ARCHITECTURE + spliced


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
