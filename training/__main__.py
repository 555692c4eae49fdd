"""`python -m training`: the training commands of `chameleon`, without installing it."""

import sys

from training.cli import main

sys.exit(main())
