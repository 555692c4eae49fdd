"""Which tokens the next step computes.

Running sequences come first, one token each; prompts get what is left of the step's token budget,
or only `prefill_chunk` of it, so that no stream stalls beside a long prompt. Tokens far into a
prompt count for more there: they attend to more. The prompt that runs longest gets half of that, so
that it comes to its end; the rest goes to prompts that it completes, then to new ones, so that a
short prompt need not wait for a long one.

Waiting requests are queued by cluster. Clusters whose update is resident go first, because a cold
one costs a load and may push out a warm one; but a request that has waited `max_wait_s` goes
before them all, and nothing is admitted past it.

When the KV cache is full the youngest sequence makes room and waits again. It computes again what
the prefix cache has lost of it by then.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from math import ceil

from cluster_router.wire.errors import OverloadedError
from lm_workers.adapters import OFF, AdapterBank
from lm_workers.config import EngineConfig
from lm_workers.kv_cache import BlockPool
from lm_workers.prefix_cache import extend_keys
from lm_workers.sequence import Batch, Sequence, Span, Status


@dataclass(frozen=True, slots=True)
class StepBudget:
    """Tokens that a step computes at most.

    Attributes:
        all: of it.
        prompts: of prompts, while streams are running.
    """

    all: int
    prompts: int


class Scheduler:
    """Queues by cluster, admission, chunked prefill and preemption.

    Args:
        config: limits of requests.
        budget: limits of a step.
        pool: KV blocks.
        bank: resident updates; None serves the base model alone.
        context_cost: what it costs a token to attend to one other, over what all else costs it.
    """

    def __init__(
        self,
        config: EngineConfig,
        budget: StepBudget,
        pool: BlockPool,
        bank: AdapterBank | None,
        context_cost: float = 0.0,
    ) -> None:
        self._config, self._budget, self._pool, self._bank = config, budget, pool, bank
        self._context_cost = context_cost
        self.running: list[Sequence] = []
        self.queues: OrderedDict[str, deque[Sequence]] = OrderedDict()
        self.prompt_tokens, self.cached_tokens, self.preemptions = 0, 0, 0
        self._plan: dict[Sequence, int] = {}
        self._beside_streams = False
        # Keys and values depend on the update only where it reaches below the head.
        self._keyed_by_update = bank is not None and bank.spec.depth == "full"

    @property
    def bank(self) -> AdapterBank | None:
        """The resident updates; None where the base model is served alone."""
        return self._bank

    @property
    def num_waiting(self) -> int:
        """Requests in the queues."""
        return sum(len(queue) for queue in self.queues.values())

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.running or self.queues)

    @property
    def kv_free(self) -> float:
        """Share of the KV blocks that no running sequence uses."""
        return self._pool.free / (self._pool.num_blocks - 1)

    @property
    def has_room(self) -> bool:
        """Whether traffic would hardly feel another request: half of everything is free."""
        few = 2 * len(self.running) < self._config.max_sequences
        return few and not self.queues and self.kv_free > 0.5

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
        self._plan = {}
        room, admits = self._budget.all, self.num_waiting
        for sequence in [one for one in self.running if one.pending == 1]:
            room -= self._compute(sequence, room)
        self._beside_streams = bool(self._plan)
        if self._beside_streams:
            room = min(room, self._budget.prompts)
        prompts = [one for one in self.running if one.pending > 1]
        for sequence in prompts[:1]:
            room -= self._prefill(sequence, -(-room // 2))
        for sequence in sorted(prompts[1:], key=lambda one: one.pending):
            if sequence.pending * self._price(sequence) <= room:
                room -= self._prefill(sequence, room)
        # A sequence that just made room must not take it again.
        if self.num_waiting <= admits:
            room = self._admit_all(now, room)
        for sequence in prompts:
            room -= self._prefill(sequence, room)
        spans = [
            Span(one, one.computed, one.computed + length) for one, length in self._plan.items()
        ]
        return Batch(tuple(sorted(spans, key=lambda span: span.length > 1)))

    def complete(self, span: Span) -> None:
        """The tokens of `span` are computed: others may use their full blocks from now on."""
        sequence, size = span.sequence, self._pool.block_size
        sequence.computed = span.stop
        if self._pool.prefixes is not None:
            self._extend_keys(sequence)
            for index in range(span.start // size, span.stop // size):
                self._pool.prefixes.insert(sequence.prefix_keys[index], sequence.blocks[index])

    def check_integrity(self) -> None:
        """Assert that blocks, slots and queues agree with the sequences."""
        self._pool.check_integrity(sequence.blocks for sequence in self.running)
        if self._pool.prefixes is not None:
            held = (zip(one.prefix_keys, one.blocks, strict=False) for one in self.running)
            self._pool.prefixes.check_integrity(list(chain.from_iterable(held)))
            for one in self.running:
                rest = one.blocks[one.computed // self._pool.block_size :]
                assert not any(block in self._pool.prefixes for block in rest), "known too early"
        if self._bank is not None:
            slots = [sequence.slot for sequence in self.running]
            self._bank.check_integrity([slot for slot in slots if slot is not None])
        for sequence in self.running:
            assert sequence.status is Status.RUNNING
            assert sequence.computed <= len(sequence.blocks) * self._pool.block_size
        for name, queue in self.queues.items():
            assert queue, "an empty queue is kept"
            arrivals = [sequence.arrival for sequence in queue]
            assert arrivals == sorted(arrivals), "a queue is out of order"
            for sequence in queue:
                assert sequence.status is Status.WAITING and sequence.queue == name
                assert not sequence.blocks and sequence.slot is None and not sequence.computed

    def _compute(self, sequence: Sequence, room: int) -> int:
        """Plan up to `room` more tokens of a sequence in this step; returns how many."""
        planned = self._plan.get(sequence, 0)
        length = min(sequence.pending - planned, room)
        if length <= 0 or sequence.status is not Status.RUNNING:
            return 0  # nothing to do, or preempted by one before it
        stop = sequence.computed + planned + length
        if not self._make_room(sequence, stop):
            return 0
        self._pool.extend(sequence.blocks, stop)
        self._plan[sequence] = planned + length
        return length

    def _prefill(self, sequence: Sequence, room: int) -> int:
        """Plan as much of a prompt as `room` pays for; returns what it takes of it."""
        price = self._price(sequence)
        length = self._compute(sequence, min(room, max(1, int(room / price))))
        return min(room, ceil(length * price))

    def _price(self, sequence: Sequence) -> float:
        """Of the next token of a prompt, in tokens of `prefill_chunk`."""
        if not self._beside_streams:
            return 1.0
        return 1 + self._context_cost * (sequence.computed + self._plan.get(sequence, 0))

    def _make_room(self, sequence: Sequence, stop: int) -> bool:
        """Preempt the youngest until `sequence` can grow; False if it was preempted itself."""
        while not self._pool.can_extend(sequence.blocks, stop):
            youngest = max(self.running, key=lambda one: one.arrival)
            self._preempt(youngest)
            self._plan.pop(youngest, None)
            if youngest is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._give_back(sequence)
        sequence.computed = 0
        sequence.preemptions += 1
        self.preemptions += 1
        sequence.status = Status.WAITING
        self._queue(sequence).appendleft(sequence)

    def _give_back(self, sequence: Sequence) -> None:
        self._pool.release(sequence.blocks)
        if self._bank is not None and sequence.slot is not None:
            self._bank.release(sequence.slot)
        sequence.slot = None

    def _admit_all(self, now: float, room: int) -> int:
        """Start waiting sequences until `room` tokens are planned; returns what is left."""
        while room and len(self.running) < self._config.max_sequences:
            sequence = self._admit(now)
            if sequence is None:
                break
            room -= self._prefill(sequence, room)
        return room

    def _admit(self, now: float) -> Sequence | None:
        """Start the first waiting sequence that may, and return it."""
        for sequence in self._candidates(now):
            overdue = now - sequence.arrival >= self._config.max_wait_s
            cached = self._cached_blocks(sequence)
            if self._can_start(sequence, cached):
                self._start(sequence, cached)
                return sequence
            if overdue:
                return None
        return None

    def _start(self, sequence: Sequence, cached: list[int]) -> None:
        # Where the update cannot be loaded the sequence still waits in its queue.
        slot = OFF if self._bank is None else self._bank.acquire(sequence.delta)
        self._remove_waiting(sequence)
        sequence.slot, sequence.status = slot, Status.RUNNING
        self._pool.share(cached)
        sequence.blocks = cached
        sequence.computed = len(cached) * self._pool.block_size
        if sequence.cached_tokens is None:
            sequence.cached_tokens = sequence.computed
            self.prompt_tokens += sequence.prompt_length
            self.cached_tokens += sequence.computed
        self.running.append(sequence)

    def _cached_blocks(self, sequence: Sequence) -> list[int]:
        """Blocks that already hold the beginning of a sequence, as far as it may reuse them."""
        if self._pool.prefixes is None:
            return []
        self._extend_keys(sequence)
        usable = sequence.reusable // self._pool.block_size
        return self._pool.prefixes.find(sequence.prefix_keys[:usable])

    def _extend_keys(self, sequence: Sequence) -> None:
        salt = sequence.queue if self._keyed_by_update else ""
        extend_keys(sequence.prefix_keys, sequence.tokens, self._pool.block_size, salt)

    def _candidates(self, now: float) -> Iterator[Sequence]:
        """Heads of the queues: overdue by arrival, then warm by arrival, then cold by arrival."""
        heads = [queue[0] for queue in self.queues.values()]

        def rank(sequence: Sequence) -> tuple[int, float]:
            if now - sequence.arrival >= self._config.max_wait_s:
                return 0, sequence.arrival
            warm = self._bank is None or self._bank.is_resident(sequence.delta)
            return (1 if warm else 2), sequence.arrival

        return iter(sorted(heads, key=rank))

    def _can_start(self, sequence: Sequence, cached: list[int]) -> bool:
        """Whether it fits with a block to spare, and its update has a slot.

        Room that running prompts will need is not free: two long prompts that fit only one by
        one must not start together.
        """
        pool = self._pool
        promised = sum(
            max(0, pool.blocks_for(len(one.tokens)) - len(one.blocks)) for one in self.running
        )
        need = min(len(sequence.tokens) + pool.block_size, sequence.max_length)
        if pool.blocks_for(need) - len(cached) > pool.free_without(cached) - promised:
            return False
        return self._bank is None or self._bank.can_acquire(sequence.delta)

    def _queue(self, sequence: Sequence) -> deque[Sequence]:
        return self.queues.setdefault(sequence.queue, deque())

    def _remove_waiting(self, sequence: Sequence) -> None:
        queue = self.queues[sequence.queue]
        queue.remove(sequence)
        if not queue:
            del self.queues[sequence.queue]
