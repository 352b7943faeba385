/* Busy ranks: a time-out begins anew with each sign of life, for LONGEST ticks in all.
 *
 * N ranks go through two operations, in which ranks store a word for one another and wait for it, as in abort.pml. In the first
 * one rank 0 has rows for rank 1 alone: so rank 2 may come to wait for rank 1 while that one waits for rank 0. Before either
 * operation rank 0 may be busy, for as long as it likes. It then gives signs of life: it counts up a word at each of its peers,
 * one peer after another. It may stop at any moment, also between two of these, and may wake up at any later moment, or never.
 *
 * Time is a clock that all share. In one of its ticks every rank that waits looks at least once, and a busy rank that is awake
 * gives a sign to each of its peers: polls take microseconds, signs come four times a second, time-outs are seconds. A wait that
 * has had no sign for TIMEOUT ticks gives up, and one that has lasted LONGEST ticks in any case. A look is one step: what it reads
 * is a microsecond old.
 *
 * Checked: nobody is given up for want of signs while rank 0 is awake and has been busy for a tick
 * (gave_up_beside_a_busy_rank); a wait without signs ends after TIMEOUT ticks (waited_without_a_sign), any wait after LONGEST
 * (waited_too_long); whoever is awake ends (nobody_waits_for_ever).
 *
 * Seeded bugs: PER_SOURCE (only signs of the rank that is waited for count), NOT_RENEWED (that a rank has been busy counts until it
 * says that it is not), NO_BOUND (signs count for ever), FIRST_PEER_ALONE (rank 0 gives signs to one peer).
 */
#define N 3
#define TIMEOUT 2
#define LONGEST 4
#ifndef OPERATIONS
#define OPERATIONS 2
#endif
#define NOBODY 255

#define AT(operation, dst, src) (((operation) * N + (dst)) * N + (src))
#define RUNS (me != 0 || !stopped)
#define IS_AWAITED(operation, src) ((operation) == 1 || (src) != 0 || me == 1)

bool slot[OPERATIONS * N * N];
byte record[N];
bool is_new[N];                /* the number of signs is not what a rank that waits saw last */
bool waits[N], looked[N], ended[N];
byte idle[N];                  /* ticks since a rank that waits has seen a sign, or begun to wait */
byte total[N];                 /* ticks since it has begun to wait */
byte silent[N];                /* ticks since the last sign, seen or not, or since it has begun to wait */
bool was_told[N];               /* has had a sign in this tick */
bool stopped, busy, was_busy;

bool gave_up_beside_a_busy_rank, waited_without_a_sign, waited_too_long, nobody_waits_for_ever = true;

#ifdef NO_BOUND
#define IS_TOO_LONG false
#else
#define IS_TOO_LONG (total[me] >= LONGEST)
#endif

/* What no longer matters is made equal, so that there are fewer states. */
inline end_wait() {
    waits[me] = false; looked[me] = false; idle[me] = 0; total[me] = 0; silent[me] = 0; is_new[me] = false
}

inline look() {
    looked[me] = true;
#ifdef NOT_RENEWED
    if :: busy -> idle[me] = 0 :: else fi
#else
#ifdef PER_SOURCE
    if :: (is_new[me] && peer == 0) -> idle[me] = 0 :: else fi;
#else
    if :: is_new[me] -> idle[me] = 0 :: else fi;
#endif
    is_new[me] = false
#endif
}

proctype Rank(byte me) {
    byte operation, peer;
    do
    :: operation == OPERATIONS -> break
    :: operation < OPERATIONS ->
        if
        :: me == 0 -> atomic { RUNS -> busy = true; was_busy = false };
            atomic { RUNS -> busy = false; was_busy = false }
        :: skip
        fi;
        atomic { RUNS ->
            peer = 0;
            do
            :: peer < N -> slot[AT(operation, peer, me)] = true; peer++
            :: peer == N -> break
            od;
            peer = 0; waits[me] = true };
        do
        :: atomic { RUNS && peer < N && (slot[AT(operation, me, peer)] || !IS_AWAITED(operation, peer)) -> peer++ }
        :: atomic { peer == N -> end_wait(); break }
        :: atomic { RUNS && peer < N && record[me] != NOBODY -> end_wait(); goto over }
        :: atomic { RUNS && peer < N && IS_AWAITED(operation, peer) && !slot[AT(operation, me, peer)] && record[me] == NOBODY ->
            look();
            if
            :: idle[me] >= TIMEOUT || IS_TOO_LONG ->
                gave_up_beside_a_busy_rank = !IS_TOO_LONG && busy && !stopped && was_busy;
                assert(!gave_up_beside_a_busy_rank);
                end_wait(); record[me] = peer; peer = 0;
                do
                :: peer < N -> if :: record[peer] == NOBODY -> record[peer] = record[me] :: else fi; peer++
                :: peer == N -> break
                od;
                goto over
            :: else
            fi }
        od;
        operation++
    od;
over:
    ended[me] = true
}

/* The thread of rank 0. */
proctype Signs() {
    do
    :: atomic { !stopped && busy && !was_told[1] -> was_told[1] = true; silent[1] = 0; is_new[1] = waits[1] }
    :: atomic { !stopped && busy && !was_told[2] -> was_told[2] = true;
#ifndef FIRST_PEER_ALONE
        is_new[2] = waits[2];
#endif
        silent[2] = 0 }
    :: ended[0] && ended[1] && ended[2] -> break
    od
}

#define HAS_LOOKED(r) (!waits[r] || looked[r] || (r == 0 && stopped))
#define SIGNS_ARE_GIVEN (!busy || stopped || (was_told[1] && was_told[2]))
#define WAITS(r) (waits[r] && !(r == 0 && stopped))

proctype Clock() {
    byte r;
    do
    :: atomic { (WAITS(0) || WAITS(1) || WAITS(2)) && HAS_LOOKED(0) && HAS_LOOKED(1) && HAS_LOOKED(2) && SIGNS_ARE_GIVEN ->
        r = 0;
        do
        :: r < N ->
            if
            :: WAITS(r) ->
                idle[r]++; total[r]++; silent[r]++; looked[r] = false;
                waited_without_a_sign = silent[r] > TIMEOUT + 1; assert(!waited_without_a_sign);
                waited_too_long = total[r] > LONGEST; assert(!waited_too_long)
            :: else
            fi;
            r++
        :: r == N -> break
        od;
        was_busy = busy && !stopped; was_told[1] = false; was_told[2] = false; r = 0 }
    :: ended[0] && ended[1] && ended[2] -> break
    od
}

proctype Fate() {
    if
    :: stopped = true;
        if
        :: atomic { stopped = false; was_busy = false }
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
        do :: i < N -> record[i] = NOBODY; i++ :: else -> break od;
        i = 0;
        do :: i < N -> run Rank(i); i++ :: else -> break od;
        run Signs(); run Clock(); run Fate(); run Watch()
    }
}
