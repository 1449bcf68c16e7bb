"""dictionary_learning: ``ae.pt`` or ``ae.safetensors`` with ``config.json``, and checkpoints ``ae_{step}.pt``."""

import dataclasses
import re
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tljax.dictionaries.formats.points import tap_of
from tljax.dictionaries.formats.read import Format, Read
from tljax.dictionaries.formats.tensors import (
    Rows,
    Stored,
    expect_sizes,
    metadata_of,
    open_pickle,
    open_safetensors,
    read_config,
    read_rows,
    spread,
    tensors_of,
    whole,
)
from tljax.dictionaries.maths.config import DictionaryConfig
from tljax.errors import DictionaryError, nearest

CONFIG, FILES = "config.json", ("ae.safetensors", "ae.pt")
_LINEAR: Rows = {"W_enc": [("encoder.weight", "d_sae d_in")], "W_dec": [("decoder.weight", "d_out d_sae")]}
_PLAIN: Rows = {
    "W_enc": [("W_enc", "d_in d_sae")], "W_dec": [("W_dec", "d_sae d_out")],
    "b_enc": [("b_enc", "d_sae")], "b_dec": [("b_dec", "d_out")],
}  # fmt: skip
_B_ENC: Rows = {"b_enc": [("encoder.bias", "d_sae")]}


@dataclasses.dataclass(frozen=True)
class _Class:
    """A class of dictionary_learning: what its arrays are called, and what it computes.

    Attributes:
        rows: the table of arrays.
        selects: ``"standard"`` or ``"gated"``; ``"threshold"`` for a threshold of each feature; ``"topk"`` or
            ``"batchtopk"`` for ``k`` features and one threshold, of which ``use_threshold`` says which counts.
        apply_b_dec_to_input: whether the decoder's bias is subtracted from the input.
        use_threshold: which of the two the class itself uses.
    """

    rows: Rows
    selects: Literal["standard", "gated", "threshold", "topk", "batchtopk"] = "standard"
    apply_b_dec_to_input: bool = True
    use_threshold: bool = False


CLASSES = {
    "AutoEncoder": _Class(_LINEAR | _B_ENC | {"b_dec": [("bias", "d_out")]}),
    "AutoEncoderNew": _Class(_LINEAR | _B_ENC | {"b_dec": [("decoder.bias", "d_out")]}, apply_b_dec_to_input=False),
    "AutoEncoderTopK": _Class(_LINEAR | _B_ENC | {"b_dec": [("b_dec", "d_out")]}, "topk"),
    "BatchTopKSAE": _Class(_LINEAR | _B_ENC | {"b_dec": [("b_dec", "d_out")]}, "batchtopk", use_threshold=True),
    "GatedAutoEncoder": _Class(
        _LINEAR | {
            "b_dec": [("decoder_bias", "d_out")], "b_gate": [("gate_bias", "d_sae")], "b_mag": [("mag_bias", "d_sae")],
            "r_mag": [("r_mag", "d_sae")],
        }, "gated",
    ),
    "JumpReluAutoEncoder": _Class(
        _PLAIN | {"threshold": [("threshold", "d_sae")]}, "threshold", apply_b_dec_to_input=False
    ),
    "MatryoshkaBatchTopKSAE": _Class(_PLAIN, "batchtopk", use_threshold=True),
}  # fmt: skip
_ALONE = {"bias": "AutoEncoder", "decoder.bias": "AutoEncoderNew", "gate_bias": "GatedAutoEncoder"}
"""Arrays that only one class has."""

_SUBMODULE = re.compile(r"(resid_pre|resid_mid|resid_post|attn_out|mlp_out)_layer_?(\d+)")


