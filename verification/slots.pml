/* Sentinel slots and the exchange of counts that makes it safe to use them again. Each source has one slot at a rank for
 * dispatches and one for combines, which every round uses.
 *
 * N ranks run steps for ever. Each step: one exchange of counts, then ROUNDS rounds of dispatch and combine. In every step
 * every rank chooses anew whether it brings rows (tokens 1) or none (0). One slot holds WORDS words.
 *
 * Memory: a store is issued, and becomes visible to everyone at some later moment. Stores to different addresses become
 * visible in ANY order, those to one address in order. Only what the protocol claims to be ordered is ordered here: a rank's
 * restores (stores of the sentinel into its own slots) are performed before its next launch issues a store.
 * With LATE_RESTORES they are performed at that moment and no earlier: fewer states, and no fewer errors, since a restore on its
 * way forbids all that a performed one forbids.
 * Issuing all sends of a launch at once is no restriction, since each may become visible arbitrarily late: also where some
 * programs of a launch only send and others only receive, whose room is in split.pml.
 *
 * Rules (the same names in rules.py): count, send, poll, restore, launch.
 *
 * Checked: overwrote_unread_slot, overwrote_unread_count, read_stale_row, torn packets (as stale rows), and no deadlock.
 *
 * Seeded bugs, each of which has to be found:
 *   ONE_COUNT_PARITY   count packets of all steps share one place
 *   NO_COMBINE         a chain of dispatches without combines between them
 *   SKIP_ZERO_ROWS     a rank without a chosen expert sends no terms, and owners do not wait for it
 *   EARLY_COMBINE      a combine's sends do not wait until this rank has received, and restored, its dispatch
 *   UNORDERED_RESTORE  restores may still be on their way when the next launch sends
 *   TORN_POLL          a packet counts as arrived when its first word has arrived (WORDS 2, PACKET)
 * Other variant: PACKET (the words of a slot are one packet, polled together).
 */
#ifndef N
#define N 2
#endif
#ifndef ROUNDS
#define ROUNDS 2
#endif
#ifndef WORDS
#define WORDS 1
#endif

#define DISPATCH 0
#define COMBINE 1
#define SENTINEL 0
#define PAIRS (N * (N - 1))
#define PAIR(dst, src) ((dst) * (N - 1) + (src) - ((src) > (dst) -> 1 : 0))
#define SLOT(op, dst, src, word) (((op) * PAIRS + PAIR(dst, src)) * WORDS + (word))
#define OWNER(slot_number) ((((slot_number) / WORDS) % PAIRS) / (N - 1))
#define COUNT(parity, dst, src) ((parity) * PAIRS + PAIR(dst, src))
#define PEER(k) ((k) + ((k) >= me -> 1 : 0))

/* Rounds and steps are counted modulo EPOCHS: more than any two ranks can be apart. */
#ifndef EPOCHS
#define EPOCHS 8
#endif
#define TAG(round) (1 + (round))
#define PACKET_OF(step, tokens) (2 + 2 * (step) + (tokens))
#define STEP_OF(packet) (((packet) - 2) / 2)

#ifdef ONE_COUNT_PARITY
#define COUNT_PARITY(step) 0
#else
#define COUNT_PARITY(step) ((step) & 1)
#endif

byte slot[2 * PAIRS * WORDS];      /* what everyone sees: SENTINEL or the tag of a round */
byte sent[2 * PAIRS * WORDS];      /* the sender's store that is not visible yet */
bool restoring[2 * PAIRS * WORDS]; /* the receiver's store of the sentinel that is not performed yet */
byte restores[N];                  /* how many of those a rank has */
byte count[2 * PAIRS];
byte counted[2 * PAIRS];           /* the count packet that is not visible yet */
bool unread[2 * PAIRS];            /* a visible count packet that its receiver has not read */

bool overwrote_unread_slot, overwrote_unread_count, read_stale_row;

