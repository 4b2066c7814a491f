"""The IAB's tables of categories -> nodes, paths, names, and the mapping between versions."""
