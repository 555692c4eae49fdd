"""`chameleon`: the command line of the whole project. One file a group of commands.

Nothing here imports torch, Ray or transformers before a command needs them.
"""

from __future__ import annotations

import sys
from typing import NoReturn

from deploy.cli import bundle, keys, model, version
from training.cli import app as training_app
from training.terminal import command_line, run

app = command_line(
    "Serve a language model that adapts to its traffic, and train what adapts it.",
    completion=True,
)
app.add_typer(training_app, rich_help_panel="Train")
app.add_typer(bundle.app, name="bundle", rich_help_panel="Bundles and models")
app.add_typer(model.app, name="model", rich_help_panel="Bundles and models")
app.add_typer(keys.app, name="keys", rich_help_panel="Serve")
app.command(rich_help_panel="This installation")(version.version)


def main() -> NoReturn:
    """Run the process's command line."""
    sys.exit(run(app, "chameleon"))
