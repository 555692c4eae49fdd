"""Puts this process and what it starts into the environment that `chameleon serve` gives Serve.

To be imported before Ray is, which reads it then.
"""

from __future__ import annotations

import os

from deploy.environment import SETTINGS

os.environ.update(SETTINGS)
