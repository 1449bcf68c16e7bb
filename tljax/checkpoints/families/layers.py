"""Rows that come in pairs: a layer's weight and bias."""

from tljax.checkpoints.rows import Row


def linear(key: str, axes: str, paths: str, *, biased: bool = True) -> list[Row]:
    """Returns the rows of a PyTorch ``Linear``: its weight, output axis first, and its bias.

    Args:
        key: the layer's name, ``{l}`` for the number of the block.
        axes: the weight's axes, the output's (a group, if it is several) before the input's.
        paths: our weights, such as ``blocks.{l}.attn.W_Q|W_K|W_V``; the biases are named alike.
        biased: whether the layer has a bias.

    >>> [(row.key, row.axes, row.paths) for row in linear("fc", "d_mlp d_model", "mlp.W_in")]
    [('fc.weight', 'd_mlp d_model', 'mlp.W_in'), ('fc.bias', 'd_mlp', 'mlp.b_in')]
    """
    weight = Row(f"{key}.weight", axes, paths)
    output = axes[: axes.index(")") + 1] if axes.startswith("(") else axes.split()[0]
    bias = Row(f"{key}.bias", output, paths.replace("W_", "b_"))
    return [weight, bias] if biased else [weight]


def attention(key: str, out: str = "out_proj", *, biased: bool, out_biased: bool) -> list[Row]:
    """Returns the rows of an attention that stores query, key and value apart.

    Args:
        key: the attention's name.
        out: the name of its output layer.
        biased: whether query, key and value have biases.
        out_biased: whether the output layer has one.
    """
    ours = "blocks.{l}.attn"
    return [
        *linear(f"{key}.q_proj", "(n_heads d_head) d_model", f"{ours}.W_Q", biased=biased),
        *linear(f"{key}.k_proj", "(n_kv d_head) d_model", f"{ours}.W_K", biased=biased),
        *linear(f"{key}.v_proj", "(n_kv d_head) d_model", f"{ours}.W_V", biased=biased),
        *linear(f"{key}.{out}", "d_model (n_heads d_head)", f"{ours}.W_O", biased=out_biased),
    ]


def mlp(into: str, out: str, *, biased: bool = True) -> list[Row]:
    """Returns the rows of an MLP without a gate, by the names of its two layers."""
    return [
        *linear(into, "d_mlp d_model", "blocks.{l}.mlp.W_in", biased=biased),
        *linear(out, "d_model d_mlp", "blocks.{l}.mlp.W_out", biased=biased),
    ]


def layer_norm(key: str, *paths: str) -> list[Row]:
    """Returns the rows of a layer norm for each of ``paths``: several of ours may share one of the checkpoint's."""
    return [Row(f"{key}.{stored}", "d_model", f"{path}.{our}") for path in paths for stored, our in _NORM]


def head(embedding: str, *, tied: bool, biased: bool = False) -> list[Row]:
    """Returns the rows of ``lm_head``, whose weight may be that of ``embedding``."""
    weight, bias = linear("lm_head", "d_vocab_out d_model", "unembed.W_U")
    weight = Row(weight.key, weight.axes, weight.paths, tied_to=embedding if tied else None)
    return [weight, bias] if biased else [weight]


_NORM = (("weight", "w"), ("bias", "b"))
