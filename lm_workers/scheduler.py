"""Which tokens the next step computes.

Running sequences come first, one token each, so that no stream stalls; what is left of the step's
token budget goes to prompts. Waiting requests are queued by cluster. Clusters whose update is
resident go first, because a cold one costs a load and may push out a warm one; but a request that
has waited `max_wait_s` goes before them all, and nothing is admitted past it.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator

from cluster_router.wire.errors import OverloadedError
from lm_workers.adapters import OFF, AdapterBank
from lm_workers.config import EngineConfig
from lm_workers.kv_cache import BlockPool
from lm_workers.sequence import Batch, Sequence, Span, Status


class Scheduler:
    """Queues by cluster, admission, chunked prefill and preemption.

    Args:
        config: limits.
        pool: KV blocks.
        bank: resident updates; None serves the base model alone.
    """

    def __init__(self, config: EngineConfig, pool: BlockPool, bank: AdapterBank | None) -> None:
        self._config, self._pool, self._bank = config, pool, bank
        self.running: list[Sequence] = []
        self.queues: OrderedDict[str, deque[Sequence]] = OrderedDict()

    @property
    def num_waiting(self) -> int:
        """Requests in the queues."""
        return sum(len(queue) for queue in self.queues.values())

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.running or self.queues)

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence.

        Raises:
            OverloadedError: the queues are full.
        """
        if self.num_waiting >= self._config.max_queued:
            raise OverloadedError(f"{self.num_waiting} requests are waiting; try again shortly")
        self._queue(sequence).append(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and give back all it holds."""
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
            self._give_back(sequence)
        elif sequence.status is Status.WAITING:
            self._remove_waiting(sequence)
        sequence.status = Status.FINISHED

    def schedule(self, now: float) -> Batch:
        """Choose the next step's spans; empty when there is nothing to do."""
        spans: list[Span] = []
        budget = self._config.max_batch_tokens
        for sequence in sorted(self.running, key=lambda one: one.pending > 1):
            if sequence.status is not Status.RUNNING:
                continue  # preempted by one before it
            length = min(sequence.pending, budget)
            if length and self._make_room(sequence, length, spans):
                spans.append(self._span(sequence, length))
                budget -= length
        while budget and len(self.running) < self._config.max_sequences:
            admitted = self._admit(now, budget)
            if admitted is None:
                break
            spans.append(admitted)
            budget -= admitted.length
        return Batch(tuple(sorted(spans, key=lambda span: span.length > 1)))

    def check_integrity(self) -> None:
        """Assert that blocks, slots and queues agree with the sequences."""
        self._pool.check_integrity([sequence.blocks for sequence in self.running])
        if self._bank is not None:
            slots = [sequence.slot for sequence in self.running]
            self._bank.check_integrity([slot for slot in slots if slot is not None])
        assert all(sequence.status is Status.RUNNING for sequence in self.running)
        for name, queue in self.queues.items():
            assert queue, "an empty queue is kept"
            for sequence in queue:
                assert sequence.status is Status.WAITING and sequence.queue == name
                assert not sequence.blocks and sequence.slot is None and not sequence.computed

    def _span(self, sequence: Sequence, length: int) -> Span:
        stop = sequence.computed + length
        self._pool.extend(sequence.blocks, stop)
        return Span(sequence, sequence.computed, stop)

    def _make_room(self, sequence: Sequence, length: int, spans: list[Span]) -> bool:
        """Preempt the youngest until `sequence` can grow; False if it was preempted itself."""
        while not self._pool.can_extend(sequence.blocks, sequence.computed + length):
            youngest = max(self.running, key=lambda one: one.arrival)
            self._preempt(youngest)
            spans[:] = [span for span in spans if span.sequence is not youngest]
            if youngest is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._give_back(sequence)
        sequence.computed = 0
        sequence.preemptions += 1
        sequence.status = Status.WAITING
        self._queue(sequence).appendleft(sequence)

    def _give_back(self, sequence: Sequence) -> None:
        self._pool.release(sequence.blocks)
        if self._bank is not None and sequence.slot is not None:
            self._bank.release(sequence.slot)
        sequence.slot = None

    def _admit(self, now: float, budget: int) -> Span | None:
        for sequence in self._candidates(now):
            overdue = now - sequence.arrival >= self._config.max_wait_s
            if self._can_start(sequence):
                self._remove_waiting(sequence)
                sequence.slot = OFF if self._bank is None else self._bank.acquire(sequence.delta)
                sequence.status = Status.RUNNING
                self.running.append(sequence)
                return self._span(sequence, min(sequence.pending, budget))
            if overdue:
                return None
        return None

    def _candidates(self, now: float) -> Iterator[Sequence]:
        """Heads of the queues: overdue by arrival, then warm by arrival, then cold by arrival."""
        heads = [queue[0] for queue in self.queues.values()]

        def rank(sequence: Sequence) -> tuple[int, float]:
            if now - sequence.arrival >= self._config.max_wait_s:
                return 0, sequence.arrival
            warm = self._bank is None or self._bank.is_resident(sequence.delta)
            return (1 if warm else 2), sequence.arrival

        return iter(sorted(heads, key=rank))

    def _can_start(self, sequence: Sequence) -> bool:
        """Whether its tokens fit now with a block to spare, and its update has a slot."""
        need = min(len(sequence.tokens) + self._pool.block_size, sequence.max_length)
        if not self._pool.can_extend([], need):
            return False
        return self._bank is None or self._bank.can_acquire(sequence.delta)

    def _queue(self, sequence: Sequence) -> deque[Sequence]:
        return self.queues.setdefault(sequence.queue, deque())

    def _remove_waiting(self, sequence: Sequence) -> None:
        queue = self.queues[sequence.queue]
        queue.remove(sequence)
        if not queue:
            del self.queues[sequence.queue]
