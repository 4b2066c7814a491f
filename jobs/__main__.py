"""`python -m jobs COMMAND …` is the console script `iab-vision`."""

from jobs.cli import entry

entry()
