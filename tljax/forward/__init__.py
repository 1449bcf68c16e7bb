"""The forward pass and its gradients: each stage one compiled program, with hooks and captures between."""
