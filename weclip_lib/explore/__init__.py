"""Interactive explorers, and the stages that they show."""
