"""Studies: notebooks run headlessly, grids of runs, and published tables."""
