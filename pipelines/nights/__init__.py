"""Two inventories and a history -> what to do tonight, and what it means."""
