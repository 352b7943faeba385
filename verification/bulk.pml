/* Bulk rounds: rows stored straight to their final place, terms stored back where the owner's gathered rows were, flags that hold
 * the number of the round.
 *
 * N ranks run steps for ever. Each step: one full exchange of counts (its own protocol is in slots.pml; here it is a
 * rendezvous), then ROUNDS rounds. In every step every rank brings rows (tokens 1) or none (0), and the step is bulk or goes
 * through slots: those rounds count too but touch neither rows nor flags here.
 *
 * Memory as in slots.pml: stores to different addresses become visible in any order. A flag is stored with release: it
 * becomes visible only after all that its rank has stored before. A store of one step is visible before its rank enters the next
 * (else a flag that nobody waits for could be on its way for a whole range of epochs). Flags hold the round modulo EPOCHS (2**32 in the code).
 * A flag stands for those of all programs, and a term for all units of a combine.
 *
 * A place holds a row from one rank and then, in the same round, a term from another (with 2 ranks from the same).
 *
 * Rules (the same names in rules.py): send, signal.
 *
 * Checked: overwrote_unread_row (or term), read_stale_row (or term), and no deadlock.
 *
 * Variants:
 *   ALWAYS, NEVER      sets of ranks that always bring rows, or never: fewer states
 *   MAX_SLOT_ROUNDS    at most so many rounds in a row go through slots: a flag may be that old when it is looked at
 *   SOLO_AFTER_STEP    after the last combine of a step a rank runs a step alone, in its own memory, without any exchange
 *   UNORDERED_SIGNAL   flags are ordinary stores (a bug to be found)
 *   NO_READY           terms are pushed without asking whether the owner's rows were read (a bug to be found)
 *   NO_SUMMED            a rank goes on before the others have summed (a bug to be found)
 */
#ifndef N
#define N 2
#endif
#ifndef ROUNDS
#define ROUNDS 2
#endif
#ifndef EPOCHS
#define EPOCHS 4
#endif
#ifndef MAX_SLOT_ROUNDS
#define MAX_SLOT_ROUNDS (EPOCHS - 2)
#endif

#define AT(dst, src) ((dst) * N + (src))
#define NOTHING 255
#define SOLO 254

/* Sets of ranks, as bits: which always bring rows, which never. */
#ifndef ALWAYS
#define ALWAYS 0
#endif
#ifndef NEVER
#define NEVER 0
#endif
#define CHOOSE_TOKENS if :: !((NEVER >> me) & 1) -> tokens = 1 :: !((ALWAYS >> me) & 1) -> tokens = 0 fi

/* The truth about a row is the round that it belongs to, which does not repeat with the flags: modulo twice their range. */
#define TRUE_ROUNDS (2 * EPOCHS)
#define ROW(round) (round)
#define TERM(round) (TRUE_ROUNDS + (round))

/* Where a term from src lies at dst: in the place of another rank's row, if there is another. */
#if N == 2
#define TERM_PLACE(dst, src) AT(dst, src)
#else
#define TERM_PLACE(dst, src) AT(dst, 3 - (dst) - (src))
#endif

byte cell[N * N];     /* [dst][src] what lies there */
bool unread[N * N];
byte row_sent[N * N], term_sent[N * N]; /* [dst][src] not visible yet, or NOTHING */
byte arrived[N * N], arrived_sent[N * N];
byte ready[N * N], ready_sent[N * N];
byte pushed[N * N], pushed_sent[N * N];
byte summed[N * N], summed_sent[N * N];
byte entered;         /* ranks that have entered the exchange of counts; the last one opens it */
bool opened;
byte passed;
byte busy, brings;    /* bit r: rank r brings rows in this step; in the one that is being entered */
bool is_bulk;         /* else this step has one round through slots */
byte slot_rounds;     /* how many of those there have been in a row */

bool overwrote_unread_row, read_stale_row;

/* What a rank has sent and is not visible yet. A signal waits for rows and terms. */
#if N == 2
#define LANDED(places, src) (places[AT(0, src)] == NOTHING && places[AT(1, src)] == NOTHING)
#else
#define LANDED(places, src) (places[AT(0, src)] == NOTHING && places[AT(1, src)] == NOTHING && places[AT(2, src)] == NOTHING)
#endif
#define ALL_LANDED(src) (LANDED(row_sent, src) && LANDED(term_sent, src) && LANDED(arrived_sent, src) && \
    LANDED(ready_sent, src) && LANDED(pushed_sent, src) && LANDED(summed_sent, src))
#ifdef UNORDERED_SIGNAL
#define RELEASED(src) true
#else
#define RELEASED(src) (LANDED(row_sent, src) && LANDED(term_sent, src))
#endif

#define PUT(place, value) \
    overwrote_unread_row = unread[place]; assert(!overwrote_unread_row); \
    cell[place] = value; unread[place] = true

#define FLAG_LANDS(flags, sent, i) atomic { sent[i] != NOTHING && RELEASED((i) % N) -> flags[i] = sent[i]; sent[i] = NOTHING }

#define LANDS(i) \
    :: atomic { row_sent[i] != NOTHING -> PUT(i, row_sent[i]); row_sent[i] = NOTHING } \
    :: atomic { term_sent[i] != NOTHING -> PUT(TERM_PLACE((i) / N, (i) % N), term_sent[i]); term_sent[i] = NOTHING } \
    :: FLAG_LANDS(arrived, arrived_sent, i) \
    :: FLAG_LANDS(ready, ready_sent, i) \
    :: FLAG_LANDS(pushed, pushed_sent, i) \
    :: FLAG_LANDS(summed, summed_sent, i)

