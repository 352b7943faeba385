"""The models' transition rules, for events that real ranks have recorded: count, send, poll, restore, signal, launch.

What a recording shows is one interleaving that went well. The rules ask for more: that it could not have gone otherwise. They
follow what each rank can KNOW (vector clocks, by launch): a rank's launch knows its own earlier launches, and whatever was
known to the launches whose packets they have received. Nothing is ordered within a launch. So a send into a used slot is
right only if the sender knows of the launch that restored it, however early the restore was in fact.

Names are those of slots.pml and bulk.pml.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Event:
    """Something that one rank did.

    Attributes:
        kind: launch, count, send, poll, restore or signal.
        place: where: for a launch its kind ("counts", "dispatch", "experts", "combine"), else (region, holder, source, ...).
        value: of a count (step, num_tokens), of a signal (epoch, units).
    """

    kind: str
    place: Hashable
    value: tuple[int, ...] = ()


class Violation(Exception):
    """A rule was broken; the message begins with the name that the models give it."""


@dataclass
class Launch:
    """What a rank knows while a launch of it runs: of every rank, how many launches are over. `epoch` is what flags hold in a
    bulk round: the number of rounds with a bulk operation, this one included."""

    kind: str
    number: int
    round: int
    epoch: int
    known: list[int]


@dataclass
class _Word:
    """A packet's place in a slot."""

    sender: int
    launch: Launch
    state: str = "sent"
    freed_in: int = -1


@dataclass
class _Rank:
    launches: list[Launch] = field(default_factory=list)
    received: list[int] = field(default_factory=list)
    round: int = 0
    bulk_rounds: int = 0
    step: int = 0
    tokens: dict[int, int] = field(default_factory=dict)
    next_event: int = 0


