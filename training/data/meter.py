"""A progress bar over documents that also tells a rate of what is in them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

_DELAY = 2.0
"""Seconds; what is done sooner shows no bar."""


@contextmanager
def meter(
    label: str, documents: int, unit: str, delay: float = _DELAY
) -> Iterator[Callable[[int], None]]:
    """Count `documents` documents with the time left; call what it gives once for each.

    The argument of that call is how many of `unit` (tokens, characters) the document had.
    """
    amount = 0
    start = time.monotonic()
    with tqdm(total=documents, desc=label, unit="doc", unit_scale=True, delay=delay) as bar:

        def advance(more: int) -> None:
            nonlocal amount
            amount += more
            rate = amount / max(time.monotonic() - start, 1e-6)
            bar.set_postfix_str(f"{tqdm.format_sizeof(rate)}{unit}/s", refresh=False)
            bar.update()

        yield advance
