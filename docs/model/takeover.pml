/* A takeover between two processes, and a third that comes late: what goes on around the tables in tables.pml.

   Process 0 owns the service. Process 1 connects to it, on link 0; process 2, if there is one, at any moment to whoever
   owns the service then, on link 1. A link is two queues and a token, a pipe of two bytes that the kernel gives to one
   reader each. At any moment a process may be killed, or stopped, for a while or for good: FAULTS says how often. What
   was sent survives its sender. Time does not pass: SILENT and OVERTIME strike while the other process is stopped, and
   with SPURIOUS at any moment.

   Each action of a step is one that others can see, and between any two of them a process may die. When nothing can
   happen any more, Judge looks at what has come of it. */

#ifndef FAULTS
#define FAULTS 1
#endif
#ifndef SPURIOUS
#define SPURIOUS 0
#endif
#ifndef LINKS
#define LINKS 1
#endif
#define PROCESSES (LINKS + 1)
#define LAST (PROCESSES - 1)

mtype = { NOTHING }
mtype incumbent[LINKS];
mtype successor[LINKS];
chan incumbent_todo[LINKS] = [4] of { mtype };
chan successor_todo[LINKS] = [4] of { mtype };

#include "tables.pml"

chan to_incumbent[LINKS] = [8] of { mtype };
chan to_successor[LINKS] = [8] of { mtype };

byte owner_of[LINKS];        /* the process that has the incumbent's end; the successor's is process link + 1 */
byte bytes_read[LINKS];      /* of the token */
bool committed[LINKS];       /* it was the successor that read the first byte */
bool offered[LINKS];         /* the listeners have been sent */
bool kept[LINKS];            /* and have come */
bool connected[LINKS];
bool incumbent_lost[LINKS], successor_lost[LINKS];
bool incumbent_closed[LINKS], successor_closed[LINKS];

bool alive[PROCESSES], stopped[PROCESSES], for_good[PROCESSES];
bool accepting[PROCESSES];   /* takes connections of clients */
bool serving[PROCESSES];     /* owns the service, and may hand it over */
bool estate[PROCESSES];      /* holds the lock and the listeners */
bool may_decide[PROCESSES];  /* its user or its server may yet tell it not to serve */
bool told[PROCESSES];        /* and has */
bool cold[PROCESSES];        /* may start cold: it has got nothing, and nobody has told it not to serve */
byte faults;

#define runs(process) (alive[process] && !stopped[process])
#define strikes(process) (stopped[process] || (SPURIOUS && alive[process]))
#define gone_for_successor(link) (incumbent_closed[link] || !alive[owner_of[link]])
#define gone_for_incumbent(link) (successor_closed[link] || !alive[link + 1])
#define in_flight(link) (offered[link] && !kept[link] && alive[link + 1] && !successor_closed[link])
#define locked (estate[0] || estate[1] || estate[LAST] || in_flight(0) || in_flight(LINKS - 1))
#define incumbent_may_leave(link) \
    (incumbent_has_LEAVING(link) && incumbent[link] != I_GREETING && incumbent[link] != I_DRAINING)

/* Within a process one step is done to its end, actions and what comes of them, before anything else begins. */
#if LINKS == 1
#define incumbent_may_begin(link) empty(incumbent_todo[link])
#define successor_may_begin(link) empty(successor_todo[link])
#define other_is_undecided(link) false
#else
#define other_incumbent_rests(link, process) \
    (!connected[1 - link] || owner_of[1 - link] != process || empty(incumbent_todo[1 - link]))
#define incumbent_may_begin(link) (empty(incumbent_todo[link]) && other_incumbent_rests(link, owner_of[link]) && \
    (owner_of[link] == 0 || empty(successor_todo[0])))
#define successor_may_begin(link) (empty(successor_todo[link]) && other_incumbent_rests(link, link + 1))
#define other_is_undecided(link) \
    (connected[1 - link] && owner_of[1 - link] == owner_of[link] && incumbent_is_undecided(1 - link))
#endif

inline drain(queue) {
    do
    :: nempty(queue) -> queue?_
    :: empty(queue) -> break
    od
}

inline say(queue, lost, closed, lives, message) {
    if
    :: !lost && !closed && lives -> queue!message
    :: else
    fi
}

inline say_to_successor(link, message) {
    say(to_successor[link], incumbent_lost[link], successor_closed[link], alive[link + 1], message)
}

inline say_to_incumbent(link, message) {
    say(to_incumbent[link], successor_lost[link], incumbent_closed[link], alive[owner_of[link]], message)
}

inline give_up_the_service(process) {
    accepting[process] = false; estate[process] = false; serving[process] = false
}

