/* Bulk rounds: rows stored straight to their final place, arrival counters that hold the number of the bulk round.
 *
 * N ranks run steps for ever. Each step: one full exchange of counts (its own protocol is in slots.pml; here it is a
 * rendezvous), then ROUNDS rounds. In every step every rank brings rows (tokens 1) or none (0), and the step is bulk or goes
 * through slots: those rounds do not count, and touch neither rows nor counters here.
 *
 * Memory as in slots.pml: stores to different addresses become visible in any order. A counter is stored with release: it
 * becomes visible only after all that its rank has stored before. A store of one step is visible before its rank enters the next
 * (else a counter that nobody waits for could be on its way for a whole range of epochs). Counters hold the round modulo EPOCHS (2**32 in the code).
 *
 * Rules (the same names in rules.py): send, signal.
 *
 * Checked: overwrote_unread_row, read_stale_row (rows and terms), and no deadlock.
 *
 * A counter stands for the flags of all CTAs: a CTA waits for the CTA with the same index at every peer alone, and reads only what
 * that one has sent or copied; a launch is over when all its CTAs are. Both halves of an operation are one here.
 *
 * Variants:
 *   ALWAYS, NEVER      sets of ranks that always bring rows, or never: fewer states
 *   COUNTED_IN_SLOTS   up to so many rounds in a row go through slots, and count: a counter may be a whole range old when it is
 *                      looked at (a bug to be found)
 *   COMBINE_IN_SLOTS   the combine of a round whose dispatch is bulk goes through slots, which hold the sentinel again once they
 *                      are read (rows of bytes: their dispatch is bulk in every step); checked too: overwrote_unread_slot
 *   UNCOUNTED_ROUNDS   such rounds do not count (a bug to be found)
 *   WRITE_AFTER_STEP   after the last combine of a step a rank writes its terms without any exchange (a bug to be found)
 *   UNORDERED_SIGNAL   the counter is an ordinary store (a bug to be found)
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

#define AT(dst, src) ((dst) * N + (src))
#define DISPATCH 0
#define COMBINE 1
#define NOTHING 255

/* Sets of ranks, as bits: which always bring rows, which never. */
#ifndef ALWAYS
#define ALWAYS 0
#endif
#ifndef NEVER
#define NEVER 0
#endif
#define CHOOSE_TOKENS if :: !((NEVER >> me) & 1) -> tokens = 1 :: !((ALWAYS >> me) & 1) -> tokens = 0 fi

#ifdef COUNTED_IN_SLOTS
#define MAY_GO_IN_SLOTS slot_rounds < COUNTED_IN_SLOTS -> slot_rounds++
#else
#define MAY_GO_IN_SLOTS true
#endif

#define REACHED(counter, wanted) ((counter) == (wanted))

/* The truth about a row is the round that it belongs to, which does not repeat with the counters: modulo twice their range. */
#define TRUE_ROUNDS (2 * EPOCHS)

byte row[N * N];      /* [dst][src] gathered row: the true round of its contents */
byte row_sent[N * N]; /* not visible yet, or NOTHING */
bool row_unread[N * N];
byte terms[N * N];    /* [holder][owner] term: the true round; written and fetched in the holder's memory */
byte arrived[N * N], arrived_sent[N * N];
byte ready[N * N], ready_sent[N * N];
#ifdef COMBINE_IN_SLOTS
byte term[N * N], term_sent[N * N]; /* [owner][holder] a term in a slot: the true round, or NOTHING */
#endif
byte entered;         /* ranks that have entered the exchange of counts; the last one opens it */
bool opened;
byte passed;
byte busy, brings;    /* bit r: rank r brings rows in this step; in the one that is being entered */
bool is_bulk;         /* else this step has one round through slots */
byte slot_rounds;     /* how many of those there have been in a row, if they count */

bool overwrote_unread_row, overwrote_unread_slot, read_stale_row;

/* Rows that a rank has sent and that are not visible yet. A signal waits for them. */
#if N == 2
#define LANDED(places, src) (places[AT(0, src)] == NOTHING && places[AT(1, src)] == NOTHING)
#else
#define LANDED(places, src) (places[AT(0, src)] == NOTHING && places[AT(1, src)] == NOTHING && places[AT(2, src)] == NOTHING)
#endif
#define ALL_LANDED(src) (LANDED(row_sent, src) && LANDED(arrived_sent, src) && LANDED(ready_sent, src))
#ifdef UNORDERED_SIGNAL
#define RELEASED(src) true
#else
#define RELEASED(src) LANDED(row_sent, src)
#endif

#ifdef COMBINE_IN_SLOTS
#define LANDS_IN_SLOT(i) :: atomic { term_sent[i] != NOTHING -> term[i] = term_sent[i]; term_sent[i] = NOTHING }
#else
#define LANDS_IN_SLOT(i)
#endif

