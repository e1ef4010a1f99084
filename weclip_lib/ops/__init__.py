"""Tensor maths of the method. It needs no weights, no data and no disk."""
