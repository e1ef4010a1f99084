"""The package knows the layouts of data sets, checks data sets, and fetches them."""
