"""Fine-tuning a LoRA on one cluster's documents: what a generated update stands in for.

`head`: U, V, the core and the shift, from an update of zero, with AdamW on the documents'
hidden states, which are computed once. Stopped early on a quarter of the documents. Counted are
the hidden states of the training documents and the steps up to the best one; neither validation nor
the steps that early stopping needs to be sure, although whoever tunes has to pay for them.

`full`: a LoRA of PEFT on every linear of the blocks, AdamW, whole documents; as many steps as
transformers' own defaults make of the documents (three epochs, batches of eight). Some of them are
run and timed, the rest is counted at their median. PEFT comes with the `test` extra.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments

from adapter_gen.apply import apply_head
from adapter_gen.bundle import Bundle
from adapter_gen.nll import head_nll
from adapter_gen.update import HEAD, SharedBases, UpdateSpec
from training.data import Window

EPOCHS = int(TrainingArguments.num_train_epochs)
BATCH = TrainingArguments.per_device_train_batch_size
MICRO_BATCH = 2  # documents whose logits are held at one time
HEAD_RATE, FULL_RATE = 1e-3, 2e-4
ROWS = 512  # tokens in one step at depth head
EVERY, PATIENCE = 5, 3  # steps between validations; validations without gain before the stop


@dataclass(frozen=True)
class Support:
    """A cluster's documents: to train on, and to stop by."""

    train: list[Window]
    held_out: list[Window]

    @classmethod
    def of(cls, windows: Sequence[Window]) -> Support:
        """Hold out every fourth."""
        held_out = list(windows[::4])
        return cls([w for i, w in enumerate(windows) if i % 4], held_out)


@dataclass(frozen=True)
class Cost:
    """Seconds to fine-tune, `how` they came about, and the held-out loss where it was measured."""

    seconds: float
    steps: int
    how: str
    parts: dict[str, float]
    loss: tuple[float, float] | None = None


class Clock:
    """Seconds since it was made or last read, with the device's work done."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last = self._now()

    def lap(self) -> float:
        """Seconds since the last reading."""
        last, self._last = self._last, self._now()
        return self._last - last

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


@torch.no_grad()
def hidden_states(model: PreTrainedModel, windows: Sequence[Window]) -> tuple[Tensor, Tensor]:
    """Final hidden states [n, d] of all documents, and the tokens int64 [n] that they predict."""
    states, targets = [], []
    for window in windows:
        tokens = torch.from_numpy(window.tokens.astype(np.int64)).to(model.device)
        found = model.get_decoder()(input_ids=tokens[None], use_cache=False).last_hidden_state
        states.append(found[0, :-1])
        targets.append(tokens[1:])
    return torch.cat(states), torch.cat(targets)


def tune_head(model: PreTrainedModel, bundle: Bundle, support: Support, limit: int) -> Cost:
    """Fine-tune at depth `head`, `limit` steps at most; see the top of this file."""
    clock = Clock(model.device)
    states, targets = hidden_states(model, support.train)
    encoding = clock.lap()
    held_out = hidden_states(model, support.held_out)
    weight = model.get_output_embeddings().weight.detach()
    names = ("u", "v", "s0", "shift")
    start = (bundle.bases.u[-1], bundle.bases.v[-1], bundle.bases.s0, bundle.bases.shift)
    values = [one.detach().clone().to(model.device).requires_grad_() for one in start]
    parts = dict(zip(names, values, strict=True))
    optimiser = torch.optim.AdamW(values, lr=HEAD_RATE, weight_decay=0.01)
    random = torch.Generator().manual_seed(0)
    first = best = head_loss(parts, *held_out, weight)
    stepping = at_best = 0.0
    step = best_step = wasted = 0
    while step < limit and wasted < PATIENCE:
        clock.lap()
        for _ in range(EVERY):
            rows = torch.randint(len(states), (ROWS,), generator=random).to(model.device)
            optimiser.zero_grad()
            nll(parts, states[rows], targets[rows], weight).mean().backward()
            torch.nn.utils.clip_grad_norm_(values, 1.0)
            optimiser.step()
        step += EVERY
        stepping += clock.lap()
        loss = head_loss(parts, *held_out, weight)
        wasted += 1
        if loss < best:
            best, best_step, at_best, wasted = loss, step, stepping, 0
    how = (
        f"AdamW {HEAD_RATE}, {ROWS} tokens a step, best after {best_step} of {step} steps, "
        f"held-out loss {first:.4f} -> {best:.4f}; counted: {encoding:.2f} s for hidden states and "
        f"{at_best:.2f} s of steps, without validation and patience"
    )
    timed = {"encoding": encoding, "to_best": at_best, "all_steps": stepping}
    return Cost(encoding + at_best, best_step, how, timed, (first, best))


def nll(parts: dict[str, Tensor], states: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    """Losses [n] under a trainable head update."""
    bases = SharedBases((parts["u"],), (parts["v"],), parts["s0"], parts["shift"])
    return head_nll(apply_head(states.float(), bases).to(weight.dtype), weight, targets)


@torch.no_grad()
def head_loss(parts: dict[str, Tensor], states: Tensor, targets: Tensor, weight: Tensor) -> float:
    """Mean loss."""
    return float(nll(parts, states, targets, weight).mean())


def tune_full(model: PreTrainedModel, spec: UpdateSpec, support: Support, timed: int) -> Cost:
    """Fine-tune at depth `full`; `timed` steps are run after a warm-up, 0 for all of them."""
    names = [site.name for site in spec.sites if site.name != HEAD]
    config = LoraConfig(task_type="CAUSAL_LM", r=spec.rank, target_modules=names)
    tuned = get_peft_model(model, config).train()
    trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=FULL_RATE)
    steps = EPOCHS * math.ceil(len(support.train) / BATCH)
    order = np.random.default_rng(0)
    took, clock = [], Clock(model.device)
    for _ in range((timed or steps) + 1):
        batch = order.choice(len(support.train), min(BATCH, len(support.train)), replace=False)
        optimiser.zero_grad()
        for at in range(0, len(batch), MICRO_BATCH):
            chosen = [support.train[i] for i in batch[at : at + MICRO_BATCH]]
            (document_loss(tuned, chosen) * len(chosen) / len(batch)).backward()
        optimiser.step()
        took.append(clock.lap())
    tuned.unload()
    seconds = statistics.median(took[1:])
    how = (
        f"PEFT LoRA of rank {spec.rank} on {len(names)} linears, AdamW, {EPOCHS} epochs in batches "
        f"of {BATCH}: {steps} steps at {seconds:.2f} s, the median of {len(took) - 1} steps run "
        f"({min(took[1:]):.2f} to {max(took[1:]):.2f})"
    )
    return Cost(steps * seconds, steps, how, {"step": seconds})


def document_loss(model: torch.nn.Module, windows: Sequence[Window]) -> Tensor:
    """Mean next-token loss of a few documents, padded on the right."""
    device = next(model.parameters()).device
    rows = [torch.from_numpy(window.tokens.astype(np.int64)) for window in windows]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
    length = torch.tensor([len(row) for row in rows], device=device)
    mask = torch.arange(tokens.shape[1], device=device) < length[:, None]
    labels = tokens.masked_fill(~mask, -100)
    loss: Tensor = model(input_ids=tokens, attention_mask=mask.long(), labels=labels).loss
    return loss
