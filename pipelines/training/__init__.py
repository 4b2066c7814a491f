"""A recipe and a dataset -> the best checkpoint."""
