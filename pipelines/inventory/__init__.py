"""Any accepted input -> the frozen plan."""
