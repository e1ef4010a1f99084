"""The package reads files or refuses them by name, and writes them whole."""
