"""What runs on the workers: bytes to pixels, pixels to labels, labels to tables; and training."""
