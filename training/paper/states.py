"""Final hidden states of the paper's padded sequences at a few positions, computed once.

Adapters reach only the LM head, so these are all that training and scoring need. Shards are named
by what determines them: an interrupted run goes on from where it stopped.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from cluster_router.wire.errors import SetupError
from training.features import Encoder


def draw_positions(count: int, length: int, drawn: int, seed: int = 0) -> torch.Tensor:
    """int64 [count, drawn + 1]: random positions that have a next token, then the last position."""
    random = torch.Generator().manual_seed(seed)
    drawn = min(drawn, length - 1)
    chosen = torch.rand(count, length - 1, generator=random).topk(drawn, dim=1).indices
    return torch.cat([chosen, torch.full((count, 1), length - 1)], dim=1)


@dataclass(frozen=True)
class StateCache:
    """A folder of shards.

    Args:
        folder: created where missing.
        base: fingerprint of the base model that `encode` runs.
        encode: the frozen model below its LM head.
        batch: sequences in one forward pass.
        shard: sequences in one shard.
    """

    folder: Path
    base: str
    encode: Encoder
    batch: int = 16
    shard: int = 64

    def states(self, sequences: torch.Tensor, positions: torch.Tensor, label: str) -> torch.Tensor:
        """Final hidden states bfloat16 [N, P, d].

        Args:
            sequences: int64 [N, T], padding included.
            positions: int64 [N, P].
            label: of the progress bar.

        Raises:
            SetupError: the folder cannot be written.
        """
        parts = []
        with tqdm(total=sequences.numel(), desc=label, unit="tok", unit_scale=True) as progress:
            for start in range(0, len(sequences), self.shard):
                rows = slice(start, start + self.shard)
                parts.append(self._shard(sequences[rows], positions[rows]))
                progress.update(sequences[rows].numel())
        return torch.cat(parts)

    def _shard(self, sequences: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        digest = hashlib.sha256(f"{self.base}/paper/bfloat16/{tuple(sequences.shape)}/".encode())
        digest.update(sequences.numpy().tobytes() + positions.numpy().tobytes())
        path = self.folder / f"{digest.hexdigest()[:32]}.safetensors"
        try:
            return load_file(path)["states"]
        except (OSError, SafetensorError, KeyError):
            states = self._compute(sequences, positions)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file({"states": states}, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)
        except (OSError, SafetensorError) as error:
            raise SetupError(
                f"cannot write the feature cache {self.folder}: {error}; "
                "free some space or name another folder with --cache"
            ) from error
        return states

    def _compute(self, sequences: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        parts = []
        for start in range(0, len(sequences), self.batch):
            tokens = sequences[start : start + self.batch]
            # As in the authors' code: token 0 is masked, padding is not.
            states = self.encode(tokens, (tokens != 0).long())
            index = positions[start : start + self.batch, :, None]
            parts.append(states.gather(1, index.expand(-1, -1, states.shape[-1])))
        return torch.cat(parts).to(torch.bfloat16)
