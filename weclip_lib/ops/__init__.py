"""Tensor maths of the method: no weights, no data, no disk."""
