"""What made the bundled dictionary ``tljax-tiny-res``: its activations, its training, its evaluation."""