#ifdef UNORDERED_RESTORE
/* The bug is to be found by what it does to the receiver, a row lost or stale, not by looking at stores on their way. */
#define IN_USE(i) (slot[i] != SENTINEL && !restoring[i])
#else
#define IN_USE(i) (slot[i] != SENTINEL || restoring[i])
#endif

/* A store becomes visible. */
#define SEND_LANDS(i) \
    :: atomic { sent[i] != SENTINEL -> \
        overwrote_unread_slot = IN_USE(i); assert(!overwrote_unread_slot); \
        slot[i] = sent[i]; sent[i] = SENTINEL }
#define RESTORE_LANDS(i) \
    :: atomic { restoring[i] -> slot[i] = SENTINEL; restoring[i] = false; restores[OWNER(i)]-- }
#define COUNT_LANDS(i) \
    :: atomic { counted[i] != 0 -> \
        overwrote_unread_count = unread[i]; assert(!overwrote_unread_count); \
        count[i] = counted[i]; counted[i] = 0; unread[i] = true }
#ifdef LATE_RESTORES
#define LANDS(i) SEND_LANDS(i)
#else
#define LANDS(i) SEND_LANDS(i) RESTORE_LANDS(i)
#endif
#define LANDS4(i) LANDS(i) LANDS(i + 1) LANDS(i + 2) LANDS(i + 3)
#define COUNTS_LAND4(i) COUNT_LANDS(i) COUNT_LANDS(i + 1) COUNT_LANDS(i + 2) COUNT_LANDS(i + 3)

active proctype Wires() {
end:
    do
    LANDS4(0)
#if PAIRS * WORDS > 2
    LANDS4(4)
#endif
#if PAIRS * WORDS > 4
    LANDS4(8)
#endif
    COUNTS_LAND4(0)
#if N > 2
    COUNTS_LAND4(4)
    COUNTS_LAND4(8)
#endif
    od
}

/* launch: what this rank restored in earlier launches has been performed before this one stores. */
#if defined(UNORDERED_RESTORE)
#define LAUNCH true
#elif defined(LATE_RESTORES)
#define LAUNCH true; perform_restores()
#else
#define LAUNCH (restores[me] == 0)
#endif

inline perform_restores() {
    place = 0;
    do
    :: place < 2 * PAIRS * WORDS && OWNER(place) == me && restoring[place] ->
        slot[place] = SENTINEL; restoring[place] = false; place++
    :: place < 2 * PAIRS * WORDS && !(OWNER(place) == me && restoring[place]) -> place++
    :: place == 2 * PAIRS * WORDS -> break
    od;
    place = 0; restores[me] = 0
}

#ifdef SKIP_ZERO_ROWS
#define HAS_EXPERTS(rank) ((rank) != N - 1)
#else
#define HAS_EXPERTS(rank) true
#endif

#ifdef PACKET
#ifdef TORN_POLL
#define HERE(i) (slot[i] != SENTINEL)
#else
#define HERE(i) (slot[i] != SENTINEL && slot[(i) + 1] != SENTINEL)
#endif
#else
#define HERE(i) (slot[i] != SENTINEL)
#endif

inline send(op, dst) {
    word = 0;
    do
    :: word < WORDS ->
        place = SLOT(op, dst, me, word);
        overwrote_unread_slot = (sent[place] != SENTINEL);
        assert(!overwrote_unread_slot);
        sent[place] = TAG(round);
        word++
    :: else -> break
    od;
    word = 0
}

/* poll, and restore, which becomes visible later. A rank sees its own restore at once. */
#define WANTS(k, w) (todo & (1 << ((k) * WORDS + (w))))
#define POLL(op, k, w) \
    :: atomic { WANTS(k, w) && HERE(SLOT(op, me, PEER(k), w)) && !restoring[SLOT(op, me, PEER(k), w)] -> \
        place = SLOT(op, me, PEER(k), w); \
        poll_word(); todo = todo & ~(1 << ((k) * WORDS + (w))); POLL_REST(k); place = 0 }
