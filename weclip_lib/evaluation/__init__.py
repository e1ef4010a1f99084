"""Masks of pictures, scores of a split, and kinds of errors."""
