"""The formats a checkpoint may have: Hugging Face, tljax's own, TransformerLens's, adapters, packed weights, memory."""
