"""Cost of a step, and a site of notebooks."""
