"""What the protocols need of the compiled kernels, read from their PTX: which accesses order others, and where they stand.

Interpreted kernels run one program in one thread, so no other test on a CPU notices when one of these goes.
"""

import re
from collections.abc import Iterator

import pytest

from test_compile_kernels import VARIANTS, compiled
from tokenferry.kernels import wire
from tokenferry.kernels.control_block import LIMITS_OFFSET, ROUND_OFFSET, SENTINEL

pytestmark = pytest.mark.skipif(wire.INTERPRETED, reason="TRITON_INTERPRET=1 leaves nothing to compile")

CAPABILITIES = pytest.mark.parametrize("capability", [90, 100])
EXCHANGES = tuple(name for name in VARIANTS if name not in ("abort", "add", "load-counts", "table", "table-telemetry"))
BULK = tuple(name for name in VARIANTS if name.startswith(("dispatch", "combine")))
COMBINES = tuple(name for name in VARIANTS if name.startswith("combine"))

TO_A_PEER = re.compile(r"\b(st\.(relaxed|release)\.sys|multimem\.st|red\.\S*\.sys|atom\.\S*\.sys)")
"""Stores and atomics that other GPUs see."""
TICKET = re.compile(rf"\batom\.\S*gpu\S*\.add\.u64 [^;]*\+ {ROUND_OFFSET}\]")
"""Telemetry adds to other words."""


def instructions(name: str, capability: int) -> list[str]:
    """In the order of the PTX, which is the order of the program up to its branches."""
    lines = (piece.strip() for line in compiled(name, capability).asm["ptx"].splitlines() for piece in line.split(";"))
    return [line for line in lines if line and not line.startswith(("//", ".loc", ".file"))]


def places(lines: list[str], pattern: str | re.Pattern[str]) -> Iterator[int]:
    return (place for place, line in enumerate(lines) if re.search(pattern, line))


def registers_derived_from(signature: dict[str, str], parameter: str, lines: list[str]) -> set[str]:
    """What was computed with this parameter of the kernel."""
    known: set[str] = set()
    mentioned = f"_param_{[name for name, kind in signature.items() if kind != 'constexpr'].index(parameter)}]"
    for line in lines:
        registers = re.findall(r"%\w+", re.sub(r"^@!?%\w+", "", line))
        if mentioned in line or not known.isdisjoint(registers[1:]):
            known.update(registers[:1])
    return known


@CAPABILITIES
@pytest.mark.parametrize("name", EXCHANGES)
def test_nothing_goes_to_a_peer_before_the_previous_kernel_has_ended(name: str, capability: int) -> None:
    """The previous kernel may still read what a peer sends in answer, or poll the slots that this one would restore."""
    lines = instructions(name, capability)
    waits, stores = list(places(lines, r"griddepcontrol\.wait")), list(places(lines, TO_A_PEER))
    assert len(waits) == 1, "one wait, on every path"
    assert stores, "the kernel sends"
    assert waits[0] < min(stores)
    branches = [line for line in lines[: waits[0]] if re.search(r"\bbra\b", line)]
    assert branches == [], "no path leads around the wait"


@CAPABILITIES
@pytest.mark.parametrize("name", [name for name in EXCHANGES if name not in COMBINES])
def test_the_counter_and_the_step_are_read_after_the_previous_kernel_has_ended(name: str, capability: int) -> None:
    """Combine alone reads them before: a dispatch always lies between it and whatever wrote them last."""
    lines = instructions(name, capability)
    before = lines[: next(places(lines, r"griddepcontrol\.wait"))]
    loads = [line for line in before if re.search(r"\bld\.(global|relaxed|acquire|volatile)", line)]
    of_table = registers_derived_from(VARIANTS[name][1], "peer_table_ptr", before)
    others = [line for line in loads if re.search(r"\[\s*(%\w+)", line)[1] not in of_table]
    assert others == [], "before the wait nothing but the table of addresses is read"