#define LANDS(i) LANDS_IN_SLOT(i) \
    :: atomic { row_sent[i] != NOTHING -> \
        overwrote_unread_row = row_unread[i]; assert(!overwrote_unread_row); \
        row[i] = row_sent[i]; row_sent[i] = NOTHING; row_unread[i] = true } \
    :: atomic { arrived_sent[i] != NOTHING && RELEASED((i) % N) -> arrived[i] = arrived_sent[i]; arrived_sent[i] = NOTHING } \
    :: atomic { ready_sent[i] != NOTHING -> ready[i] = ready_sent[i]; ready_sent[i] = NOTHING }

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
#define SIGNAL(counters, epoch) \
    peer = 0; \
    do \
    :: peer < N && peer != me -> counters[AT(peer, me)] = epoch; peer++ \
    :: peer == me -> peer++ \
    :: peer == N -> peer = 0; break \
    od

inline next_round() {
    round = (round + 1) % EPOCHS;
    true_round = (true_round + 1) % TRUE_ROUNDS
}

#define EPOCH ((round + 1) % EPOCHS)

proctype Rank(byte me) {
    byte round, true_round, done, tokens, peer;
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
                :: MAY_GO_IN_SLOTS; is_bulk = false
                fi
            :: else
            fi };
        atomic { opened -> passed++; if :: passed == N -> passed = 0; opened = false :: else fi };
        if
        :: atomic { !is_bulk ->
#ifdef COUNTED_IN_SLOTS
            next_round()
#else
            skip
#endif
           }
        :: is_bulk ->
            do
            :: done < ROUNDS ->
                /* dispatch: rows to every peer, then the counter; wait for those that bring rows */
                atomic {
                    peer = 0;
                    do
                    :: peer < N && peer != me ->
                        if
                        :: tokens ->
                            overwrote_unread_row = (row_sent[AT(peer, me)] != NOTHING); assert(!overwrote_unread_row);
                            row_sent[AT(peer, me)] = true_round
                        :: else
                        fi;
                        peer++
                    :: peer == me -> peer++
                    :: peer == N -> peer = 0; break
                    od;
                    SIGNAL(arrived_sent, EPOCH)
                };
                do
                :: atomic { peer < N && peer != me && (busy & (1 << peer)) && REACHED(arrived[AT(me, peer)], EPOCH) -> peer++ }
                :: atomic { peer < N && (peer == me || !(busy & (1 << peer))) -> peer++ }
                :: atomic { peer == N -> peer = 0; break }
                od;
                /* The experts read everybody's rows, and write their terms where owners fetch them. */
                atomic {
                    do
                    :: peer < N ->
                        if
                        :: peer != me && (busy & (1 << peer)) ->
                            read_stale_row = (row[AT(me, peer)] != true_round); assert(!read_stale_row);
                            row_unread[AT(me, peer)] = false; row[AT(me, peer)] = NOTHING
                        :: else
                        fi;
                        terms[AT(me, peer)] = true_round;
                        peer++
                    :: peer == N -> peer = 0; break
                    od
                };
#ifdef COMBINE_IN_SLOTS
                /* combine: a term to every owner with rows; an owner waits for every rank's and empties the slot */
                atomic {
                    do
                    :: peer < N && peer != me && (busy & (1 << peer)) ->
                        overwrote_unread_slot = (term_sent[AT(peer, me)] != NOTHING || term[AT(peer, me)] != NOTHING);
                        assert(!overwrote_unread_slot);
                        term_sent[AT(peer, me)] = true_round; peer++
                    :: peer < N && (peer == me || !(busy & (1 << peer))) -> peer++
                    :: peer == N -> peer = 0; break
                    od
                };
                do
                :: atomic { peer < N && peer != me && tokens && term[AT(me, peer)] != NOTHING ->
                    read_stale_row = (term[AT(me, peer)] != true_round); assert(!read_stale_row);
                    term[AT(me, peer)] = NOTHING; peer++ }
                :: atomic { peer < N && (peer == me || !tokens) -> peer++ }
                :: atomic { peer == N -> peer = 0; break }
                od;
#else
                /* combine: the counter, after the terms; an owner waits for every rank and fetches */
                atomic { SIGNAL(ready_sent, EPOCH) };
                do
                :: atomic { peer < N && peer != me && tokens && REACHED(ready[AT(me, peer)], EPOCH) -> peer++ }
                :: atomic { peer < N && (peer == me || !tokens) -> peer++ }
                :: atomic { peer == N -> peer = 0; break }
                od;
                do
                :: atomic { peer < N && peer != me && tokens ->
                    read_stale_row = (terms[AT(peer, me)] != true_round); assert(!read_stale_row); peer++ }
                :: atomic { peer < N && (peer == me || !tokens) -> peer++ }
                :: atomic { peer == N -> peer = 0; break }
                od;
#endif
#ifdef UNCOUNTED_ROUNDS
                atomic { true_round = (true_round + 1) % TRUE_ROUNDS; done++ }
#else
                atomic { next_round(); done++ }
#endif
            :: atomic { done == ROUNDS -> done = 0; break }
            od
        fi;
#ifdef WRITE_AFTER_STEP
        /* E.g. a warm-up of this rank alone, if its experts wrote into the same terms. */
        atomic {
            do
            :: peer < N -> terms[AT(me, peer)] = NOTHING; peer++
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
#ifdef COMBINE_IN_SLOTS
            term[i] = NOTHING; term_sent[i] = NOTHING;
#endif
            row[i] = NOTHING; row_sent[i] = NOTHING; terms[i] = NOTHING; arrived_sent[i] = NOTHING; ready_sent[i] = NOTHING; i++
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
