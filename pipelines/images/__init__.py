"""Encoded bytes -> uint8 pixels, or the status that says why not, in a process that may crash."""