@CAPABILITIES
@pytest.mark.parametrize("name", BULK)
def test_flags_are_released_and_acquired(name: str, capability: int) -> None:
    """A flag says that rows are there: they must be visible before it, and read after it."""
    text = "\n".join(instructions(name, capability))
    assert re.search(r"\bst\.release\.sys\.global\.b64", text), "the flag of a bulk round"
    assert re.search(r"\bld\.acquire\.sys\.global\.b64", text), "its poll"


@CAPABILITIES
@pytest.mark.parametrize("name", BULK)
def test_all_threads_have_stored_before_one_of_them_sets_the_flag(name: str, capability: int) -> None:
    lines = instructions(name, capability)
    flags = list(places(lines, r"\bst\.release\.sys\.global\.b64"))
    assert flags
    for flag in flags:
        before = [line for line in lines[:flag] if re.search(r"\b(bar\.sync|barrier\.sync|st\.\S*global)", line)]
        assert before and re.search(r"\bbar", before[-1]), "between the last store and the flag stands a barrier"


@CAPABILITIES
@pytest.mark.parametrize("name", COMBINES)
def test_one_thread_takes_the_ticket_and_all_have_loaded_the_round_by_then(name: str, capability: int) -> None:
    lines = instructions(name, capability)
    tickets = list(places(lines, TICKET))
    assert len(tickets) == 1
    ticket = lines[tickets[0]]
    predicate = re.match(r"@(%\w+)", ticket)
    assert predicate is not None, f"every thread would take one: {ticket}"
    setting = [line for line in lines[: tickets[0]] if f"{predicate[1]}," in line][-1]
    compared = re.match(r"setp\.eq\.u32 %\w+, (%\w+), 0$", setting)
    assert compared is not None and f"mov.u32 {compared[1]}, %tid.x" in lines[: tickets[0]], "the first thread alone"
    base, offset = re.search(r"\[(%\w+) \+ (\d+)\]", ticket).groups()
    assert int(offset) == ROUND_OFFSET
    sums = {int(offset): [base], 0: defined_as_sum(lines, base, offset)}
    counter = [
        place
        for place in places(lines, r"\bld\.\S*global")
        if (at := re.search(r"\[ ?(%\w+) \+ (\d+) ?\]", lines[place])) and at[1] in sums.get(int(at[2]), [])
    ]
    assert counter, "the kernel reads the round"
    assert max(counter) < tickets[0], "nobody reads it after the ticket"
    between = lines[max(counter) : tickets[0]]
    assert any(re.search(r"\bbar(rier)?\.(cta\.)?sync\b", line) for line in between), (
        "a barrier between its last load and the ticket"
    )


def defined_as_sum(lines: list[str], base: str, offset: str) -> list[str]:
    """Registers that hold `base` + `offset`."""
    wanted = re.compile(rf"add\.s64\s+(%\w+), {base}, {offset}$")
    return [match[1] for line in lines if (match := wanted.search(line))]


@CAPABILITIES
@pytest.mark.parametrize("name", [name for name in EXCHANGES if name not in COMBINES])
def test_no_other_kernel_takes_a_ticket(name: str, capability: int) -> None:
    """One that did would need the barrier too."""
    assert list(places(instructions(name, capability), TICKET)) == []


@CAPABILITIES
@pytest.mark.parametrize("name", COMBINES)
def test_the_holder_of_the_last_ticket_ends_the_round_and_nobody_else(name: str, capability: int) -> None:
    lines = instructions(name, capability)
    [end] = places(lines, rf"\bst\.global\.u64 \[%\w+ ?\+ ?{ROUND_OFFSET}\]")
    predicate = re.match(r"@(%\w+)", lines[end])
    assert predicate is not None, f"every thread would end it: {lines[end]}"
    last, first = [line for line in lines[:end] if line.startswith("setp") and f" {predicate[1]}," in line][:-3:-1]
    assert re.match(rf"setp\.eq\.and\.u32 {predicate[1]}, %t, %\w+, {predicate[1]}$", last), "all tickets are taken"
    assert first == f"setp.eq.u32 {predicate[1]}, %t, 0", "its first thread"


