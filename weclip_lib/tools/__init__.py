"""What a step costs, and the notebooks as a site."""