def read(path: Path, *, use_threshold: bool | None = None, **facts: Any) -> Read:
    """Reads a trained dictionary, a checkpoint, or what an interrupted run left.

    Args:
        path: a directory with ``ae.safetensors`` or ``ae.pt``, or such a file (``checkpoints/ae_1000.pt``).
        use_threshold: whether features above the file's threshold fire, or the ``k`` largest: of each token for
            ``AutoEncoderTopK``, of the whole batch for ``BatchTopKSAE`` and ``MatryoshkaBatchTopKSAE``. By default what
            the class does: the threshold for the last two. A threshold that training never set (-1) selects nothing:
            then it is the ``k`` largest. ``Dictionary.load(directory, training=True)`` means ``False``.
        **facts: see :class:`~tljax.dictionaries.formats.read.Format`.

    Raises:
        DictionaryError: damaged files, an unknown class, or arrays that are not the class's.
        UnsupportedModelError: only a pickle, and torch is not installed.
    """
    if use_threshold is None and facts.get("training"):
        use_threshold = False
    stored, config, scale = _open(path, facts)
    trainer = config.get("trainer", config)
    name = trainer.get("dict_class") or next((found for key, found in _ALONE.items() if key in stored), None)
    if name not in CLASSES:
        raise DictionaryError(
            f"{path}: dict_class is {name!r}; known are {', '.join(CLASSES)}.{nearest(str(name), CLASSES)}"
            + ("" if name else f" Without {CONFIG} it cannot be told: config_overrides={{'dict_class': …}} says it.")
        )
    kind = CLASSES[name]
    params = read_rows(stored, kind.rows)
    d_in, d_sae = params["W_enc"].shape
    expect_sizes(
        path, activation_dim=(trainer.get("activation_dim"), d_in), dict_size=(trainer.get("dict_size"), d_sae)
    )
    architecture, k = _selection(kind, stored, params, trainer, use_threshold, path)
    widths = np.cumsum(stored.take("group_sizes")).tolist() if "group_sizes" in stored else []
    stored.finish()
    if scale != 1:
        params |= {name: params[name] * np.float32(scale) for name in _SCALED if name in params}
    submodule, layer = _SUBMODULE.fullmatch(str(trainer.get("submodule_name"))), trainer.get("layer")
    point = f"blocks.{submodule[2]}.hook_{submodule[1]}" if submodule else None
    if submodule and isinstance(layer, int) and layer != int(submodule[2]):
        raise DictionaryError(f"{path}: the config says layer={layer} and submodule_name={submodule[0]!r}.")
    cfg = DictionaryConfig(
        architecture=architecture,
        d_in=d_in,
        d_sae=d_sae,
        k=k,
        apply_b_dec_to_input=kind.apply_b_dec_to_input,
        matryoshka_widths=tuple(int(width) for width in widths),
        tap=tap_of(point, facts=facts, model_name=trainer.get("lm_name")),
        metadata=metadata_of(config),
    )
    return Read(params, cfg)


_SCALED = ("b_enc", "b_dec", "b_gate", "b_mag", "threshold")


def _open(path: Path, facts: dict[str, Any]) -> tuple[Stored, dict[str, Any], float]:
    """Opens the arrays; returns them with the config, and the factor that makes them fit raw activations."""
    file = path if path.is_file() else next((path / name for name in FILES if (path / name).is_file()), path / FILES[0])
    folder = file.parent.parent if file.parent.name == "checkpoints" else file.parent
    config: dict[str, Any] = {}
    if (folder / CONFIG).is_file() or facts.get("config_overrides"):
        config = read_config(folder / CONFIG, facts) if (folder / CONFIG).is_file() else dict(facts["config_overrides"])
    if file.suffix == ".safetensors":
        return open_safetensors(file), config, 1.0
    stored, rest = open_pickle(file)
    if "ae" not in rest:
        return stored, config, 1.0
    stored, _ = tensors_of(rest["ae"], file)  # an interrupted run: on normalised activations, unlike finished ones
    if not config and isinstance(rest.get("config"), dict):
        config = {"trainer": rest["config"]}
    factor = rest.get("norm_factor")
    return stored, config, 1.0 if factor is None else float(factor)


def _selection(
    kind: _Class, stored: Stored, params: dict[str, np.ndarray], trainer: dict[str, Any], use_threshold: bool | None,
    path: Path,
) -> tuple[Any, int | None]:  # fmt: skip
    """Returns architecture and ``k``; adds a threshold to the parameters where that selects."""
    if kind.selects in ("standard", "gated", "threshold"):
        return {"threshold": "jumprelu"}.get(kind.selects, kind.selects), None
    threshold = stored.number("threshold") if "threshold" in stored else -1.0
    k = int(stored.number("k")) if "k" in stored else whole(path, trainer, "k")
    if threshold < 0 and use_threshold:
        raise DictionaryError(
            f"{path}: its threshold was never set ({threshold:g}): use_threshold=False selects by k={k}."
        )
    if threshold < 0 or not (kind.use_threshold if use_threshold is None else use_threshold):
        return kind.selects, k
    params["threshold"] = spread(threshold, params["W_enc"].shape[1], path).astype(params["W_dec"].dtype)
    return "jumprelu", None


def _detects(path: Path) -> bool:
    if path.is_file():
        return re.fullmatch(r"ae(_\d+)?\.(pt|safetensors)", path.name) is not None
    return any((path / name).is_file() for name in FILES)


FORMAT = Format(name="dictionary_learning", looks_for="ae.safetensors or ae.pt", detects=_detects, reads=read)