@CAPABILITIES
@pytest.mark.parametrize("name", EXCHANGES)
def test_whatever_waits_for_a_peer_polls_past_the_caches(name: str, capability: int) -> None:
    """A cached word would never change. Each loop that waits begins at a label W, with the load that is repeated."""
    polls = [line for line in instructions(name, capability) if line.startswith("W:")]
    assert polls, "the kernel waits"
    assert [line for line in polls if not re.match(r"W: ld\.(relaxed|acquire)\.sys\.global", line)] == []


@CAPABILITIES
@pytest.mark.parametrize("name", EXCHANGES)
def test_whatever_waits_for_a_peer_looks_at_the_control_block_past_the_caches(name: str, capability: int) -> None:
    """The load at the start of a launch may give a record that is one launch old: a record that it misses ends the next wait. The
    signs of life of busy peers come in the same load; the limits may change while a kernel waits."""
    lines = instructions(name, capability)
    starts = list(places(lines, "^W:"))
    assert starts, "the kernel waits"
    for start in starts:
        loop = lines[start : start + next(places(lines[start:], "^CLAIM:"))]
        looks = list(places(loop, r"^ld\.relaxed\.sys\.global\.v2\.u64 \{%rec, %w\}, \[%\w+\]$"))
        assert len(looks) == 1, loop
        assert loop[looks[0] + 1 : looks[0] + 4] == ["setp.ne.u64 %p0, %rec, 0", "@%p0 bra LEFT", "cvt.u32.u64 %i, %w"]
        limits = list(places(loop, rf"^ld\.relaxed\.sys\.global\.v2\.u32 \{{%i, %longest\}}, \[%\w+ ?\+ ?{LIMITS_OFFSET}\]$"))
        assert len(limits) == 1, loop


@CAPABILITIES
@pytest.mark.parametrize("name", BULK)
def test_packets_are_sent_past_the_caches(name: str, capability: int) -> None:
    """Words that differ from one another are a payload; the sentinel is the same word everywhere."""
    stores = [re.search(r"\bst\.relaxed\.sys\.global\.v[24]\.b32 \S+ \{(.*)\}", line) for line in instructions(name, capability)]
    assert any(len(set(store[1].split(", "))) > 1 for store in stores if store)


@CAPABILITIES
@pytest.mark.parametrize("name", BULK)
def test_a_packet_that_was_polled_leaves_the_sentinel_in_its_place(name: str, capability: int) -> None:
    """Otherwise the next round would receive it once more."""
    lines = instructions(name, capability)
    polls = [
        (place, re.match(r"W: ld\.relaxed\.sys\.global\.v[24]\.b32 .*, (\[%\w+\])", line)) for place, line in enumerate(lines)
    ]
    polled = [(place, match[1]) for place, match in polls if match]
    assert polled, "the kernel polls packets"
    for place, address in polled:
        until_end = lines[place : place + next(places(lines[place:], r"^END:"))]
        got = until_end[next(places(until_end, r"^GOT:")) :]
        assert got[0] == f"GOT: mov.u32 %i, {SENTINEL:#x}"
        assert re.match(rf"st\.relaxed\.sys\.global\.v[24]\.b32 {re.escape(address)}, \{{%i, %i", got[1])


@CAPABILITIES
def test_a_group_of_72_ranks_runs_the_code_of_a_group_of_2(capability: int) -> None:
    """Nothing is unrolled over peers: the number of ranks is an argument, and no store to a peer stands twice for two of them."""
    stores = {name: len(list(places(instructions(name, capability), TO_A_PEER))) for name in ("counts-EP2", "counts-EP72")}
    assert stores["counts-EP2"] <= stores["counts-EP72"] <= 4 * stores["counts-EP2"], "four blocks of 32 lanes at most"
