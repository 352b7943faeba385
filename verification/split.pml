/* Programs of a launch that only send beside programs that only receive, and room for so many at once on each GPU.
 *
 * Two ranks run launches for ever, each of PROGRAMS programs. A program takes room when there is some, in any order, and gives
 * it back when it ends. One of the next launch may take room as soon as all of this one have begun and know that the launch before
 * is over (programmatic dependent launch), and then waits for the end of this one. A program that sends does so at once; one that
 * receives waits until all that send at the peer have. In every launch each rank chooses for itself whether it splits: then the
 * first SENDERS programs only send, and the others only receive. Else every program sends first, and then receives.
 *
 * What slots need to be used again is in slots.pml, where sends become visible arbitrarily late: those of other programs of the
 * launch included.
 *
 * Checked: no deadlock.
 *
 * Variants:
 *   ROOM     programs that a GPU holds at once; with fewer than PROGRAMS ranks wait for each other (a bug to be found)
 *   NEVER    no rank splits: then the same room is needed (a bug to be found with less)
 */
#ifndef PROGRAMS
#define PROGRAMS 3
#endif
#ifndef SENDERS
#define SENDERS 1
#endif
#ifndef ROOM
#define ROOM PROGRAMS
#endif

/* Launches are counted modulo three: a rank is at most one ahead of the other, and looks at the one before its own. */
#define LAUNCHES 3
#define AT(rank, launch) ((rank) * LAUNCHES + (launch))
#define BEFORE ((launch + LAUNCHES - 1) % LAUNCHES)
#define UNDECIDED 0

byte room[2] = ROOM;
byte passed[2 * LAUNCHES], ended[2 * LAUNCHES], sent[2 * LAUNCHES];
byte sending[2 * LAUNCHES]; /* how many of a launch's programs send; UNDECIDED before its first begins */

#define PASSED_BEFORE (is_first || passed[AT(me, BEFORE)] == PROGRAMS)
#define ENDED_BEFORE (is_first || ended[AT(me, BEFORE)] == PROGRAMS)
#define SPLITS (sending[AT(me, launch)] < PROGRAMS)

proctype Program(byte me; byte number) {
    byte launch;
    bool is_first = true;
    do
    :: atomic { room[me] > 0 && PASSED_BEFORE ->
            room[me]--;
            if
            :: sending[AT(me, launch)] == UNDECIDED ->
                if
                :: sending[AT(me, launch)] = PROGRAMS
#ifndef NEVER
                :: sending[AT(me, launch)] = SENDERS
#endif
                fi
            :: else
            fi };
        atomic { ENDED_BEFORE ->
            passed[AT(me, launch)]++;
            if :: number < sending[AT(me, launch)] -> sent[AT(me, launch)]++ :: else fi };
        atomic { (SPLITS && number < SENDERS) ||
                 (sending[AT(1 - me, launch)] != UNDECIDED && sent[AT(1 - me, launch)] == sending[AT(1 - me, launch)]) ->
            ended[AT(me, launch)]++; room[me]++;
            if
            :: ended[AT(me, launch)] == PROGRAMS -> /* the launch after the next counts where the one before did: nobody looks */
                passed[AT(me, BEFORE)] = 0; ended[AT(me, BEFORE)] = 0; sent[AT(me, BEFORE)] = 0; sending[AT(me, BEFORE)] = UNDECIDED
            :: else
            fi;
            launch = (launch + 1) % LAUNCHES; is_first = false }
    od
}

init {
    atomic {
        byte number = 0;
        do
        :: number < PROGRAMS -> run Program(0, number); run Program(1, number); number++
        :: else -> break
        od
    }
}
