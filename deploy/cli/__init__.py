"""`chameleon`: the command line of the whole project. One file a group of commands.

Nothing here imports torch, Ray or transformers before a command needs them.
"""

from __future__ import annotations

import sys
from typing import NoReturn

from deploy.cli import bench, bundle, chat, clusters, doctor, keys, model, openapi, serve, version
from training.cli import app as training_app
from training.terminal import command_line, run

app = command_line(
    "Serve a language model that adapts to its traffic, and train what adapts it.",
    completion=True,
)
_SERVE, _CALL = "Serve", "Call a running service"
_BUNDLES, _HERE = "Bundles and models", "This installation"

app.command(rich_help_panel=_SERVE)(serve.serve)
app.add_typer(keys.app, name="keys", rich_help_panel=_SERVE)
app.command(rich_help_panel=_CALL)(chat.chat)
app.command(rich_help_panel=_CALL)(clusters.clusters)
app.command(rich_help_panel=_CALL)(bench.bench)
app.add_typer(training_app)
app.add_typer(bundle.app, name="bundle", rich_help_panel=_BUNDLES)
app.add_typer(model.app, name="model", rich_help_panel=_BUNDLES)
app.command(rich_help_panel=_HERE)(doctor.doctor)
app.command(rich_help_panel=_HERE)(openapi.openapi)
app.command(rich_help_panel=_HERE)(version.version)


def main() -> NoReturn:
    """Run the process's command line."""
    sys.exit(run(app, "chameleon"))
