"""Updates as vLLM takes them: folders in PEFT's format, which it loads by name."""

from __future__ import annotations

import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

from adapter_gen.export import export_peft, head_shift
from adapter_gen.update import LoraDelta, SharedBases, UpdateSpec
from cluster_router.wire.types import AdapterKey

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

ARGUMENT = "head_shift"
"""Under this name a request's extra arguments hold the path of its update's shift."""

FILE = "head_shift.safetensors"
TENSOR = "logits"
_WEIGHTS = "adapter_model.safetensors"


@dataclass
class Adapter:
    """An update in a folder.

    Attributes:
        number: vLLM's own id of it, never used again for another.
        folder: its files.
        shift: the file that holds what it adds to every logit; None where nothing is added.
        users: requests that run under it.
    """

    number: int
    folder: Path
    shift: Path | None
    users: int = 0

    def request(self) -> LoRARequest:
        """As vLLM is asked for it."""
        from vllm.lora.request import LoRARequest

        return LoRARequest(self.folder.name, self.number, str(self.folder))


class AdapterFolders:
    """The latest updates as folders; the least recently used that nobody runs under makes room.

    Updates in use are never removed, so there can be more than `capacity` for a while: vLLM reads
    an update again when it had to leave the device and is wanted once more.

    Attributes:
        loads: folders written since the start.
        evictions: of these, how many were removed to make room.

    Args:
        spec: form of the updates.
        bases: their shared parts.
        head_weight: float32 [vocab, hidden], weight of the LM head.
        with_shift: whether the shift of the final hidden state is applied by `HeadShift`.
        capacity: folders kept.
        forget: told the number of an update that is removed.
    """

    def __init__(
        self,
        spec: UpdateSpec,
        bases: SharedBases,
        head_weight: torch.Tensor,
        with_shift: bool,
        capacity: int,
        forget: Callable[[int], object],
    ) -> None:
        self._spec, self._bases, self._head = spec, bases, head_weight
        self._with_shift, self._capacity, self._forget = with_shift, capacity, forget
        self._root = tempfile.TemporaryDirectory(prefix="chameleon-updates-")
        self._held: OrderedDict[str, Adapter] = OrderedDict()
        self.loads = self.evictions = 0

    def __len__(self) -> int:
        return len(self._held)

    def blank(self) -> Adapter:
        """One that changes nothing, kept until `close`."""
        static = LoraDelta.static(AdapterKey("", "", None, 0), self._spec)
        adapter = self._write(static)
        weights = adapter.folder / _WEIGHTS
        zeros = {name: torch.zeros_like(one) for name, one in load_file(weights).items()}
        save_file(zeros, weights)
        return replace(adapter, shift=None)

    def acquire(self, delta: LoraDelta) -> Adapter:
        """The folder of `delta`, written if needed, and kept until it is released.

        Raises:
            DeltaError: `delta` does not fit the form of the updates.
        """
        name = delta.key.id
        if name not in self._held:
            self._held[name] = self._write(delta)
        self._held.move_to_end(name)
        adapter = self._held[name]
        adapter.users += 1
        self._make_room()
        return adapter

    def release(self, adapter: Adapter) -> None:
        """Undo one `acquire`."""
        adapter.users -= 1
        self._make_room()

    def close(self) -> None:
        """Remove every folder."""
        self._root.cleanup()

    @property
    def users(self) -> int:
        """Requests that run under any of the updates."""
        return sum(one.users for one in self._held.values())

    def _make_room(self) -> None:
        idle = [name for name, one in self._held.items() if not one.users]
        for name in idle[: max(0, len(self._held) - self._capacity)]:
            adapter = self._held.pop(name)
            self.evictions += 1
            self._forget(adapter.number)
            shutil.rmtree(adapter.folder)

    def _write(self, delta: LoraDelta) -> Adapter:
        files = export_peft(delta, self._spec, self._bases, "base", self._head, form="plain")
        self.loads += 1
        folder = Path(self._root.name) / f"{delta.key.id}-{self.loads}"
        folder.mkdir()
        for name, data in files.items():
            (folder / name).write_bytes(data)
        shift = None
        if self._with_shift:
            logits = head_shift(delta, self._spec, self._bases, self._head)
            if logits is not None:
                shift = folder / FILE
                save_file({TENSOR: logits}, shift)
        return Adapter(self.loads, folder, shift)
