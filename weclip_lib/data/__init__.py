"""Data sets: their layouts, their checks, and how they are fetched."""
