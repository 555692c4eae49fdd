"""A frozen causal LM under updates: its final hidden states and its next-token losses."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from adapter_gen.apply import adapted, apply_head, apply_paper
from adapter_gen.hypernetwork import Generated
from adapter_gen.nll import head_nll
from adapter_gen.update import SharedBases, UpdateSpec


@dataclass(frozen=True, eq=False)
class ScoredTokens:
    """Token sequences and which of their tokens are scored.

    Attributes:
        tokens: int64 [B, T], padded on the right with any token.
        rows: int64 [n], the sequence of each scored token.
        places: int64 [n], its position there, at least 1; it is predicted from the one before.
    """

    tokens: Tensor
    rows: Tensor
    places: Tensor

    @classmethod
    def of(cls, sequences: list[Tensor], first: list[int]) -> ScoredTokens:
        """Pad int64 sequences; of each, the tokens from position `first` (at least 1) on count."""
        tokens = nn.utils.rnn.pad_sequence(sequences, batch_first=True)
        places = [
            torch.arange(start, len(sequence))
            for sequence, start in zip(sequences, first, strict=True)
        ]
        rows = [torch.full((len(part),), row) for row, part in enumerate(places)]
        return cls(tokens, torch.cat(rows), torch.cat(places))

    @property
    def targets(self) -> Tensor:
        """int64 [n], the scored tokens."""
        return self.tokens[self.rows, self.places]


class AdaptedLM:
    """Runs one frozen model under updates of one spec.

    The update is computed in the model's own data type, as it is when served.

    Args:
        model: a transformers causal LM, on any device.
        spec: which sites the updates act on.
    """

    def __init__(self, model: nn.Module, spec: UpdateSpec) -> None:
        self._model = model
        self._spec = spec
        self._decoder: Any = model.get_decoder()  # type: ignore[operator]
        self._head: Tensor = model.get_output_embeddings().weight  # type: ignore[operator]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._head.device

    def losses(
        self, batch: ScoredTokens, bases: SharedBases | None, generated: Generated | None = None
    ) -> Tensor:
        """Loss float32 [n] of each scored token, in nats; gradients reach bases and generated.

        Args:
            batch: what to score.
            bases: shared parts; None runs the model unadapted.
            generated: one update for all sequences, or one each; None is the static update.
        """
        tokens = batch.tokens.to(self.device)
        rows, places = batch.rows.to(self.device), batch.places.to(self.device) - 1
        targets = batch.targets.to(self.device)
        if bases is None:
            return head_nll(self._states(tokens)[rows, places], self._head, targets)
        bases = self._cast(bases)
        update = self._static() if generated is None else self._cast_generated(generated)
        with adapted(self._model, self._spec, bases, update):
            states = self._states(tokens)
        if self._spec.depth == "paper":
            return self._paper_losses(states, rows, places, targets, update)
        core = None if update.cores is None else update.cores[:, -1]
        states = apply_head(states, bases, core, update.shift)
        return head_nll(states[rows, places], self._head, targets)

    def _states(self, tokens: Tensor) -> Tensor:
        # Padding stands on the right of causal attention: no scored state can see it.
        states: Tensor = self._decoder(input_ids=tokens, use_cache=False).last_hidden_state
        return states

    def _paper_losses(
        self, states: Tensor, rows: Tensor, places: Tensor, targets: Tensor, update: Generated
    ) -> Tensor:
        assert update.lora_a is not None
        assert update.lora_b is not None
        losses = torch.empty(len(rows), device=states.device)
        for row in rows.unique().tolist():
            own = rows == row
            index = row if len(update.lora_a) > 1 else 0
            h = states[row, places[own]]
            logits = apply_paper(
                h, h @ self._head.T, update.lora_a[index], update.lora_b[index], self._spec.alpha
            )
            losses[own] = nn.functional.cross_entropy(
                logits.float(), targets[own], reduction="none"
            )
        return losses

    def _cast(self, bases: SharedBases) -> SharedBases:
        return SharedBases(
            u=tuple(self._to(u) for u in bases.u),
            v=tuple(self._to(v) for v in bases.v),
            s0=self._to(bases.s0),
            shift=self._to(bases.shift),
        )

    def _to(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self._head.dtype)

    def _cast_generated(self, generated: Generated) -> Generated:
        fields = {
            name: self._to(tensor)
            for name in ("cores", "shift", "lora_a", "lora_b")
            if (tensor := getattr(generated, name)) is not None
        }
        return replace(generated, **fields)

    def _static(self) -> Generated:
        spec, rank = self._spec, self._spec.rank
        place: dict[str, Any] = {"device": self.device, "dtype": self._head.dtype}
        if spec.depth == "paper":
            site = spec.sites[0]
            return Generated(
                lora_a=torch.zeros(1, rank, site.in_features, **place),
                lora_b=torch.zeros(1, site.out_features, rank, **place),
            )
        return Generated(cores=torch.zeros(1, len(spec.sites), rank, rank, **place))
