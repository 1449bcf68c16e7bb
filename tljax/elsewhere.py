"""Names of TransformerLens and torch that tljax lacks, and what to write instead.

The error for a missing attribute quotes these tables; docs/from_transformerlens.md agrees with them.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from tljax.errors import MissingAttributeError, nearest

_LIST_POINTS = "model.hook_points() lists every point by name"
_CACHE = "model.run_with_cache(tokens, names_filter=...) returns activations; a hook may store them too"
_GRADIENT = "gradients are asked for: model.run_with_grads(input, metric), or jax.grad of a function of model.params"
_PROCESS = "use model = model.process_weights(fold_ln=True), which says by name what to do"
_VALUE = "there are no modules with state: parts of a model are model.blocks[0].attn and the like"
_DTYPE = 'use model = model.to("bfloat16"), or "float16", "float32"'
_ENCODERS = "tljax has decoders only"
_BRIDGE = "use tljax.HookedTransformer, which understands the bridge's hook names"
_LOADED = "it is an argument of loading, not a field"

MODEL = {
    "add_caching_hooks": _CACHE,
    "apply": _VALUE,
    "backward": _GRADIENT,
    "bfloat16": _DTYPE,
    "cache_all": _CACHE,
    "cache_some": _CACHE,
    "center_unembed": _PROCESS,
    "center_writing_weights": _PROCESS,
    "check_and_add_hook": "names are checked whenever a hook is added: use model = model.add_hook(name, hook)",
    "check_hooks_to_add": "names are checked whenever a hook is added: use model = model.add_hook(name, hook)",
    "children": _VALUE,
    "clear_contexts": "hooks have no context to clear: keep state in a closure or an object of your own",
    "cpu": 'use model = model.to("cpu")',
    "cuda": 'use model = model.to("gpu")',
    "dataset": "nothing here downloads data: use datasets.load_dataset",
    "device": "arrays know where they are: jax.tree.leaves(model.params)[0].devices()",
    "dtype": "use model.cfg.dtype",
    "eval": "there is no dropout and no training mode: a model always evaluates",
    "fill_missing_keys": "a parameter that is missing is an error: load a whole checkpoint",
    "float": _DTYPE,
    "fold_layer_norm": _PROCESS,
    "fold_value_biases": _PROCESS,
    "get_caching_hooks": _CACHE,
    "get_pos_offset": "positions come from the prompt's mask: use model.to_batch(prompts)",
    "get_residual": "use model.input_to_embed(tokens)",
    "half": _DTYPE,
    "hook_dict": _LIST_POINTS,
    "hook_embed": 'hook points are names, not parts: use model = model.add_hook("hook_embed", hook)',
    "hook_pos_embed": 'hook points are names, not parts: use model = model.add_hook("hook_pos_embed", hook)',
    "init_weights": "use HookedTransformer(cfg.replace(seed=1)), which draws them",
    "load_and_process_state_dict": "write a checkpoint and load it with HookedTransformer.from_pretrained(directory)",
    "load_sample_training_dataset": "nothing here downloads data: use datasets.load_dataset",
    "mod_dict": _LIST_POINTS,
    "modules": _VALUE,
    "move_model_modules_to_device": "use model = model.to(device)",
    "mps": 'use model = model.to("gpu") where jax has such a device',
    "named_modules": _VALUE,
    "named_parameters": "use jax.tree_util.tree_leaves_with_path(model.params)",
    "parameters": "use jax.tree.leaves(model.params)",
    "process_weights_": "use model = model.process_weights(fold_ln=True); a model does not change in place",
    "refactor_factored_attn_matrices": _PROCESS,
    "register_backward_hook": "use model = model.add_hook(name, hook, dir='bwd')",
    "register_forward_hook": "use model = model.add_hook(name, hook)",
    "remove_all_hook_fns": "use model = model.reset_hooks()",
    "requires_grad_": _GRADIENT,
    "sample_datapoint": "nothing here downloads data: use datasets.load_dataset",
    "set_use_hook_tokens": "name hook_tokens in a hook or a filter: that is enough",
    "setup": "hook points need no setup: " + _LIST_POINTS,
    "state_dict": "the parameters are model.params, nested dicts; model.save_pretrained(directory) writes them",
    "train": "there is no dropout and no training mode: to train, tljax.train.train(model, batches, config)",
    "zero_grad": _GRADIENT,
}
CACHE = {
    "compute_ssm_effective_attention": "tljax has no state-space models",
    "compute_ssm_state": "tljax has no state-space models",
    "cpu": 'use cache = cache.to("cpu")',
    "cuda": 'use cache = cache.to("gpu")',
    "detach": "nothing is recorded unless jax.grad runs: leave it out",
    "ssm_layers": "tljax has no state-space models",
    "toggle_autodiff": _GRADIENT,
    "update": "a cache does not change: use cache.with_activations({**cache, name: value})",
}
MATRIX = {
    "cpu": "arrays know where they are: use jax.device_put(f, device)",
    "cuda": "arrays know where they are: use jax.device_put(f, device)",
    "detach": "nothing is recorded unless jax.grad runs: leave it out",
    "to": "use jax.device_put(f, device), or FactoredMatrix(f.A.astype(dtype), f.B.astype(dtype))",
    "transpose": "use f.T, which swaps rows and columns and leaves leading axes",
}
CONFIG = {
    "checkpoint_index": _LOADED,
    "checkpoint_label_type": _LOADED,
    "checkpoint_value": _LOADED,
    "decoder_start_token_id": _ENCODERS,
    "device": "arrays know where they are: jax.tree.leaves(model.params)[0].devices(); move with model.to(device)",
    "from_checkpoint": _LOADED,
    "is_layer_norm_activation": "use cfg.act_fn == 'solu_ln'",
    "layer_norm_folding": "use cfg.normalization_type and cfg.weight_processing",
    "load_in_4bit": "weights are computed with as floats; published quantised checkpoints are read by themselves",
    "n_devices": "give loading a sharding: from_pretrained(..., device=sharding)",
    "quantization_method": "published quantised checkpoints are read by themselves",
    "relative_attention_max_distance": _ENCODERS,
    "relative_attention_num_buckets": _ENCODERS,
    "set_seed_everywhere": "nothing is global: use cfg.replace(seed=1)",
    "tie_word_embeddings": "parameters are never tied: compare model.W_E with model.W_U",
    "to": "a config has no device: use cfg.replace(dtype='bfloat16'), or model.to(device)",
    "trust_remote_code": "no code of others is run",
    "ungroup_grouped_query_attention": "hook_k and hook_v keep the key/value heads; model.W_K repeats them",
    "use_logn_attn": "no architecture here has it",
    "uses_rms_norm": "use cfg.normalization_type in ('RMS', 'RMSPre')",
}
POINT = {
    "add_hook": "a hook point is only what a hook is told: use model = model.add_hook(hook.name, function)",
    "add_perma_hook": "a hook point is only what a hook is told: use model = model.add_perma_hook(hook.name, function)",
    "clear_context": "hooks have no context: keep state in a closure or an object of your own",
    "ctx": "hooks have no context: keep state in a closure or an object of your own",
    "enable_reshape": "a hook gets the activation in its own shape: reshape it there",
    "has_hooks": "use model.list_hooks()",
    "remove_hooks": "use model = model.remove_hook(hook.name)",
}
PACKAGE = {
    "BertNextSentencePrediction": _ENCODERS,
    "HookedAudioEncoder": _ENCODERS,
    "HookedEncoder": _ENCODERS,
    "HookedEncoderDecoder": _ENCODERS,
    "HookedRootModule": "use tljax.hook in a Flax module, and tljax.run_module_with_hooks",
    "ProcessWeights": "use tljax.weights.process_weights(model.params, cfg, ...)",
    "SVDInterpreter": "use tljax.analysis.svd_interpreter.SVDInterpreter",
    "TransformerBridge": _BRIDGE,
    "TransformerBridgeConfig": _BRIDGE,
    "components": "use tljax.modules; of a model, model.blocks[0].attn",
    "evals": "use tljax.analysis.evals",
    "head_detector": "use tljax.analysis.head_detector",
    "hook_points": "use tljax.HookPoint, tljax.hook",
    "loading": "use tljax.checkpoints",
    "loading_from_pretrained": "use tljax.checkpoints",
    "model_bridge": _BRIDGE,
    "pretrained": "use tljax.checkpoints",
    "supported_models": "docs/models.md lists them",
    "tools": "use tljax.analysis",
    "weight_processing": "use tljax.weights",
}
UTILS = {
    "LocallyOverridenDefaults": "a model does not change: pass prepend_bos= and padding_side= to the call itself",
    "check_structure": "compare with numpy",
    "clear_huggingface_cache": "use huggingface_hub.scan_cache_dir",
    "download_file_from_hf": "use huggingface_hub.hf_hub_download",
    "get_dataset": "nothing here downloads data: use datasets.load_dataset, and utils.tokenize_and_concatenate",
    "get_device": "use jax.devices()[0]",
    "get_nested_attr": "use operator.attrgetter",
    "keep_single_column": "pass column_name= to utils.tokenize_and_concatenate",
    "move_to_and_update_config": "use model = model.to(device)",
    "override_or_use_default_value": "write default if value is None else value",
    "print_gpu_mem": "use jax.devices()[0].memory_stats()",
    "set_nested_attr": "a model does not change: use model.replace(params=...)",
    "temporarily_swap_parameter": "a model does not change: use model.replace(params=...)",
    "warn_if_mps": "there is nothing to warn of",
}
ALL = {"model": MODEL, "cache": CACHE, "f": MATRIX, "cfg": CONFIG, "hook": POINT, "tljax": PACKAGE, "utils": UTILS}
"""The tables, by the object whose missing attributes they list."""


def missing(owner: str, name: str, instead: Mapping[str, str], known: list[str]) -> MissingAttributeError:
    """Returns the error for a missing attribute: it says what to write instead, or the nearest name.

    Args:
        owner: the object that lacks the attribute, for the message.
        name: the missing name.
        instead: one of this module's tables.
        known: the names that the object has.
    """
    if name in instead:
        text = f"{owner} has no {name}: {instead[name]}."
    else:
        text = f"{owner} has no attribute {name!r}.{nearest(name, [one for one in known if one[0] != '_'])}"
    return MissingAttributeError(text, name=name)


class SaysWhatInstead:
    """Base class whose missing attributes say what to write instead; ``hasattr`` and ``getattr`` defaults work."""

    _instead: ClassVar[Mapping[str, str]] = {}

    def __getattr__(self, name: str) -> Any:
        if any(name in vars(cls) for cls in type(self).__mro__):
            return object.__getattribute__(self, name)  # a property that raised AttributeError: let it say why
        if name.startswith("_"):  # protocols of Python and NumPy, looked up often
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        raise missing(type(self).__name__, name, self._instead, dir(self))
