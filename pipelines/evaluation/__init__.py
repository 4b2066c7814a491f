"""Scores and truth -> numbers, thresholds, report."""