/* Does an action; `event` is then what has come of it. */
inline incumbent_act(link, me, event) {
    if
    :: event == DO_OFFER && !offered[link] && !gone_for_incumbent(link) && !incumbent_lost[link] ->
        offered[link] = true; to_successor[link]!LISTENERS; event = NOTHING
    :: event == DO_OFFER && !offered[link] && (gone_for_incumbent(link) || incumbent_lost[link]) -> event = NOTHING
    :: event == DO_OFFER && offered[link] -> event = OFFERED
    :: event == DO_STOP_ACCEPTING -> accepting[me] = false; event = NOTHING
    :: event == DO_START_ACCEPTING -> accepting[me] = true; event = NOTHING
    :: event == DO_RELEASE || event == DO_STOP -> give_up_the_service(me); event = NOTHING
    :: event == DO_MOVE -> event = NOTHING
    :: event == DO_CLOSE -> incumbent_closed[link] = true; drain(to_incumbent[link]); event = NOTHING
    :: event == DO_TAKE_BACK && bytes_read[link] == 0 -> bytes_read[link] = 1; event = GOT_COMMIT
    :: event == DO_TAKE_BACK && bytes_read[link] == 1 -> bytes_read[link] = 2; event = GOT_SETTLE
    :: event == DO_TAKE_BACK && bytes_read[link] == 2 -> event = GOT_NOTHING
    :: event == REFUSE || event == COMMIT || event == ABORT || event == UNDO || event == DONE ->
        say_to_successor(link, event); event = NOTHING
    fi
}

inline successor_act(link, me, event) {
    if
    :: event == DO_KEEP -> estate[me] = true; kept[link] = true; event = NOTHING
    :: event == DO_START_ACCEPTING -> assert(committed[link]); accepting[me] = true; event = NOTHING
    :: event == DO_STOP_ACCEPTING -> give_up_the_service(me); event = NOTHING
    :: event == DO_ELDERS -> event = NOTHING
    :: event == DO_OPEN_CHANNEL -> say_to_incumbent(link, TAKE); event = NOTHING
    :: event == DO_CLOSE -> successor_closed[link] = true; drain(to_successor[link]); event = NOTHING
    :: event == DO_TAKE_COMMIT && bytes_read[link] == 0 ->
        bytes_read[link] = 1; committed[link] = true; event = GOT_COMMIT
    :: event == DO_TAKE_COMMIT && bytes_read[link] > 0 -> bytes_read[link] = 2; event = GOT_NOTHING
    :: event == DO_TAKE_SETTLE && bytes_read[link] == 1 -> bytes_read[link] = 2; event = GOT_SETTLE
    :: event == DO_TAKE_SETTLE && bytes_read[link] == 2 -> event = GOT_NOTHING
    :: event == TAKEN -> say_to_incumbent(link, TAKEN); event = COMPLETE
    :: event == JOIN || event == READY || event == ALIVE || event == SETTLED || event == ABORT ->
        say_to_incumbent(link, event); event = NOTHING
    fi
}

/* What a successor is once its part is settled. */
inline settle(link, me) {
    if
    :: successor[link] == S_FAILED || successor[link] == S_UNDONE ->
        give_up_the_service(me);
        cold[me] = !told[me] && !kept[link]
    :: successor[link] == S_OWNER && told[me] -> give_up_the_service(me)
    :: successor[link] == S_OWNER && !told[me] -> serving[me] = true
    :: else
    fi
}

proctype Incumbent(byte link) {
    mtype event = NOTHING;
    byte me;
end:
    connected[link];
    me = owner_of[link];
end_of_step:
    do
    :: atomic {
        if
        :: runs(me) && nempty(incumbent_todo[link]) ->
            incumbent_todo[link]?event;
            incumbent_act(link, me, event)
        :: runs(me) && incumbent_may_begin(link) && !incumbent_closed[link] && !incumbent_lost[link] &&
            nempty(to_incumbent[link]) ->
            to_incumbent[link]?event;
            if
            :: event == JOIN && (!serving[me] || other_is_undecided(link)) -> event = DENIED
            :: else
            fi
        :: runs(me) && incumbent_may_begin(link) && !incumbent_closed[link] && incumbent_has_LOST(link) &&
            (incumbent_lost[link] || (empty(to_incumbent[link]) && gone_for_incumbent(link))) ->
            incumbent_lost[link] = true; event = LOST
        :: runs(me) && incumbent_may_begin(link) && strikes(link + 1) && incumbent_has_SILENT(link) -> event = SILENT
        :: runs(me) && incumbent_may_begin(link) && strikes(link + 1) && incumbent_has_OVERTIME(link) -> event = OVERTIME
        :: runs(me) && incumbent_may_begin(link) && incumbent_has_PROBATION_OVER(link) -> event = PROBATION_OVER
        :: runs(me) && incumbent_may_begin(link) && may_decide[me] && incumbent_may_leave(link) ->
            may_decide[me] = false; told[me] = true; event = LEAVING
        fi;
        if
        :: event != NOTHING -> incumbent_row(link, event)
        :: else
        fi;
        event = NOTHING
    }
    od
}

