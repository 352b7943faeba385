/* Giving up: bounded waits, abort records, and a reset into new buffers.
 *
 * N ranks go through PHASES operations; in each, every rank stores one word into a slot of every peer and waits for theirs
 * (counts, dispatch and combine, as far as waiting goes). Rank 0 may stop at any moment (SIGSTOP, a kill) and may wake up at
 * any later moment, or never. A wait may expire at any moment while its word has not come: clocks are arbitrary, so two
 * ranks may give up at the same time, and also on a rank that is only late. The last look and the record are two steps: the word
 * may come between them.
 *
 * Whoever leaves because of a record settles with the others on one record through the host's store (`claim`, first writer
 * wins). Then all ranks but 0 reset: they are numbered anew from 0, allocate new buffers and do one more operation.
 *
 * Rules (the same names in rules.py): send, poll, give_up.
 *
 * Checked: whoever is awake ends, with a result or an error (nobody_waits_for_ever); all that leave name the same
 * rank (named_different_ranks); nothing stored by a rank that wakes up
 * reaches the buffers of the next generation (read_stale_row).
 *
 * Seeded bugs: NO_SETTLING, REUSED_BUFFERS (the old buffers are emptied and used again), ONE_CLOCK (rank 1 alone
 * bounds its waits, and tells the others).
 */
#ifndef N
#define N 3
#endif
#ifndef PHASES
#define PHASES 2
#endif

#define AT(generation, phase, dst, src) ((((generation) * PHASES + (phase)) * N + (dst)) * N + (src))
#define NOBODY 255

byte slot[2 * PHASES * N * N]; /* 0: empty, else 1 + generation of who stored it */
byte record[N];                /* rank named, in each rank's control block */
byte settled = NOBODY;
byte named[N];                 /* whom a rank's exception names */
bool ended[N], left[N];
bool stopped;
bool came_through;             /* a rank other than 0 ended without an error: it will not come to a reset */
byte gone_on;

bool named_different_ranks, read_stale_row, nobody_waits_for_ever = true;

#define RUNS (me != 0 || !stopped)

#ifdef ONE_CLOCK
#define HAS_CLOCK (me == 1)
#else
#define HAS_CLOCK true
#endif

inline give_up(on) {
    atomic {
        if :: record[me] == NOBODY -> record[me] = on :: else fi;
        peer = 0
    };
    do
    :: atomic { RUNS && peer < N -> if :: record[peer] == NOBODY -> record[peer] = record[me] :: else fi; peer++ }
    :: atomic { peer == N -> break }
    od
}

proctype Rank(byte me) {
    byte phase, peer, to;
    do
    :: RUNS && phase < PHASES && record[me] != NOBODY -> goto leave
    :: RUNS && phase < PHASES && record[me] == NOBODY ->
        /* One store after another: a rank may stop between two of them, and wake up much later. */
        to = 0;
        do
        :: atomic { RUNS && to < N && to != me -> slot[AT(0, phase, to, me)] = 1; to++ }
        :: atomic { to == me -> to++ }
        :: atomic { to == N -> break }
        od;
        peer = 0;
        do
        :: atomic { RUNS && peer < N && peer != me && slot[AT(0, phase, me, peer)] != 0 -> peer++ }
        :: atomic { peer == me -> peer++ }
        :: atomic { peer == N -> break }
        :: RUNS && peer < N && peer != me && record[me] != NOBODY -> goto leave
        :: atomic { RUNS && HAS_CLOCK && peer < N && peer != me && slot[AT(0, phase, me, peer)] == 0 && record[me] == NOBODY ->
            to = peer }; give_up(to); goto leave
        od;
        phase++
    :: RUNS && phase == PHASES -> goto over
    od;
leave:
    atomic {
        RUNS ->
#ifdef NO_SETTLING
        named[me] = record[me];
#else
        if :: settled == NOBODY -> settled = record[me] :: else fi;
        named[me] = settled;
#endif
        left[me] = true;
        peer = 0;
        do
        :: peer < N ->
            if :: left[peer] && named[peer] != named[me] -> named_different_ranks = true :: else fi;
            assert(!named_different_ranks);
            peer++
        :: peer == N -> break
        od
    };
over:
    atomic { RUNS -> if :: me != 0 && !left[me] -> came_through = true :: else fi };
    /* reset(): all ranks but 0 meet, then go on in buffers of the next generation as ranks 0, 1, ... */
    if
    :: me != 0 && left[me] ->
        atomic { gone_on++ };
        if
        :: gone_on >= N - 1
        :: came_through -> goto done
        fi;
#ifdef REUSED_BUFFERS
#define GENERATION 0
#else
#define GENERATION 1
#endif
        atomic { peer = 1; do :: peer < N -> slot[AT(GENERATION, 0, me - 1, peer - 1)] = 0; peer++ :: peer == N -> break od };
        atomic { gone_on++ };
        if
        :: gone_on >= 2 * (N - 1)
        fi;
        atomic { to = 1;
            do :: to < N -> if :: to != me -> slot[AT(GENERATION, 0, to - 1, me - 1)] = 2 :: else fi; to++ :: to == N -> break od };
        peer = 1;
        do
        :: atomic { peer < N && peer != me && slot[AT(GENERATION, 0, me - 1, peer - 1)] != 0 ->
            read_stale_row = (slot[AT(GENERATION, 0, me - 1, peer - 1)] != 2); assert(!read_stale_row); peer++ }
        :: atomic { peer == me -> peer++ }
        :: atomic { peer == N -> break }
        od
    :: else
    fi;
done:
    ended[me] = true
}

proctype Fate() {
    if
    :: stopped = true;
        if
        :: stopped = false
        :: skip
        fi
    :: skip
    fi
}

proctype Watch() {
    byte r;
    atomic {
        timeout ->
        do
        :: r < N ->
            if :: !ended[r] && !(r == 0 && stopped) -> nobody_waits_for_ever = false :: else fi;
            assert(nobody_waits_for_ever);
            r++
        :: r == N -> break
        od
    }
}

init {
    atomic {
        byte i = 0;
        do :: i < N -> record[i] = NOBODY; named[i] = NOBODY; i++ :: else -> break od;
        i = 0;
        do :: i < N -> run Rank(i); i++ :: else -> break od;
        run Fate(); run Watch()
    }
}
