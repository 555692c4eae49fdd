"""An engine's process, seen from the bench."""

from __future__ import annotations

import json
import os
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from pathlib import Path
from typing import Any

from serving_bench.workload import Trace, Workload

FOLDER = Path(__file__).parents[1]


class EngineProcessError(RuntimeError):
    """An engine cannot be started, or has died."""


class EngineProcess:
    """One engine in a process and Python environment of its own.

    Args:
        name: a module of `serving_bench.engines`.
        python: interpreter of its environment.
        job: what the engine needs to know.
        log: file that takes everything the engine prints.
        environ: variables set for it alone.
        timeout: seconds that a start or a run may take.

    Raises:
        EngineProcessError: it cannot be started.
    """

    def __init__(
        self,
        name: str,
        python: str,
        job: dict[str, Any],
        log: Path,
        environ: dict[str, str],
        timeout: float,
    ) -> None:
        self._log, self._timeout = log, timeout
        self._reader = ThreadPoolExecutor(1)
        began = time.monotonic()
        try:
            with log.open("w") as stderr:
                self._process = subprocess.Popen(
                    [python, "-m", "serving_bench.host", name],
                    cwd=FOLDER,
                    env={**os.environ, **environ},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=stderr,
                    text=True,
                )
        except OSError as error:
            raise EngineProcessError(f"{python} cannot be run: {error}") from error
        answer = self._ask(json.dumps(job))
        self.start_s = time.monotonic() - began
        self.ready_mb: float = answer["ready_mb"]
        self.version: str = answer["version"]

    def run(self, load: Workload) -> tuple[list[Trace], float]:
        """Traces of a workload, and the peak memory in MB while it ran.

        Raises:
            EngineProcessError: the engine has failed; it is of no use any more.
        """
        answer = self._ask(load.dump())
        return [Trace(**trace) for trace in answer["traces"]], answer["peak_mb"]

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            self._process.wait(60)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._reader.shutdown()

    def _ask(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
            text = self._reader.submit(self._process.stdout.readline).result(self._timeout)
            answer: dict[str, Any] = json.loads(text)
        except TimeoutError:
            self._process.kill()
            answer = {"error": f"no answer in {self._timeout:.0f} s"}
        except (OSError, ValueError):
            answer = {"error": "its process ended without an answer"}
        if "error" in answer:
            self.close()
            raise EngineProcessError(f"{answer['error']} (see {self._log})")
        return answer
