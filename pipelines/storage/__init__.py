"""A folder named by a URI: read, atomic put, create-if-absent, list."""