class Replay:
    """Replays the recordings of all ranks.

    Args:
        recordings: each rank's events, in its own order.
        slot_rows: steps in which a rank has more rows than this are bulk.
        dispatch_slot_rows: the same for dispatches; 0 for rows of bytes, whose dispatches are always bulk. Default: `slot_rows`.
    """

    def __init__(self, recordings: Sequence[Sequence[Event]], slot_rows: int, dispatch_slot_rows: int | None = None) -> None:
        self._recordings = recordings
        self._slot_rows = {"combine": slot_rows, "dispatch": slot_rows if dispatch_slot_rows is None else dispatch_slot_rows}
        self._size = len(recordings)
        self._ranks = [_Rank(received=[-1] * self._size) for _ in recordings]
        self._words: dict[Hashable, _Word] = {}
        self._counts: dict[tuple[int, int, int], tuple[Launch, int]] = {}
        self._count_places: dict[Hashable, int] = {}
        self._signals: dict[tuple[str, int, int], list[tuple[int, Launch]]] = defaultdict(list)
        self._rows: dict[Hashable, int] = {}
        self.replayed: dict[str, int] = defaultdict(int)

    def run(self) -> dict[str, int]:
        """Replays everything; returns how many events of each kind there were. Raises `Violation`."""
        while self._pass_over_ranks():
            pass
        for rank, state in enumerate(self._ranks):
            if state.next_event < len(self._recordings[rank]):
                event = self._recordings[rank][state.next_event]
                raise Violation(f"polled_what_nobody_sent: rank {rank} {event.kind} {event.place} {event.value}")
        return dict(self.replayed)

    def _pass_over_ranks(self) -> bool:
        moved = False
        for rank, state in enumerate(self._ranks):
            events = self._recordings[rank]
            while state.next_event < len(events) and self._step(rank, state, events[state.next_event]):
                self.replayed[events[state.next_event].kind] += 1
                state.next_event += 1
                moved = True
        return moved

    def _step(self, rank: int, state: _Rank, event: Event) -> bool:
        """Whether the event can come now; if so it has."""
        rule = {
            "launch": self._launch,
            "count": self._count,
            "send": self._send,
            "poll": self._poll,
            "restore": self._restore,
            "signal": self._signal,
        }[event.kind]
        return rule(rank, state, event)

    # --- rules ------------------------------------------------------------------------------------------------------

    def _launch(self, rank: int, state: _Rank, event: Event) -> bool:
        if state.launches and not self._waits_are_over(rank, state, state.launches[-1]):
            return False
        if state.launches and state.launches[-1].kind == "combine":
            state.round += 1
            state.bulk_rounds += self._is_bulk(state, "dispatch") or self._is_bulk(state, "combine")
        number = len(state.launches)
        state.received[rank] = number - 1
        state.launches.append(Launch(str(event.place), number, state.round, state.bulk_rounds + 1, list(state.received)))
        return True

    def _is_bulk(self, state: _Rank, kind: str) -> bool:
        return max(state.tokens.values()) > self._slot_rows[kind]

    def _waits_are_over(self, rank: int, state: _Rank, launch: Launch) -> bool:
        """What leaves no event: the waits for counts and signals at the end of a launch. Learns what they tell."""
        peers = [peer for peer in range(self._size) if peer != rank]
        if launch.kind == "counts":
            if any((peer, rank, state.step) not in self._counts for peer in peers):
                return False
            for peer in peers:
                sent_in, state.tokens[peer] = self._counts[peer, rank, state.step]
                self._learn(state, peer, sent_in)
        elif launch.kind in ("dispatch", "combine") and self._is_bulk(state, launch.kind):
            region = "arrived" if launch.kind == "dispatch" else "ready"
            waited_for = [peer for peer in peers if state.tokens[peer if region == "arrived" else rank]]
            signals = {peer: self._signal_of(region, rank, peer, launch.epoch) for peer in waited_for}
            if None in signals.values():
                return False
            for peer, signal in signals.items():
                assert signal is not None
                self._learn(state, peer, signal)
        return True

    def _signal_of(self, region: str, rank: int, peer: int, epoch: int) -> Launch | None:
        return next((launch for value, launch in self._signals[region, rank, peer] if value == epoch), None)

    def _learn(self, state: _Rank, sender: int, launch: Launch) -> None:
        """A packet tells all that its launch knew; of its sender, that the launches before are over."""
        known = list(launch.known)
        known[sender] = max(known[sender], launch.number - 1)
        state.received = [max(pair) for pair in zip(state.received, known, strict=True)]

    def _count(self, rank: int, state: _Rank, event: Event) -> bool:
        step, num_tokens = event.value
        state.step, state.tokens[rank] = step, num_tokens
        launch = state.launches[-1]
        _, holder, *_ = event.place  # type: ignore[misc]
        previous = self._count_places.get(event.place)
        if previous is not None:
            reader = next((each for each in self._ranks[holder].launches if self._read_step(holder, each) == previous), None)
            if reader is None or launch.known[holder] < reader.number:
                raise Violation(
                    f"overwrote_unread_count: rank {rank}'s count of step {step} at rank {holder} over step {previous}'s"
                )
        self._count_places[event.place] = step
        self._counts[rank, holder, step] = (launch, num_tokens)
        return True

    def _read_step(self, rank: int, launch: Launch) -> int:
        """Which step's counts a launch waits for, or -1."""
        if launch.kind != "counts":
            return -1
        return sum(each.kind == "counts" for each in self._ranks[rank].launches[: launch.number + 1])

    def _send(self, rank: int, state: _Rank, event: Event) -> bool:
        region, holder, *_ = event.place  # type: ignore[misc]
        launch = state.launches[-1]
        if region in ("dispatch_slots", "combine_slots"):
            word = self._words.get(event.place)
            if word is not None and (word.state != "restored" or launch.known[holder] < word.freed_in):
                if self._may_still_be_freed(holder, word):
                    return False
                raise Violation(
                    f"overwrote_unread_slot: rank {rank} in {launch.kind} {launch.number} (round {launch.round}) into "
                    f"{event.place}, {word.state} in round {word.launch.round}; it knows launches {launch.known}, the restore "
                    f"is in {word.freed_in}"
                )
            self._words[event.place] = _Word(rank, launch)
        else:  # a gathered row, straight to its place: its last reader is the experts before the holder's next combine
            read_in = self._rows.get(event.place)
            if read_in is not None:
                experts = [each for each in self._ranks[holder].launches if each.kind == "experts" and each.round == read_in]
                if not experts or launch.known[holder] < experts[0].number:
                    raise Violation(
                        f"overwrote_unread_row: rank {rank} in round {launch.round} over round {read_in} at {event.place}"
                    )
            self._rows[event.place] = launch.round
        return True

    def _may_still_be_freed(self, holder: int, word: _Word) -> bool:
        """The replay lets a sender run before the receiver; a restore may only not have been replayed yet."""
        state = self._ranks[holder]
        return word.state != "restored" and state.next_event < len(self._recordings[holder]) and not self._is_stuck(holder)

    def _is_stuck(self, holder: int) -> bool:
        """Whether the holder's next event cannot come before somebody else's."""
        state = self._ranks[holder]
        event = self._recordings[holder][state.next_event]
        return event.kind == "poll" and event.place not in self._words

    def _places(self, packet: Hashable) -> list[Hashable]:
        """Of a dispatch's packet that was polled: it may have been sent word by word, as scales are."""
        region, holder, source, offset = packet  # type: ignore[misc]
        words = [(region, holder, source, offset + each) for each in (4, 8, 12)]
        is_in_words = region == "dispatch_slots" and words[0] in self._words
        return [packet, *words] if is_in_words else [packet]

    def _poll(self, rank: int, state: _Rank, event: Event) -> bool:
        word = self._words.get(event.place)
        if word is None or any(self._words[place].state != "sent" for place in self._places(event.place)):
            return False
        launch = state.launches[-1]
        if word.launch.round != launch.round or word.launch.kind != launch.kind:
            raise Violation(
                f"read_stale_row: rank {rank} in {launch.kind} of round {launch.round} polled {event.place}, "
                f"sent in {word.launch.kind} of round {word.launch.round}"
            )
        for place in self._places(event.place):
            self._words[place].state = "polled"
        self._learn(state, word.sender, word.launch)
        return True

    def _restore(self, rank: int, state: _Rank, event: Event) -> bool:
        word = self._words.get(event.place)
        if word is None or word.state != "polled":
            raise Violation(f"restored_unread_slot: rank {rank} at {event.place}")
        for place in self._places(event.place):
            self._words[place].state, self._words[place].freed_in = "restored", state.launches[-1].number
        return True

    def _signal(self, rank: int, state: _Rank, event: Event) -> bool:
        region, holder, *_ = event.place  # type: ignore[misc]
        self._signals[region, holder, rank].append((event.value[0], state.launches[-1]))
        return True
