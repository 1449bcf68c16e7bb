"""Checkpoints in and out: Hugging Face models and tljax's own format."""

from tljax.checkpoints.formats.array_parts import save_in_parts as save_in_parts
from tljax.checkpoints.formats.export import save_hf as save_hf
from tljax.checkpoints.formats.native import save_native as save_native
from tljax.checkpoints.loading import Loaded as Loaded
from tljax.checkpoints.loading import load_checkpoint as load_checkpoint
from tljax.checkpoints.loading import load_transformer_lens as load_transformer_lens
