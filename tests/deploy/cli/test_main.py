"""What holds for every command."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import typer

from deploy.cli import app

HEAVY = ("torch", "ray", "transformers", "numpy", "faiss", "fastapi")
ROOT_COMMAND = typer.main.get_command(app)


def commands(group: object, words: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every command by its words, groups too."""
    found = [words]
    for name, one in getattr(group, "commands", {}).items():
        found += commands(one, (*words, name))
    return found


@pytest.mark.parametrize("words", commands(ROOT_COMMAND), ids=" ".join)
def test_every_command_has_help_for_all_its_options(chameleon, words: tuple[str, ...]) -> None:
    result = chameleon(*words, "--help")
    assert result.exit_code == 0
    command = ROOT_COMMAND
    for word in words:
        command = command.commands[word]
    assert command.help
    for parameter in command.params:
        assert getattr(parameter, "help", None), f"{words}: {parameter.name}"


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from deploy.cli import app\n"
        "from training.terminal import run\n"
        f"run(app, 'chameleon', sys.argv[1:])\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    for words in ([], ["train", "--help"]):
        command = [sys.executable, "-c", code, *words]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert "Usage: chameleon" in out and out.splitlines()[-1] == "[]"


def test_wrong_usage_says_what_is_missing(chameleon) -> None:
    result = chameleon("train", "--config", "x.yaml")
    assert result.exit_code == 2 and "--data" in result.stderr


def test_the_training_commands_are_those_of_the_module() -> None:
    command = [sys.executable, "-m", "training", "--help"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for name in ("train", "evaluate", "data", "seeds", "reproduce-paper"):
        assert name in out and (name,) in commands(ROOT_COMMAND)


def test_version(chameleon) -> None:
    assert chameleon("version").stdout.startswith("chameleon-llm ")
    assert "ray" in json.loads(chameleon("version", "--json").stdout)


def test_completion_can_be_installed(chameleon) -> None:
    assert "--install-completion" in chameleon("--help").stdout
