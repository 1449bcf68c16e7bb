"""``model.blocks[3].attn.W_Q``, ``model.ln_final(x)``: parts of a model by name, as readable and callable views."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tljax.config import HookedTransformerConfig
from tljax.errors import ConfigError, FrozenModelError, InputError, MissingAttributeError, nearest
from tljax.forward.forward import context_of_layer
from tljax.modules.context import AttentionContext
from tljax.modules.norm import NoNorm, Norm
from tljax.modules.stack import block_module, embedding_module, head_module
from tljax.numerics import matmul_precision
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
        cfg: HookedTransformerConfig,
        module: nn.Module,
        params: Mapping[str, Any],
        context: AttentionContext,
        check: Callable[[Any], Any] = jnp.asarray,
    ) -> None:
        self.__dict__.update(name=name, _cfg=cfg, _module=module, _params=params, _context=context, _check=check)

    @functools.cached_property
    def _parts(self) -> "dict[str, ModuleView]":
        """Views of this module's submodules, by name."""
        return {
            name: ModuleView(f"{self.name}.{name}", self._cfg, part, self._params.get(name, {}), self._context)
            for name, part in _submodules(self._module).items()
            if not isinstance(part, NoNorm) or (name in ("ln1", "ln2") and f"{name}_post" not in self._params)
        }

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in self._params and not isinstance(self._params[name], Mapping):
            public, cfg = public_shape(name, self._params[name]), self._cfg
            group = cfg.n_heads // cfg.kv_heads if name[2:] in ("K", "V") else 1
            return jnp.repeat(public, group, axis=0) if group > 1 else public
        if name in self._parts:
            return self._parts[name]
        if name.startswith("_") and name[1:] in self._params:
            return public_shape(name[1:], self._params[name[1:]])
        if name in CIRCUITS and "W_O" in self._params:
            return head_circuit(self, self._cfg, name)
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
        takes_context = "context" in inspect.signature(self._module.__call__).parameters
        with matmul_precision(self._cfg):
            inputs = (*map(self._check, args), *((self._context,) if takes_context else ()))
            return self._module.apply({"params": self._params}, *inputs)

    def __dir__(self) -> list[str]:
        return [*self._parts, *(name for name in self._params if name not in self._parts)]

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(dir(self))})"


@functools.lru_cache(maxsize=256)
def _submodules(module: nn.Module) -> Mapping[str, nn.Module]:
    """Returns the submodules that a module creates in its ``setup``, by name; nothing is computed."""
    parts: dict[str, nn.Module] = {}

    def set_up(bound: nn.Module) -> None:
        getattr(bound, "", None)  # looking up a missing attribute makes Flax run setup
        parts.update({name: part.clone() for name, part in vars(bound).items() if isinstance(part, nn.Module)})

    jax.eval_shape(nn.init(set_up, module), jax.eval_shape(lambda: jax.random.key(0)))
    return parts


class BlockViews(Sequence[ModuleView]):
    """Views of blocks that stay on the host: a block goes to the device when its view is asked for."""

    def __init__(self, cfg: HookedTransformerConfig, params: Params) -> None:
        self._cfg, self._params = cfg, params

    def __len__(self) -> int:
        return self._cfg.n_layers

    def __getitem__(self, layer: Any) -> Any:
        """Returns the view of a block, or of each of a slice."""
        found = range(len(self))[layer]
        if isinstance(found, range):
            return [block_view(self._cfg, self._params, each) for each in found]
        return block_view(self._cfg, self._params, found)


def block_view(cfg: HookedTransformerConfig, params: Params, layer: int) -> ModuleView:
    """Returns a view of one block; calling it runs the block on a residual stream without padding."""
    table = params["pos_embed"]["W_pos"][None] if cfg.positional_embedding_type == "shortformer" else None
    context = context_of_layer(cfg, AttentionContext(pos_embed=table), layer)
    module = block_module(cfg, layer)
    return ModuleView(f"blocks.{layer}", cfg, module, params["blocks"][layer], context)


def _checked_tokens(cfg: HookedTransformerConfig, name: str, tokens: Any) -> jax.Array:
    """Returns token ids ``[..., pos]``, checked to have rows in the embeddings."""
    ids = jnp.asarray(tokens)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise InputError(f"model.{name} takes token ids, whole numbers; got dtype {ids.dtype}.")
    if name == "pos_embed":
        check_length(cfg, ids.shape[-1])
    return check_ids(cfg, ids) if ids.size else ids


def end_view(cfg: HookedTransformerConfig, params: Params, name: str) -> ModuleView:
    """Returns a view of ``embed``, ``pos_embed``, ``ln_final`` or ``unembed``."""
    if name == "pos_embed" and not cfg.learns_positions:
        raise ConfigError(
            f"This model has no pos_embed: its positions are {cfg.positional_embedding_type!r}, not learned."
        )
    stage: Any = head_module(cfg) if name in ("ln_final", "unembed") else embedding_module(cfg)
    check = functools.partial(_checked_tokens, cfg, name) if name in ("embed", "pos_embed") else jnp.asarray
    return ModuleView(name, cfg, _submodules(stage)[name], params.get(name, {}), AttentionContext(), check)
