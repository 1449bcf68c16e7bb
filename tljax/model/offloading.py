"""Models larger than a device: ``offload`` and ``offloaded``."""

from typing import TYPE_CHECKING, Any, Literal, cast

import jax
from jax.sharding import SingleDeviceSharding

from tljax.checks import is_traced, typed
from tljax.config import HookedTransformerConfig
from tljax.dictionary_params import dictionaries_in, with_dictionaries, without_dictionaries
from tljax.errors import OffloadError
from tljax.offload import HostBlocks, is_in_jit, is_offloaded
from tljax.scale.mesh import mesh_of
from tljax.typing import Params

if TYPE_CHECKING:
    from tljax.hooks.dictionary import HookDictionary
    from tljax.model.hooked_transformer import HookedTransformer


class OffloadMethods:
    """Methods for models whose blocks stay on the host."""

    cfg: HookedTransformerConfig
    params: Params
    _hooks: "HookDictionary"

    @property
    def offloaded(self) -> Literal["host"] | None:
        """Where blocks stay while they do not run: ``"host"``, or ``None`` if all are on the device."""
        return "host" if is_offloaded(self.params) else None

    @typed
    def offload(self, offload: Literal["host"] | None) -> "HookedTransformer":
        """Returns the model with its blocks on the host, from where each goes to the device when it runs.

        The device then holds the embeddings, the unembedding, spliced dictionaries, activations, and the parameters of
        at most two blocks: the one that runs, and the next. A run that stops at a layer never moves those above it.
        Numbers are the same. A model that runs elsewhere than it was loaded is moved afterwards:
        ``from_pretrained(name, device="cpu").offload("host").to("gpu")``.

        Args:
            offload: ``"host"``, or ``None`` for all blocks on the device again.

        Raises:
            OffloadError: the model lies on a mesh, or is traced.

        >>> from tljax import HookedTransformer, HookedTransformerConfig
        >>> cfg = HookedTransformerConfig(d_model=8, n_heads=2, n_layers=2, n_ctx=6, d_vocab=5)
        >>> model = HookedTransformer(cfg).offload("host")
        >>> model([1, 2, 3]).shape, model.offloaded
        ((1, 3, 5), 'host')
        """
        model = cast("HookedTransformer", self)
        if offload == self.offloaded:
            return model
        own, dictionaries = without_dictionaries(self.params), dictionaries_in(self.params)
        if offload is None:
            changed: Any = tuple(own["blocks"])
        else:
            self._check_held_whole()
            changed = HostBlocks.holding(own["blocks"], _device_of(own["embed"]["W_E"]))
        others = {name: part for name, part in own.items() if name != "blocks"}
        params = with_dictionaries({**others, "blocks": changed}, dictionaries)
        return model._make(self.cfg, params, self._hooks, model._tokenizer)

    def _check_held_whole(self) -> None:
        if is_traced(self.params) or is_in_jit():
            raise OffloadError("offload() moves numbers to the host: call it outside jax.jit, jax.grad and jax.vmap.")
        if (mesh := mesh_of(self.params)) is not None:
            raise OffloadError(
                f"The model lies on {mesh.size} devices ({dict(mesh.shape)}), and blocks on the host go to one. "
                "Use one of the two: offload a model that was loaded without mesh= and n_devices=."
            )

    def _moved(self, device: Any) -> "HookedTransformer":
        """Returns the model, its blocks on the host, so that it runs on another device."""
        if isinstance(device, jax.sharding.Sharding) and len(device.device_set) > 1:
            raise OffloadError(
                f"Blocks on the host go to one device, and the sharding has {len(device.device_set)}. Bring them to "
                "the device first, model.offload(None), or name one device."
            )
        model = cast("HookedTransformer", self)
        others, hooks = jax.device_put(
            ({name: part for name, part in self.params.items() if name != "blocks"}, self._hooks), device
        )
        params = {**others, "blocks": self.params["blocks"].on(device)}
        return model._make(self.cfg, params, hooks, model._tokenizer)


def _device_of(array: Any) -> Any:
    """Returns where an array lies: ``None`` for jax's default device."""
    if not isinstance(array, jax.Array) or not isinstance(array.sharding, SingleDeviceSharding):
        return None
    own = next(iter(array.devices()))
    return None if jax.device_put(0).devices() == {own} else own
