"""Files: read or refused by name, and written whole."""