#ifdef PACKET
/* Both words are there, or the packet has not arrived. */
#define POLL_REST(k) place++; poll_word(); todo = todo & ~(2 << ((k) * WORDS))
#define POLL_FROM(op, k) POLL(op, k, 0)
#elif WORDS > 1
#define POLL_REST(k) skip
#define POLL_FROM(op, k) POLL(op, k, 0) POLL(op, k, 1)
#else
#define POLL_REST(k) skip
#define POLL_FROM(op, k) POLL(op, k, 0)
#endif

inline poll_word() {
    read_stale_row = (slot[place] != TAG(round)); assert(!read_stale_row);
    restoring[place] = true; restores[me]++
}

inline poll_all(op) {
    do
    POLL_FROM(op, 0)
#if N > 2
    POLL_FROM(op, 1)
#endif
    :: todo == 0 -> break
    od
}

#define ALL_WORDS ((1 << WORDS) - 1)

proctype Rank(byte me) {
    byte step, round, rounds_done, tokens, busy, todo, peer, word, place;
    do
    :: true ->
        /* begin_step: count packets to every peer, then theirs. */
        if :: tokens = 0 :: tokens = 1 fi;
        atomic {
            LAUNCH; step = (step + 1) % EPOCHS; busy = tokens << me; peer = 0;
            do
            :: peer < N && peer != me ->
                overwrote_unread_count = (counted[COUNT(COUNT_PARITY(step), peer, me)] != 0);
                assert(!overwrote_unread_count);
                counted[COUNT(COUNT_PARITY(step), peer, me)] = PACKET_OF(step, tokens);
                peer++
            :: peer == me -> peer++
            :: peer == N -> break
            od;
            peer = 0
        };
        do
        :: atomic { peer < N && peer != me && count[COUNT(COUNT_PARITY(step), me, peer)] != 0 &&
                    STEP_OF(count[COUNT(COUNT_PARITY(step), me, peer)]) == step ->
            unread[COUNT(COUNT_PARITY(step), me, peer)] = false;
            busy = busy | ((count[COUNT(COUNT_PARITY(step), me, peer)] & 1) << peer);
            peer++ }
        :: atomic { peer == me -> peer++ }
        :: atomic { peer == N -> peer = 0; break }
        od;
        do
        :: rounds_done < ROUNDS ->
            /* dispatch */
            atomic {
                LAUNCH; peer = 0; todo = 0;
                do
                :: peer < N && peer != me ->
                    if :: tokens -> send(DISPATCH, peer) :: else fi;
#ifdef EARLY_COMBINE
                    if :: busy & (1 << peer) -> send(COMBINE, peer) :: else fi;
#endif
                    if :: busy & (1 << peer) -> todo = todo | (ALL_WORDS << ((peer - (peer > me -> 1 : 0)) * WORDS)) :: else fi;
                    peer++
                :: peer == me -> peer++
                :: peer == N -> break
                od;
                peer = 0
            };
            poll_all(DISPATCH);
#ifndef NO_COMBINE
            /* combine: all rows of every owner, to every owner that has rows */
            atomic {
                LAUNCH; peer = 0; todo = 0;
                do
                :: peer < N && peer != me ->
#ifndef EARLY_COMBINE
                    if :: (busy & (1 << peer)) && HAS_EXPERTS(me) -> send(COMBINE, peer) :: else fi;
#endif
                    if :: tokens && HAS_EXPERTS(peer) -> todo = todo | (ALL_WORDS << ((peer - (peer > me -> 1 : 0)) * WORDS)) :: else fi;
                    peer++
                :: peer == me -> peer++
                :: peer == N -> break
                od;
                peer = 0
            };
            poll_all(COMBINE);
#endif
            atomic { round = (round + 1) % EPOCHS; rounds_done++ }
        :: atomic { rounds_done == ROUNDS -> rounds_done = 0; break }
        od
    od
}

init {
    atomic {
        byte rank = 0;
        do
        :: rank < N -> run Rank(rank); rank++
        :: else -> break
        od
    }
}
