"""URIs -> bytes: many at once, politely, bounded in memory."""
