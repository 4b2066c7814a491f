"""`python -m jobs COMMAND …` is the console script `iab-vision`."""

import sys

from jobs.cli import main

sys.exit(main())
