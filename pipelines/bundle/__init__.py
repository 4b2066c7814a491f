"""A released model: open, verify, run, label."""
