"""From a name to bytes: the hub and its names, which files, reading them lazily, replacing them whole."""
