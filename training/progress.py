"""How far a stage is: steps and tokens a second, time left, losses."""

from __future__ import annotations

import time
from types import TracebackType

from tqdm import tqdm


class Progress:
    """A progress bar over steps, on standard error.

    Args:
        name: of the stage.
        steps: of the whole stage.
        done: steps taken before, by the run that this one goes on from.
        shown: whether this worker shows it.
    """

    def __init__(self, name: str, steps: int, done: int, shown: bool) -> None:
        self._bar = tqdm(total=steps, initial=done, desc=name, unit="step", disable=not shown)
        self._start = time.monotonic()
        self._tokens = 0
        self._figures: dict[str, str] = {}

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()

    def step(self, tokens: int) -> None:
        """One more step, over `tokens` scored tokens."""
        self._tokens += tokens
        rate = self._tokens / max(1e-9, time.monotonic() - self._start)
        self._bar.set_postfix({"tokens/s": f"{rate:,.0f}", **self._figures}, refresh=False)
        self._bar.update()

    def show(self, **figures: float) -> None:
        """Show these figures from now on."""
        self._figures = {name: f"{value:.4f}" for name, value in figures.items()}