proctype Successor(byte link) {
    mtype event = NOTHING;
    byte me = link + 1;
end:
    if
    :: atomic { runs(me) && runs(0) && serving[0] -> owner_of[link] = 0 }
    :: atomic { link > 0 && runs(me) && runs(1) && serving[1] -> owner_of[link] = 1 }
    fi;
    atomic {
        incumbent[link] = I_GREETING; successor[link] = S_GREETING; to_successor[link]!HELLO; connected[link] = true
    }
end_of_step:
    do
    :: atomic {
        if
        :: runs(me) && nempty(successor_todo[link]) ->
            successor_todo[link]?event;
            successor_act(link, me, event)
        :: runs(me) && successor_may_begin(link) && !successor_closed[link] && !successor_lost[link] &&
            nempty(to_successor[link]) -> to_successor[link]?event
        :: runs(me) && successor_may_begin(link) && !successor_closed[link] && successor_has_LOST(link) &&
            (successor_lost[link] || (empty(to_successor[link]) && gone_for_successor(link))) ->
            successor_lost[link] = true; event = LOST
        :: runs(me) && successor_may_begin(link) && strikes(owner_of[link]) && successor_has_SILENT(link) -> event = SILENT
        :: runs(me) && successor_may_begin(link) && strikes(owner_of[link]) && successor_has_OVERTIME(link) -> event = OVERTIME
        :: runs(me) && successor_may_begin(link) && successor_has_WARM(link) -> event = WARM
        :: runs(me) && successor_may_begin(link) && successor_has_ACCEPTING(link) -> event = ACCEPTING
        :: runs(me) && successor_may_begin(link) && may_decide[me] && successor_has_FAIL(link) ->
            may_decide[me] = false; told[me] = true; event = FAIL
        :: runs(me) && successor_may_begin(link) && may_decide[me] && successor_has_LEAVING(link) ->
            may_decide[me] = false; told[me] = true; event = LEAVING
        :: runs(me) && cold[me] && !locked -> cold[me] = false; accepting[me] = true; estate[me] = true; serving[me] = true
        fi;
        if
        :: event != NOTHING -> successor_row(link, event); settle(link, me)
        :: else
        fi;
        event = NOTHING
    }
    od
}

proctype Faults(byte process) {
end:
    do
    :: atomic {
            faults > 0 && alive[process] ->
            faults--; alive[process] = false; stopped[process] = false; cold[process] = false;
            give_up_the_service(process)
        }
    :: atomic { faults > 0 && runs(process) -> faults--; stopped[process] = true }
    :: atomic { stopped[process] && !for_good[process] -> stopped[process] = false }
    :: atomic { stopped[process] && !for_good[process] -> for_good[process] = true }
    od
}

#define owns(process) (runs(process) && accepting[process])
#define is_willing(process) (runs(process) && !told[process] && (estate[process] || (cold[process] && !locked)))
#define rests_incumbent(link) \
    (!connected[link] || !runs(owner_of[link]) || incumbent_is_final(link) || incumbent[link] == I_DRAINING)
#define rests_successor(link) (!connected[link] || !runs(link + 1) || successor_is_final(link) || \
    successor[link] == S_OWNER)

proctype Judge() {
end:
    timeout;
    assert(owns(0) + owns(1) + (LINKS > 1 && owns(LAST)) <= 1);
    assert(!(is_willing(0) || is_willing(1) || is_willing(LAST)) || owns(0) || owns(1) || owns(LAST));
    assert(rests_incumbent(0) && rests_successor(0) && rests_incumbent(LINKS - 1) && rests_successor(LINKS - 1))
}

init {
    byte number;
    atomic {
        select(number : 0 .. FAULTS);
        faults = number;
        number = 0;
        do
        :: number < PROCESSES ->
            alive[number] = true;
            if
            :: may_decide[number] = true
            :: may_decide[number] = false
            fi;
            run Faults(number);
            number++
        :: else -> break
        od;
        accepting[0] = true; serving[0] = true; estate[0] = true;
        number = 0;
        do
        :: number < LINKS -> run Incumbent(number); run Successor(number); number++
        :: else -> break
        od;
        run Judge()
    }
}
