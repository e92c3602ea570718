"""`python -m moejax VERB`."""

import sys

from moejax.cli import main

sys.exit(main())
