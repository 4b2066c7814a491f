"""Labelled input -> classes, splits, decoded pixels."""
