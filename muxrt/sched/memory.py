"""Who may hold which blocks: entitlement, loans, claims, and preemption to make them come true.

The rules, in the order they are asked:

0. While a running sequence of a model is short of blocks, no other of that model starts: what
   comes free is for it, or the two would take turns for ever.
1. A model may take free blocks within its quota, always.
2. Beyond its quota it borrows: what is free, less what others have a claim on.
3. A model that is short of blocks within its quota gets them from borrowers: their newest
   sequences are preempted until they are back within their quotas or the need is covered.
4. A sequence short of blocks beyond the quota preempts newer sequences of its own model. The
   newest one waits, holding what it has.
5. A sequence starts only where those of its model that run can grow by a group each, or it would
   be the next to be preempted: under overload that is all a unit does.

So the oldest sequence of every model can always go on: alone it fits its quota (the floor), and
everything above the quotas can be called back.

Where nobody may borrow, quotas are walls: what is beyond the quota is never free, so rule 2 never
lends and rule 3 never finds a borrower.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from itertools import takewhile

from msgspec.structs import replace

from muxrt.core import (
    BlockGroup,
    Copy,
    CopyKind,
    Sequence,
    SequenceState,
    Transfer,
    TransferKind,
    pack_ids,
)
from muxrt.kvcache.block_pool import BlockPool
from muxrt.kvcache.host_blocks import HostBlocks
from muxrt.sched.entries import open_slot
from muxrt.sched.queues import ModelQueue

WATERMARK = 0.01  # of all blocks stay free when a sequence starts or resumes on borrowed blocks


class Preempt(Enum):
    """How a sequence gives its blocks back; it keeps its tokens either way."""

    SWAP = "swap"  # K and V move to host memory
    RECOMPUTE = "recompute"  # K and V are computed again from the tokens


class Memory:
    """Takes blocks from the pool for sequences, and takes sequences off their blocks."""

    def __init__(
        self,
        pool: BlockPool,
        queues: Mapping[str, ModelQueue],
        host: HostBlocks,
        choose: Callable[[Sequence], Preempt],
        may_borrow: bool = True,
    ) -> None:
        self.pool = pool
        self.host = host
        # Blocks that loans to other models must leave free, by model: what it is short of within
        # its quota, and what its policy keeps for a while, whatever the quota is.
        self._claims: dict[str, int] = {}
        self.reserved: dict[str, int] = {}
        self.copies: deque[tuple[Sequence, CopyKind | TransferKind]] = deque()  # to be launched
        self.num_preempted: dict[tuple[str, Preempt], int] = {}
        self._queues = queues
        self._choose = choose
        self.may_borrow = may_borrow
        self._leaving: set[Sequence] = set()  # their blocks return when their work is done
        self._short: dict[str, Sequence] = {}  # by model: who runs and waits for blocks

    @property
    def is_settled(self) -> bool:
        """Nobody is on the way in or out or waits for blocks, and nothing is kept for anybody."""
        is_kept = self._claims or self.reserved
        return not (self.copies or is_kept or self._leaving or self._short)

    # -- taking ------------------------------------------------------------------------------

    def start(self, sequence: Sequence) -> bool:
        """Take the blocks of all known tokens of a queue's head; it runs, or nothing changes.

        A swapped sequence starts its way back from host memory, one whose K and V another unit
        holds is fetched. False = wait (what could be called back has been).
        """
        if sequence.incoming is not None:
            return self._start_fetching(sequence)
        if sequence.host_blocks is None:
            return self._start_computing(sequence)
        num_groups = len(sequence.host_blocks) // self._group_blocks(sequence)
        if not self._may_start(sequence, num_groups, []):
            return False
        sequence.groups = self._take(sequence, num_groups)
        self._queues[sequence.request.model].start(sequence)
        sequence.state = SequenceState.SWAPPING_IN
        self.copies.append((sequence, CopyKind.SWAP_IN))
        return True

    def _start_fetching(self, sequence: Sequence) -> bool:
        queue, source = self._queues[sequence.request.model], sequence.request.source
        assert source is not None, "it comes from somewhere"
        # With room for the first token that was generated, whether it is known yet or not.
        num_groups = queue.model.layout.num_groups(source.num_tokens + 1)
        if not self._may_start(sequence, num_groups, []):
            return False
        sequence.groups = self._take(sequence, num_groups)
        sequence.num_scheduled = sequence.num_committed = source.num_tokens
        queue.start(sequence)
        sequence.state = SequenceState.FETCHING
        self.fetch(sequence)
        return True

    def fetch(self, sequence: Sequence) -> None:
        """Ask for the pieces of a sequence that are there and were not asked for, if it has room.

        One fetch at a time, of as many pieces as there are by then.
        """
        incoming = sequence.incoming
        if incoming is None or sequence.state is not SequenceState.FETCHING or incoming.is_asking:
            return
        if incoming.num_asked < len(incoming.pieces):
            incoming.is_asking = True
            self.copies.append((sequence, TransferKind.FETCH))

    def _start_computing(self, sequence: Sequence) -> bool:
        queue = self._queues[sequence.request.model]
        known = self._known(sequence)
        missing = queue.model.layout.num_groups(sequence.num_tokens) - len(known)
        if not self._may_start(sequence, missing, known):
            return False
        self.pool.share(known)
        sequence.groups = known + self._take(sequence, missing)
        sequence.num_cached = len(known) * queue.model.layout.block_tokens
        sequence.num_scheduled = sequence.num_committed = sequence.num_cached
        queue.start(sequence)
        return True

    def _known(self, sequence: Sequence) -> list[BlockGroup]:
        """Groups that hold its first tokens already, none of them on its way out of the pool."""
        found = self.pool.prefixes.match(sequence.request.keys)
        if not self.pool.num_leaving:
            return found
        return list(takewhile(lambda group: not self.pool.is_leaving(group), found))

    def extend(self, sequence: Sequence, num_tokens: int) -> bool:
        """Take blocks for `num_tokens` more tokens of a running sequence; False = not now."""
        layout = self._queues[sequence.request.model].model.layout
        missing = layout.num_groups(sequence.num_scheduled + num_tokens) - len(sequence.groups)
        if missing <= 0:
            return True
        model, blocks = sequence.request.model, missing * layout.blocks_per_group
        if not self._may_take(model, blocks):
            self._make_room(sequence, blocks)
            if not self._may_take(model, blocks):
                self._short.setdefault(model, sequence)
                return False
        sequence.groups += self._take(sequence, missing)
        if self._short.get(model) is sequence:
            self._end_shortage(model)
        return True

    def grow(self, model: str, grown: Iterable[tuple[Sequence, int]]) -> None:
        """Take groups for running sequences of `model`, so many each; the blocks must be there."""
        wanted = [(sequence, num_groups) for sequence, num_groups in grown if num_groups > 0]
        if not wanted:
            return
        groups = self.pool.take(model, sum(num_groups for _, num_groups in wanted))
        assert groups is not None, "blocks that were counted are gone"
        for sequence, num_groups in wanted:
            sequence.groups += groups[-num_groups:]
            del groups[-num_groups:]

    def _is_short(self, model: str) -> bool:
        """A running sequence of `model` waits for blocks."""
        sequence = self._short.get(model)
        if sequence is None:
            return False
        if sequence.can_run:
            return True
        self._end_shortage(model)  # it was preempted or has ended
        return False

    def _end_shortage(self, model: str) -> None:
        del self._short[model]
        self.disclaim(model)

    def disclaim(self, model: str) -> None:
        """Nothing is kept for the model any more."""
        self._claims.pop(model, None)
        self.reserved.pop(model, None)

    def disclaim_all(self) -> bool:
        """Nothing is kept for anybody any more; False if nothing was."""
        was_kept = bool(self._claims or self.reserved)
        self._claims.clear()
        self.reserved.clear()
        return was_kept

    def need(self, sequence: Sequence) -> int:
        """Blocks a waiting sequence needs to start, prefix hits not counted."""
        model = self._queues[sequence.request.model].model
        return model.layout.num_blocks(sequence.num_tokens)

    def num_unknown(self, head: Sequence) -> int:
        """Tokens of a queue's head whose K and V are neither cached nor in host memory."""
        if head.host_blocks is not None:
            return head.num_pending
        if head.incoming is not None:
            return 1  # its K and V come; a decode step is all that it needs
        known = self._known(head)
        layout = self._queues[head.request.model].model.layout
        return head.num_tokens - len(known) * layout.block_tokens

    def _may_start(self, head: Sequence, num_groups: int, known: list[BlockGroup]) -> bool:
        model, idle = head.request.model, self.pool.num_idle(known)
        if self._is_short(model):
            return False
        blocks = num_groups * self._group_blocks(head)
        growth = len(self._queues[model].running) * self._group_blocks(head)
        if self._is_entitled(model, blocks + idle + growth):
            if self.pool.num_available - idle < blocks:
                self._claims[model] = blocks + idle
                self._call_back(blocks + idle)
            return self.pool.num_available - idle >= blocks
        if not self.may_borrow:
            return False
        kept = int(WATERMARK * self.pool.num_blocks) + self._claimed_by_others(model) + growth
        return self.pool.num_available - idle - blocks >= kept

    def _may_take(self, model: str, blocks: int) -> bool:
        available = self.pool.num_available
        if self._is_entitled(model, blocks):
            return available >= blocks
        return self.may_borrow and available - blocks >= self._claimed_by_others(model)

    def _is_entitled(self, model: str, blocks: int) -> bool:
        account = self.pool.accounts[model]
        return account.used + blocks <= account.quota

    def _claimed_by_others(self, model: str) -> int:
        if not (self._claims or self.reserved):
            return 0
        owners = {*self._claims, *self.reserved} - {model}
        return sum(map(self._claimed, owners))

    def _claimed(self, owner: str) -> int:
        """What is kept for it. A quota that was lowered since ends a claim to blocks within it."""
        claim = self._claims.get(owner, 0)
        if not self._is_entitled(owner, claim):
            claim = 0
        return max(claim, self.reserved.get(owner, 0))

    def _take(self, sequence: Sequence, num_groups: int) -> list[BlockGroup]:
        groups = self.pool.take(sequence.request.model, num_groups)
        assert groups is not None, "blocks that were available are gone"
        return groups

    def _group_blocks(self, sequence: Sequence) -> int:
        return self.pool.accounts[sequence.request.model].blocks_per_group

    # -- making room -------------------------------------------------------------------------

    def _make_room(self, sequence: Sequence, blocks: int) -> None:
        """Call blocks back for a running sequence that is short of them."""
        if self._is_entitled(sequence.request.model, blocks):
            self._claims[sequence.request.model] = blocks
            self._call_back(blocks)
        elif self._room(sequence.request.model) < blocks:
            self._preempt_newer(sequence, blocks)
        # Otherwise free blocks are there but kept for others; that ends, at the latest with the
        # last work in flight (`Scheduler.schedule`).

    def _call_back(self, blocks: int) -> None:
        """Preempt the newest sequences of borrowers until `blocks` are or will be available."""
        while self.pool.num_available + self._num_returning() < blocks:
            victim = self._newest_of_borrowers()
            if victim is None:
                return
            self.preempt(victim)

    def _preempt_newer(self, sequence: Sequence, blocks: int) -> None:
        model = sequence.request.model
        newer = [s for s in self._queues[model].running if s.order > sequence.order and s.can_run]
        while newer and self._room(model) + self._num_returning(model) < blocks:
            self.preempt(newer.pop())

    def _room(self, model: str) -> int:
        """Blocks that `model` could be given now, whoever has a claim on them."""
        if self.may_borrow:
            return self.pool.num_available
        account = self.pool.accounts[model]
        return account.quota - account.used

    def _newest_of_borrowers(self) -> Sequence | None:
        """Of the model that is furthest above its quota, what leaves already not counted."""
        loans = {
            name: account.used - self._num_returning(name) - account.quota
            for name, account in self.pool.accounts.items()
            if account.borrowed
        }
        for name in sorted(loans, key=lambda name: (-loans[name], name)):
            if loans[name] > 0:
                for victim in reversed(self._queues[name].running):
                    if victim.can_run:
                        return victim
        return None

    def _num_returning(self, model: str | None = None) -> int:
        """Blocks that come back when work in flight is done."""
        return sum(
            exclusive_blocks(sequence)
            for sequence in self._leaving
            if model in (None, sequence.request.model)
        )

    # -- giving back -------------------------------------------------------------------------

    def preempt(self, sequence: Sequence) -> None:
        """Take a running sequence off its blocks, at once or when its work in flight is done."""
        if sequence.in_flight:
            sequence.preempt = True
            self._queues[sequence.request.model].changed()
            self._leaving.add(sequence)
            return
        sequence.preempt = False
        self._leaving.discard(sequence)
        sequence.num_preemptions += 1
        kind = self._choose(sequence)
        if kind is Preempt.SWAP and not self._swap_out(sequence):
            kind = Preempt.RECOMPUTE
        if kind is Preempt.RECOMPUTE:
            self._queues[sequence.request.model].stop(sequence, SequenceState.WAITING)
            self._release(sequence)
            sequence.num_scheduled = sequence.num_committed = 0
        key = (sequence.request.model, kind)
        self.num_preempted[key] = self.num_preempted.get(key, 0) + 1

    def vacate(self) -> None:
        """Take running sequences off blocks that are to leave the pool."""
        if not self.pool.num_leaving:
            return
        for queue in self._queues.values():
            for sequence in list(queue.running):
                if sequence.can_run and any(map(self.pool.is_leaving, sequence.groups)):
                    self.preempt(sequence)

    def _swap_out(self, sequence: Sequence) -> bool:
        ids = self.host.take(sum(group.num_blocks for group in sequence.groups))
        if ids is None:
            return False
        sequence.host_blocks = ids
        self._queues[sequence.request.model].stop(sequence, SequenceState.SWAPPING_OUT)
        self._leaving.add(sequence)
        self.copies.append((sequence, CopyKind.SWAP_OUT))
        return True

    def abandon(self, sequence: Sequence) -> None:
        """A finished or aborted sequence gives everything back, at the latest after its work."""
        queue = self._queues[sequence.request.model]
        sequence.state = SequenceState.FINISHED
        sequence.preempt = False
        queue.changed()
        if self._short.get(sequence.request.model) is sequence:
            self._end_shortage(sequence.request.model)
        if sequence.in_flight or any(sequence is waiting for waiting, _ in self.copies):
            self._leaving.add(sequence)
            return
        self._leaving.discard(sequence)
        queue.remove(sequence)
        self._release(sequence)
        self._release_host(sequence)

    def settle(self, sequence: Sequence) -> None:
        """No work names `sequence` any more: do what had to wait for that."""
        if sequence.state is SequenceState.FINISHED:
            self.abandon(sequence)
        elif sequence.preempt and sequence.state is SequenceState.RUNNING:
            self.preempt(sequence)

    def copy(self, sequence: Sequence, kind: CopyKind, work_id: int, lane: int) -> Copy:
        """The work that moves a sequence's blocks."""
        assert sequence.host_blocks is not None and sequence.slot is not None
        return Copy(
            work_id,
            lane,
            sequence.request.model,
            kind,
            sequence.slot,
            pack_ids(sequence.groups),
            sequence.host_blocks.tobytes(),
        )

    def transfer(self, sequence: Sequence, kind: TransferKind, work_id: int, lane: int) -> Transfer:
        """The work that seals a piece of a sequence, or fetches those that are there."""
        assert sequence.slot is not None
        request, incoming, outgoing = sequence.request, sequence.incoming, sequence.outgoing
        model, slot = request.model, sequence.slot
        if kind is TransferKind.SEAL:
            assert outgoing is not None, "it leaves"
            return Transfer(work_id, lane, model, kind, slot, (outgoing.unsealed.popleft(),))
        assert incoming is not None and request.source is not None, "it comes"
        pieces = tuple(incoming.pieces[incoming.num_asked :])
        incoming.num_asked = len(incoming.pieces)
        opened = (open_slot(sequence),) if incoming.is_whole else ()
        source = replace(request.source, pieces=())
        ids = pack_ids(sequence.groups)
        return Transfer(work_id, lane, model, kind, slot, pieces, ids, source, opened)

    def fetched(self, sequence: Sequence) -> bool:
        """What was asked for is here. If that is all, it goes on as if it was computed here."""
        incoming = sequence.incoming
        assert incoming is not None, "it came"
        if not incoming.is_whole or incoming.num_asked < len(incoming.pieces):
            return False
        sequence.incoming = None
        sequence.num_groups_sent = len(sequence.groups)
        sequence.state = SequenceState.RUNNING
        return True

    def copied(self, sequence: Sequence, kind: CopyKind) -> None:
        """A copy is done: the sequence is on the other side."""
        if sequence.state is SequenceState.FINISHED:
            return
        if kind is CopyKind.SWAP_OUT:
            self._leaving.discard(sequence)
            self._release(sequence)
            sequence.state = SequenceState.SWAPPED
        else:
            self._release_host(sequence)
            sequence.num_groups_sent = len(sequence.groups)
            sequence.state = SequenceState.RUNNING

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.groups)
        sequence.groups = []
        sequence.num_groups_sent = 0

    def _release_host(self, sequence: Sequence) -> None:
        if sequence.host_blocks is not None:
            self.host.release(sequence.host_blocks)
            sequence.host_blocks = None

    def check(self, sequences: Iterable[Sequence]) -> bool:
        """Every block is free, cached, or held by the sequences given; none is forgotten."""
        alive = list(sequences)
        held = {group: 0 for sequence in alive for group in sequence.groups}
        self.pool.check(held)
        for sequence in alive:
            for group in sequence.groups:
                held[group] += 1
        assert all(group.refs == count for group, count in held.items()), "a reference is wrong"
        self.host.check([s.host_blocks for s in alive if s.host_blocks is not None])
        assert self._leaving <= set(alive), "a sequence left without its blocks"
        return True


def exclusive_blocks(sequence: Sequence) -> int:
    """Blocks that come free when `sequence` lets go of its groups."""
    return sum(group.num_blocks for group in sequence.groups if group.refs == 1)