proctype Wires() {
end:
    do
#if N == 2
    LANDS(1) LANDS(2)
#else
    LANDS(1) LANDS(2) LANDS(3) LANDS(5) LANDS(6) LANDS(7)
#endif
    od
}

/* A later signal to the same place may overtake an earlier one only by replacing it: stores to one address keep their order. */
#define SIGNAL(flags) \
    peer = 0; \
    do \
    :: peer < N && peer != me -> flags[AT(peer, me)] = EPOCH; peer++ \
    :: peer == me -> peer++ \
    :: peer == N -> peer = 0; break \
    od

/* Waits for the flags of the peers for which `wanted` holds. */
#define AWAIT(flags, wanted, epoch) \
    do \
    :: atomic { peer < N && peer != me && (wanted) && flags[AT(me, peer)] == (epoch) -> peer++ } \
    :: atomic { peer < N && (peer == me || !(wanted)) -> peer++ } \
    :: atomic { peer == N -> peer = 0; break } \
    od

#define SEND(sent, wanted, value) \
    peer = 0; \
    do \
    :: peer < N && peer != me -> \
        if \
        :: (wanted) -> \
            overwrote_unread_row = (sent[AT(peer, me)] != NOTHING); assert(!overwrote_unread_row); \
            sent[AT(peer, me)] = value \
        :: else \
        fi; \
        peer++ \
    :: peer == me -> peer++ \
    :: peer == N -> peer = 0; break \
    od

#define READ(place, wanted, value) \
    peer = 0; \
    do \
    :: peer < N -> \
        if \
        :: peer != me && (wanted) -> \
            read_stale_row = (cell[place] != value); assert(!read_stale_row); \
            unread[place] = false; cell[place] = NOTHING \
        :: else \
        fi; \
        peer++ \
    :: peer == N -> peer = 0; break \
    od

#define IS_BUSY (busy & (1 << peer))

inline next_round() {
    round = (round + 1) % EPOCHS;
    true_round = (true_round + 1) % TRUE_ROUNDS
}

#define EPOCH ((round + 1) % EPOCHS)

proctype Rank(byte me) {
    byte round, true_round, rounds_done, tokens, peer;
    do
    :: true ->
        CHOOSE_TOKENS;
        /* Exchange of counts: nobody leaves before all have come. */
        atomic { !opened && ALL_LANDED(me) ->
            brings = brings | (tokens << me);
            entered++;
            if
            :: entered == N -> opened = true; entered = 0; busy = brings; brings = 0;
                if
                :: slot_rounds = 0; is_bulk = true
                :: slot_rounds < MAX_SLOT_ROUNDS -> slot_rounds++; is_bulk = false
                fi
            :: else
            fi };
        atomic { opened -> passed++; if :: passed == N -> passed = 0; opened = false :: else fi };
        if
        :: atomic { !is_bulk -> next_round() }
        :: is_bulk ->
            do
            :: rounds_done < ROUNDS ->
                /* dispatch: rows to every peer, then the flag; wait for those that bring rows */
                atomic { SEND(row_sent, tokens, ROW(true_round)); SIGNAL(arrived_sent) };
                AWAIT(arrived, IS_BUSY, EPOCH);
                /* The experts read everybody's rows. */
                atomic { READ(AT(me, peer), IS_BUSY, ROW(true_round)) };
                /* combine: terms to every owner that says so, then the flag; an owner waits for every rank, sums,
                 * and says so: nobody goes on before */
                atomic { SIGNAL(ready_sent) };
#ifndef NO_READY
                AWAIT(ready, IS_BUSY, EPOCH);
#endif
                atomic { SEND(term_sent, IS_BUSY, TERM(true_round)); SIGNAL(pushed_sent) };
                AWAIT(pushed, tokens, EPOCH);
                atomic { READ(TERM_PLACE(me, peer), tokens, TERM(true_round)); SIGNAL(summed_sent) };
#ifndef NO_SUMMED
                AWAIT(summed, IS_BUSY, EPOCH);
#endif
                atomic { next_round(); rounds_done++ }
            :: atomic { rounds_done == ROUNDS -> rounds_done = 0; break }
            od
        fi;
#ifdef SOLO_AFTER_STEP
        atomic {
            do
            :: peer < N ->
                overwrote_unread_row = unread[AT(me, peer)]; assert(!overwrote_unread_row);
                cell[AT(me, peer)] = SOLO; peer++
            :: peer == N -> peer = 0; break
            od
        };
        atomic {
            do
            :: peer < N -> read_stale_row = (cell[AT(me, peer)] != SOLO); assert(!read_stale_row); peer++
            :: peer == N -> peer = 0; break
            od
        }
#endif
    od
}

init {
    atomic {
        byte i = 0;
        do
        :: i < N * N ->
            cell[i] = NOTHING; row_sent[i] = NOTHING; term_sent[i] = NOTHING;
            arrived_sent[i] = NOTHING; ready_sent[i] = NOTHING; pushed_sent[i] = NOTHING; summed_sent[i] = NOTHING; i++
        :: else -> break
        od;
        run Wires();
        i = 0;
        do
        :: i < N -> run Rank(i); i++
        :: else -> break
        od
    }
}
