"""MiniVOC, the drawn data set, and the recipe of MiniCLIP."""
