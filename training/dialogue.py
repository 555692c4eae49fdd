"""Documents that are a question and an answer, as windows in the model's chat format.

A static update trained on running text alone unlearns the chat format of an instruct model. The
template's own words are context or are scored as the model's turn ends, as they will be served.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from training.data import Window


@dataclass(frozen=True)
class DialogueCutter:
    """Rewrites windows of dialogue domains.

    Args:
        tokenizer: a transformers tokenizer; without a chat template nothing is rewritten.
        separators: domain -> what stands between question and answer.
        share: of a domain's windows that are rewritten.
        size: most tokens in a window.
    """

    tokenizer: Any
    separators: Mapping[str, str]
    share: float
    size: int

    def rewrite(self, windows: Sequence[Window]) -> list[Window]:
        """`windows` with some of them in the chat format, order kept."""
        if not self.tokenizer.chat_template:
            return list(windows)
        rewritten, seen = [], dict.fromkeys(self.separators, 0)
        for window in windows:
            separator = self.separators.get(window.domain)
            taken = False
            if separator is not None:
                seen[window.domain] += 1
                count = seen[window.domain]
                # Every window by which the share of those so far reaches the next whole number.
                taken = int(count * self.share) > int((count - 1) * self.share)
            found = self._dialogue(window, separator) if separator is not None and taken else None
            rewritten.append(window if found is None else found)
        return rewritten

    def _dialogue(self, window: Window, separator: str) -> Window | None:
        text = self.tokenizer.decode(window.tokens[window.lead :].tolist())
        question, _, answer = text.partition(separator)
        if not question.strip() or not answer.strip():
            return None
        turns = [{"role": "user", "content": question.strip()}]
        prompt = self._tokens(turns, add_generation_prompt=True)
        whole = self._tokens([*turns, {"role": "assistant", "content": answer.strip()}])
        if whole[: len(prompt)] != prompt or len(prompt) >= self.size:
            return None
        tokens = whole[: self.size]
        scored = self.tokenizer.decode(tokens[len(prompt) :])
        return Window(np.array(tokens, np.int32), len(prompt), window.domain, len(scored.encode()))

    def _tokens(
        self, turns: list[dict[str, str]], add_generation_prompt: bool = False
    ) -> list[int]:
        text = self.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids
