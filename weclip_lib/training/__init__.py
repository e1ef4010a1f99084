"""The training loop, its sources of pictures, and checkpoints."""
