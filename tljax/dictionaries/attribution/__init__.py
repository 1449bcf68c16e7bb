"""Effects of features on a metric, feature circuits, and directions of features in the logits."""
