"""`chameleon serve`: `serve run` with the config checked first, and told when it is ready."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from training.terminal import FAILED

if TYPE_CHECKING:
    from deploy.serving import ServeConfig

SHIPPED = Path(__file__).parents[1] / "config.yaml"
_POLL_S = 0.5


def serve(
    config: Annotated[
        Path | None, typer.Argument(help="Config of Ray Serve (default: deploy/config.yaml).")
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on; 0.0.0.0 serves other machines.")
    ] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port to listen on.")] = None,
    model: Annotated[str | None, typer.Option(help="Base model in place of the config's.")] = None,
    bundle: Annotated[
        str | None, typer.Option(help="Bundle in place of the config's; none serves unadapted.")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(envvar="RAY_ADDRESS", help="Ray cluster to run on (default: one of its own)."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Check config, model and bundle; start nothing.")
    ] = False,
) -> None:
    """Serve a model until Ctrl-C.

    The config is checked first. Options replace what it says; the same file runs under
    `serve run` and `serve deploy` of Ray itself.
    """
    from deploy.serving import Overrides, check_parts, check_port, read_config

    path = config or SHIPPED
    found = read_config(path, Overrides(host, port, model, bundle))
    served = check_parts(found)
    typer.echo(f"{path}: {served}", err=True)
    if check:
        return
    if address is None:
        check_port(found.host, found.port)
    with tempfile.TemporaryDirectory(prefix="chameleon-") as folder:
        _run(_written(found, Path(folder)), found, address)


def _written(config: ServeConfig, folder: Path) -> Path:
    import yaml

    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config.document, sort_keys=False), encoding="utf-8")
    return path


def _run(path: Path, config: ServeConfig, address: str | None) -> None:
    """Ray's own `serve run`, in this process, watched from a thread."""
    from ray.serve.scripts import run

    # Whoever starts this in the background of a script has it ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    watcher = _Watcher(config)
    watcher.start()
    words = [str(path), *(["--address", address] if address else [])]
    try:
        run.main(args=words, standalone_mode=False)
    except SystemExit as end:
        if end.code:
            raise
    finally:
        watcher.ended.set()
    if watcher.failure is not None:
        typer.echo(f"error: {watcher.failure}", err=True)
        raise typer.Exit(FAILED)


class _Watcher(threading.Thread):
    """Tells when the application is ready, or ends the process in order when it cannot be.

    Attributes:
        ended: set it to end the watch.
        failure: why the application cannot start, None if it can.
    """

    def __init__(self, config: ServeConfig) -> None:
        super().__init__(daemon=True, name="chameleon-serve-watcher")
        self.ended = threading.Event()
        self.failure: str | None = None
        self._config = config
        self._began = time.monotonic()

    def run(self) -> None:
        """Look every half second."""
        from tqdm import tqdm

        with tqdm(desc="starting", unit=" parts", leave=False, disable=None) as bar:
            while not self.ended.wait(_POLL_S):
                if self._ready():
                    break
                self.failure = self._look(bar)
                if self.failure is not None:
                    os.kill(os.getpid(), signal.SIGINT)  # as Ctrl-C: `serve run` shuts down
                    return
        if not self.ended.is_set():
            self._tell()

    def _ready(self) -> bool:
        import httpx

        try:
            return httpx.get(f"{self._config.url}/ready", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    def _look(self, bar: object) -> str | None:
        """Show how far the start has come; why it failed, if it did."""
        import ray
        from ray import serve
        from ray.serve.exceptions import RayServeException

        if not ray.is_initialized():
            return None
        try:
            status = serve.status().applications.get(self._config.application)
        except (RayServeException, ray.exceptions.RayError):
            return None  # Serve itself is not there yet
        if status is None:
            return None
        parts = status.deployments
        waiting = [name for name, one in parts.items() if one.status != "HEALTHY"]
        bar.total, bar.n = len(parts), len(parts) - len(waiting)  # type: ignore[attr-defined]
        bar.set_postfix_str(", ".join(waiting))  # type: ignore[attr-defined]
        if status.status == "DEPLOY_FAILED":
            told = "; ".join(one.message for one in parts.values() if one.message)
            return f"the application cannot start: {told or status.message}"
        return None

    def _tell(self) -> None:
        url, name = self._config.url, self._config.settings.name
        where = "" if self._config.port == 8000 else f" --url {url}"
        typer.echo(
            f"ready at {url} after {time.monotonic() - self._began:.0f} s; Ctrl-C ends it\n"
            f"  chameleon chat{where}\n"
            f"  chameleon clusters --watch{where}\n"
            f"  curl -N {url}/v1/chat/completions -H 'Content-Type: application/json' -d "
            f'\'{{"model": "{name}", "stream": true, '
            '"messages": [{"role": "user", "content": "Hello"}]}\'',
            err=True,
        )
        sys.stderr.flush()
