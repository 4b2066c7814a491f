"""Which rows count: parts, resume, publish, verify; exactly once."""
