"""``model.blocks[3].attn.W_Q``, ``model.ln_final(x)``: parts of a model by name, as readable and callable views."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tljax.config import HookedTransformerConfig
from tljax.errors import ConfigError, FrozenModelError, InputError, MissingAttributeError, nearest
from tljax.forward.forward import context_of_layer
from tljax.forward.stages import block_module
from tljax.modules.block import make_attention, make_mlp
from tljax.modules.context import AttentionContext
from tljax.modules.embedding import Embed, PosEmbed, Unembed, final_norm
from tljax.modules.mlp import MLP
from tljax.modules.moe import Experts, MoE
from tljax.modules.norm import Norm, block_norm_kind, make_norm, post_norm_kind
from tljax.text.inputs import check_ids, check_length
from tljax.typing import Params
from tljax.weights.circuits import CIRCUITS, head_circuit
from tljax.weights.properties import public_shape


class ModuleView:
    """One module of a model with its parameters.

    Attributes read parameters in TransformerLens's shapes and submodules as further views; calling it applies the
    module to arrays, without hooks. Grouped key/value heads are repeated (``attn.W_K``); ``attn._W_K`` is as stored.
    An attention also has ``QK`` and ``OV``, ``[head, d_model, d_model]``.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        params: Mapping[str, Any],
        precision: str,
        children: "Mapping[str, ModuleView] | None" = None,
        extra_inputs: tuple[Any, ...] = (),
        group: int = 1,
        check: Callable[[Any], Any] = jnp.asarray,
    ) -> None:
        self.__dict__.update(
            name=name, _module=module, _params=params, _precision=precision, _parts=dict(children or {}),
            _extra=extra_inputs, _group=group, _check=check,
        )  # fmt: skip

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in self._parts:
            return self._parts[name]
        if name in self._params:
            public = public_shape(name, self._params[name])
            return jnp.repeat(public, self._group, axis=0) if self._group > 1 and name[2] in "KV" else public
        if name.startswith("_") and name[1:] in self._params:
            return public_shape(name[1:], self._params[name[1:]])
        if name in CIRCUITS and "W_O" in self._params:
            return head_circuit(self, self._module.cfg, name)
        if name in ("w", "b") and isinstance(self._module, Norm) and self._module.kind.endswith("Pre"):
            raise AttributeError(
                f"{self.name} has no {name!r}: it is folded into the matrices that read the norm. Load the model with "
                "fold_ln=False to have it apart."
            )
        if name in ("ln1", "ln2") and f"{name}_post" in self._parts:
            raise AttributeError(
                f"{self.name} has no {name}: attention and MLP read the residual stream as it is, and the norm is on "
                f"what they put out, {name}_post (TransformerLens calls it {name})."
            )
        known = dir(self)
        if name.startswith("hook_"):
            raise MissingAttributeError(
                f"{self.name} is a view of parameters and holds no hook points: use "
                f"model.add_hook({f'{self.name}.{name}'!r}, hook), which returns a hooked model."
            )
        raise AttributeError(
            f"{self.name} has no parameter or part {name!r}.{nearest(name, known)} It has {', '.join(known)}."
        )

    def __setattr__(self, name: str, value: Any) -> None:
        raise FrozenModelError(f"Setting {self.name}.{name} in place is not possible: use model.replace(params=...).")

    def __call__(self, *args: Any) -> jax.Array:
        """Applies the module to arrays, in the model's matmul precision."""
        with jax.default_matmul_precision(self._precision):
            return self._module.apply({"params": self._params}, *map(self._check, args), *self._extra)

    def __dir__(self) -> list[str]:
        return [*self._parts, *(name for name in self._params if name not in self._parts)]

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(dir(self))})"


def block_view(cfg: HookedTransformerConfig, params: Params, layer: int) -> ModuleView:
    """View of one block; calling it runs the block on a residual stream without padding."""
    own, name = params["blocks"][layer], f"blocks.{layer}"
    table = params["pos_embed"]["W_pos"][None] if cfg.positional_embedding_type == "shortformer" else None
    context = context_of_layer(cfg, AttentionContext(pos_embed=table), layer)
    modules: dict[str, nn.Module] = {
        "ln1": make_norm(cfg, block_norm_kind(cfg)),
        "attn": make_attention(cfg, cfg.layer_kind(layer)),
    }
    if not cfg.attn_only:
        modules |= {"ln2": make_norm(cfg, block_norm_kind(cfg)), "mlp": make_mlp(cfg, cfg.layer_kind(layer))}
    if cfg.use_normalization_after_only:  # attention and MLP read the stream as it is
        modules = {key: module for key, module in modules.items() if key not in ("ln1", "ln2")}
    if cfg.has_norms_after:
        posts = ("ln1_post",) if cfg.attn_only else ("ln1_post", "ln2_post")
        modules |= {name: make_norm(cfg, post_norm_kind(cfg)) for name in posts}
    parts = {
        key: ModuleView(
            f"{name}.{key}", module, own.get(key, {}), cfg.matmul_precision,
            children=_parts_of_mixture(cfg, own["mlp"], name) if isinstance(module, MoE) else {},
            extra_inputs=(context,) if key == "attn" else (), group=cfg.n_heads // cfg.kv_heads if key == "attn" else 1,
        )
        for key, module in modules.items()
    }  # fmt: skip
    module = block_module(cfg, cfg.layer_kind(layer))
    return ModuleView(name, module, own, cfg.matmul_precision, parts, (context,))


def _parts_of_mixture(cfg: HookedTransformerConfig, own: Params, block: str) -> dict[str, ModuleView]:
    """Views of the experts, ``[expert, …]`` each weight, and of the one that all tokens share."""
    modules: dict[str, nn.Module] = {"experts": Experts(cfg)}
    if cfg.d_shared_expert is not None:
        modules["shared"] = MLP(cfg, cfg.d_shared_expert)
    return {
        key: ModuleView(f"{block}.mlp.{key}", module, own[key], cfg.matmul_precision) for key, module in modules.items()
    }


def _checked_tokens(cfg: HookedTransformerConfig, name: str, tokens: Any) -> jax.Array:
    """Token ids ``[..., pos]`` that the embeddings have rows for."""
    ids = jnp.asarray(tokens)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise InputError(f"model.{name} takes token ids, whole numbers; got dtype {ids.dtype}.")
    if name == "pos_embed":
        check_length(cfg, ids.shape[-1])
    return check_ids(cfg, ids) if ids.size else ids


def end_view(cfg: HookedTransformerConfig, params: Params, name: str) -> ModuleView:
    """View of ``embed``, ``pos_embed``, ``ln_final`` or ``unembed``."""
    modules = {"embed": Embed, "pos_embed": PosEmbed, "ln_final": final_norm, "unembed": Unembed}
    if name == "pos_embed" and not cfg.learns_positions:
        raise ConfigError(
            f"This model has no pos_embed: its positions are {cfg.positional_embedding_type!r}, not learned."
        )
    extra = (AttentionContext(),) if name == "pos_embed" else ()
    check = functools.partial(_checked_tokens, cfg, name) if name in ("embed", "pos_embed") else jnp.asarray
    own = params.get(name, {})
    return ModuleView(name, modules[name](cfg), own, cfg.matmul_precision, extra_inputs=extra, check=check)
