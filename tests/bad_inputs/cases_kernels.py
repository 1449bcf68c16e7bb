"""Kernels of attention for models that they cannot serve."""

from table import Case, World

from tljax.errors import ConfigError, InputError


def _asked(w: World, path: str, **changes: object) -> object:
    return w.config(**{"attention_path": path, "dtype": "bfloat16", "d_head": 8} | changes)


CASES: tuple[Case, ...] = (
    Case("a path with a typing error", lambda w: _asked(w, "cudn"), ConfigError, "'cudn'", "'cudnn'"),
    Case("splash in float32", lambda w: _asked(w, "splash", dtype="float32"), ConfigError, "float32", "'auto'"),
    Case("cuDNN's in float32", lambda w: w.small.cfg.replace(attention_path="cudnn"), ConfigError, "and float16"),
    Case("cuDNN's with a soft cap", lambda w: _asked(w, "cudnn", attn_scores_soft_cap=5.0), ConfigError, "soft cap"),
    Case("splash with sinks", lambda w: _asked(w, "splash", use_attention_sinks=True), ConfigError, "sinks"),
    Case(
        "cuDNN's with a width", lambda w: _asked(w, "cudnn", d_head=12), ConfigError, "multiples of 8", "d_head is 12"
    ),
    Case("splash, both ways", lambda w: _asked(w, "splash", attention_dir="bidirectional"), ConfigError, "directions"),
    Case("a flag as a word", lambda w: w.small.attention_path(4, padded="yes"), InputError, "padded", "'yes'"),
)
