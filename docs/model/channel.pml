/* A channel, along which connections move from one loop to another: what goes on around the tables in
   channel_tables.pml. Process 0 is the giver, process 1 the taker; they share a token, a pipe of one byte, and whoever
   reads it decides about what is on its way. BATCHES batches go over, each of one connection; up to WINDOW of them are
   on their way at a time. A taker may refuse any, and a handler may end any while it stands still, so that it stays.

   At any moment a process may be stopped for a while or for good, or with DEADLY be killed, or send something that
   cannot be read: FAULTS says how often. What was sent survives its sender. Time does not pass: SILENT strikes while
   the other process is stopped or nothing is going to come, and with SPURIOUS at any moment. The giver may leave at
   any moment, which closes what it serves.

   Each action of a step is one that others can see, and between any two of them a process may die. When nothing can
   happen any more, Judge looks at what has come of it. That somebody serves each connection then is promised for one
   deadly fault in a move at which no limit strikes for no reason; SERVES says whether it is asked for. */

#ifndef FAULTS
#define FAULTS 1
#endif
#ifndef SPURIOUS
#define SPURIOUS 0
#endif
#ifndef DEADLY
#define DEADLY 1
#endif
#ifndef SERVES
#define SERVES 1
#endif
#ifndef BATCHES
#define BATCHES 2
#endif
#ifndef WINDOW
#define WINDOW 2
#endif
#define GIVER_PROCESS 0
#define TAKER_PROCESS 1

mtype = { NOTHING, SERVED, STANDING, LEFT }
mtype giver[1];
mtype taker[1];
chan giver_todo[1] = [4] of { mtype };
chan taker_todo[1] = [4] of { mtype };

#include "channel_tables.pml"

chan to_giver = [8] of { mtype, byte, bool };   /* what, of which batch, and whether it is refused, or stays */
chan to_taker = [8] of { mtype, byte, bool };

bool token_read, read_by_giver;
byte sent_batches, answered; /* the giver's: of those in between each is on its way */
byte adopted_batches, begun; /* the taker's: of those in between each stands still there */
bool staying[BATCHES];       /* its handler has ended, and the giver waits for the taker to have dropped it */
bool refusing;               /* the batch that the taker is adopting */

mtype at_giver[BATCHES], at_taker[BATCHES];
bool sent[BATCHES], adopted[BATCHES], refused[BATCHES], stays[BATCHES]; /* as was said to the other end */
bool resumed[BATCHES];       /* the giver has served it after it was taken out of the loop */
bool started[BATCHES];       /* the taker has served it */

bool giver_lost, taker_lost, giver_closed, taker_closed, unreadable_to_giver, leaving, may_leave;
bool alive[2], stopped[2], for_good[2];
byte faults;
byte each;                   /* of a loop over the batches */

#define runs(process) (alive[process] && !stopped[process])
#define strikes(process) (stopped[process] || (SPURIOUS && alive[process]))
#define taker_is_gone (!alive[TAKER_PROCESS] || taker_closed)
#define giver_is_gone (!alive[GIVER_PROCESS] || giver_closed)
#define giver_loses (giver_lost && (giver_has_LOST(0) || (unreadable_to_giver && giver_has_FAIL(0))))
#define taker_loses (taker_lost && taker_has_LOST(0))
#define nothing_is_said (empty(giver_todo[0]) && empty(taker_todo[0]) && empty(to_giver) && empty(to_taker) && \
    !giver_loses && !taker_loses)
#define something_stays (staying[0] || staying[BATCHES - 1] || (BATCHES > 2 && staying[1]))
#define giver_reads (runs(GIVER_PROCESS) && empty(giver_todo[0]) && !leaving && !giver_lost && !giver_is_final(0) && \
    nempty(to_giver))
#define taker_reads (runs(TAKER_PROCESS) && empty(taker_todo[0]) && !taker_lost && !taker_is_final(0) && \
    nempty(to_taker))

inline drain(queue) {
    do
    :: nempty(queue) -> queue?_, _, _
    :: empty(queue) -> break
    od
}

inline say_to_taker(message, batch, told) {
    if
    :: !giver_lost && !giver_closed && !taker_lost && !taker_is_gone -> to_taker!message, batch, told
    :: else
    fi
}

inline say_to_giver(message, batch, told) {
    if
    :: !taker_lost && !taker_closed && !giver_lost && !giver_is_gone -> to_giver!message, batch, told
    :: else
    fi
}

inline take_token(process, event) {
    if
    :: !token_read -> token_read = true; read_by_giver = (process == GIVER_PROCESS); event = GOT_CHANNEL
    :: else -> event = GOT_NOTHING
    fi
}

/* The oldest one that stays is served on: answers come in order. */
inline serve_on() {
    assert(something_stays);
    each = 0;
    do
    :: !staying[each] -> each++
    :: else -> break
    od;
    staying[each] = false; at_giver[each] = SERVED; resumed[each] = true; each = BATCHES
}

/* What stays, and where `all` says so what is on its way, is served again, or closed. */
inline end_waiting(all, how) {
    for (each : 0 .. BATCHES - 1) {
        if
        :: staying[each] || (all && each >= answered && each < sent_batches) ->
            staying[each] = false; at_giver[each] = how; resumed[each] = resumed[each] || how == SERVED
        :: else
        fi
    }
}

inline end_standing(how) {
    for (each : 0 .. BATCHES - 1) {
        if
        :: each >= begun && at_taker[each] == STANDING ->
            at_taker[each] = how; started[each] = started[each] || how == SERVED
        :: else
        fi
    };
    begun = adopted_batches
}

inline giver_act(event, batch, told) {
    if
    :: event == CONNECTIONS ->
        say_to_taker(CONNECTIONS, sent_batches, false);
        sent[sent_batches] = true; sent_batches++; event = NOTHING
    :: event == DO_RELINQUISH ->
        assert(batch == answered && answered < sent_batches); /* answers come in order */
        answered++;
        if
        :: told -> at_giver[batch] = SERVED; resumed[batch] = true
        :: !told -> at_giver[batch] = LEFT
        :: !told -> staying[batch] = true
        fi;
        event = NOTHING
    :: event == RELEASED ->
        stays[batch] = staying[batch];
        say_to_taker(RELEASED, batch, staying[batch]); event = NOTHING
    :: event == FINISHED -> say_to_taker(FINISHED, 0, false); event = NOTHING
    :: event == DO_SERVE_ON -> serve_on(); event = NOTHING
    :: event == DO_FORGO ->
        end_waiting(false, LEFT); event = NOTHING
    :: event == DO_PUT_BACK ->
        end_waiting(true, SERVED);
        answered = sent_batches; event = NOTHING
    :: event == DO_RELINQUISH_ALL ->
        end_waiting(true, LEFT);
        answered = sent_batches; event = NOTHING
    :: event == DO_RECLAIM -> take_token(GIVER_PROCESS, event)
    :: event == DO_CLOSE -> giver_closed = true; drain(to_giver); event = NOTHING
    fi
}

inline taker_act(event, batch, told) {
    if
    :: event == DO_ADOPT ->
        assert(batch == adopted_batches);
        adopted_batches++;
        if
        :: at_taker[batch] = STANDING; refusing = false
        :: at_taker[batch] = LEFT; refusing = true
        fi;
        event = NOTHING
    :: event == ADOPTED ->
        refused[batch] = refusing; adopted[batch] = !refusing;
        say_to_giver(ADOPTED, batch, refusing); event = NOTHING
    :: event == DROPPED -> say_to_giver(DROPPED, batch, false); event = NOTHING
    :: event == DO_START ->
        assert(batch == begun && begun < adopted_batches); /* what is released was adopted, in this order */
        begun++;
        if
        :: told -> at_taker[batch] = LEFT
        :: !told && at_taker[batch] == STANDING -> at_taker[batch] = SERVED; started[batch] = true
        :: else
        fi;
        event = NOTHING
    :: event == DO_START_ALL -> end_standing(SERVED); event = NOTHING
    :: event == DO_DROP_ALL -> end_standing(LEFT); event = NOTHING
    :: event == DO_CLAIM -> take_token(TAKER_PROCESS, event)
    :: event == DO_CLOSE -> taker_closed = true; drain(to_taker); event = NOTHING
    fi
}

/* No connection has two readers; nobody goes on with one that the other has served since; none starts unadopted. */
inline look() {
    for (each : 0 .. BATCHES - 1) {
        assert(!(at_giver[each] == SERVED && at_taker[each] == SERVED));
        assert(!(started[each] && at_giver[each] == SERVED) && !(resumed[each] && at_taker[each] == SERVED));
        assert(!started[each] || adopted[each])
    }
}

inline end_giver() {
    alive[GIVER_PROCESS] = false; stopped[GIVER_PROCESS] = false;
    for (each : 0 .. BATCHES - 1) { at_giver[each] = LEFT }
}

inline end_taker() {
    alive[TAKER_PROCESS] = false; stopped[TAKER_PROCESS] = false;
    for (each : 0 .. BATCHES - 1) { at_taker[each] = LEFT }
}

proctype Giver() {
    mtype event = NOTHING;
    byte batch;
    bool told;
end:
    do
    :: atomic {
        if
        :: runs(GIVER_PROCESS) && nempty(giver_todo[0]) -> giver_todo[0]?event; giver_act(event, batch, told)
        :: runs(GIVER_PROCESS) && empty(giver_todo[0]) && giver_loses ->
            event = (unreadable_to_giver && giver_has_FAIL(0) -> FAIL : LOST)
        :: runs(GIVER_PROCESS) && empty(giver_todo[0]) && !giver_loses && leaving ->
            if
            :: giver_is_final(0) -> end_giver()
            :: else -> event = LEAVING
            fi
        :: giver_reads -> to_giver?event, batch, told;
            if
            :: event == ADOPTED && taker_is_gone && !token_read -> event = NOTHING /* it counts for nothing */
            :: else
            fi
        :: runs(GIVER_PROCESS) && empty(giver_todo[0]) && !leaving && !giver_is_final(0) && !giver_lost &&
            empty(to_giver) && taker_is_gone -> giver_lost = true
        :: runs(GIVER_PROCESS) && empty(giver_todo[0]) && !giver_loses && !leaving && giver_has_SILENT(0) &&
            (answered < sent_batches || something_stays) &&
            (strikes(TAKER_PROCESS) || (alive[TAKER_PROCESS] && nothing_is_said)) -> event = SILENT
        :: runs(GIVER_PROCESS) && empty(giver_todo[0]) && !giver_loses && !leaving && giver[0] == G_GIVING &&
            sent_batches < BATCHES && sent_batches - answered < WINDOW ->
            if
            :: token_read -> event = BEATEN
            :: else -> at_giver[sent_batches] = STANDING; event = BATCH
            fi
        :: runs(GIVER_PROCESS) && empty(giver_todo[0]) && !leaving && !giver_lost && empty(to_giver) &&
            answered == sent_batches && (giver[0] == G_OUTRUN ||
            (giver[0] == G_GIVING && sent_batches == BATCHES && !something_stays)) -> event = EMPTY
        :: runs(GIVER_PROCESS) && empty(giver_todo[0]) && may_leave && !leaving && !giver_is_final(0) ->
            leaving = true; may_leave = false
        fi;
        if
        :: event != NOTHING -> giver_row(0, event)
        :: else
        fi;
        event = NOTHING;
        look()
    }
    od
}

proctype Taker() {
    mtype event = NOTHING;
    byte batch;
    bool told;
end:
    do
    :: atomic {
        if
        :: runs(TAKER_PROCESS) && nempty(taker_todo[0]) -> taker_todo[0]?event; taker_act(event, batch, told)
        :: runs(TAKER_PROCESS) && empty(taker_todo[0]) && taker_loses -> event = LOST
        :: taker_reads -> to_taker?event, batch, told;
            if
            :: event == RELEASED && told -> event = PARTLY
            :: else
            fi
        :: runs(TAKER_PROCESS) && empty(taker_todo[0]) && !taker_is_final(0) && !taker_lost &&
            empty(to_taker) && giver_is_gone -> taker_lost = true
        :: runs(TAKER_PROCESS) && empty(taker_todo[0]) && !taker_loses && taker_has_SILENT(0) &&
            begun < adopted_batches &&
            (strikes(GIVER_PROCESS) || (alive[GIVER_PROCESS] && nothing_is_said)) -> event = SILENT
        fi;
        if
        :: event != NOTHING -> taker_row(0, event)
        :: else
        fi;
        event = NOTHING;
        look()
    }
    od
}

proctype Faults() {
end:
    do
    :: atomic { DEADLY && faults > 0 && alive[GIVER_PROCESS] -> faults--; end_giver() }
    :: atomic { DEADLY && faults > 0 && alive[TAKER_PROCESS] -> faults--; end_taker() }
    :: atomic { faults > 0 && runs(GIVER_PROCESS) -> faults--; stopped[GIVER_PROCESS] = true }
    :: atomic { faults > 0 && runs(TAKER_PROCESS) -> faults--; stopped[TAKER_PROCESS] = true }
    :: atomic { stopped[GIVER_PROCESS] && !for_good[GIVER_PROCESS] -> stopped[GIVER_PROCESS] = false }
    :: atomic { stopped[TAKER_PROCESS] && !for_good[TAKER_PROCESS] -> stopped[TAKER_PROCESS] = false }
    :: atomic { stopped[GIVER_PROCESS] && !for_good[GIVER_PROCESS] -> for_good[GIVER_PROCESS] = true }
    :: atomic { stopped[TAKER_PROCESS] && !for_good[TAKER_PROCESS] -> for_good[TAKER_PROCESS] = true }
    :: atomic { DEADLY && faults > 0 && giver_reads ->
            faults--; giver_lost = true; unreadable_to_giver = true; drain(to_giver) }
    :: atomic { DEADLY && faults > 0 && taker_reads -> faults--; taker_lost = true; drain(to_taker) }
    od
}

/* Whether nobody can be blamed for a connection that nobody serves. */
#define nobody_is_left (!alive[0] && !alive[1])
#define died_with_the_taker (!alive[TAKER_PROCESS] && adopted[each])
#define died_with_the_giver (alive[TAKER_PROCESS] && !alive[GIVER_PROCESS] && \
    (leaving || (token_read && read_by_giver) || !sent[each] || refused[each] || stays[each] || stopped[TAKER_PROCESS]))
#define waits_for_who_is_stopped (alive[0] && alive[1] && (stopped[GIVER_PROCESS] || \
    (stopped[TAKER_PROCESS] && ((token_read && !read_by_giver) || at_giver[each] == LEFT))))
#define is_given (adopted[each] && at_giver[each] == LEFT && !stays[each] && alive[0] && alive[1])
#define is_kept (runs(GIVER_PROCESS) && !stopped[TAKER_PROCESS] && (refused[each] || \
    (stays[each] && !(token_read && !read_by_giver) && alive[TAKER_PROCESS])))
#define is_served (at_giver[each] == SERVED || at_taker[each] == SERVED)

proctype Judge() {
end:
    timeout;
    atomic {
        for (each : 0 .. BATCHES - 1) {
            assert(!SERVES || is_served || nobody_is_left || died_with_the_taker || died_with_the_giver ||
                waits_for_who_is_stopped);
            assert(!SERVES || !is_given || is_served || stopped[TAKER_PROCESS]);
            assert(!SERVES || !is_kept || at_giver[each] == SERVED)
        };
        /* Nobody waits for what cannot come. */
        assert(!runs(GIVER_PROCESS) || giver_is_final(0) || (giver[0] == G_OUTRUN && stopped[TAKER_PROCESS]));
        assert(!runs(TAKER_PROCESS) || taker_is_final(0) ||
            (stopped[GIVER_PROCESS] && !(taker[0] == T_TAKING && begun < adopted_batches)))
    }
}

init {
    atomic {
        select(faults : 0 .. FAULTS);
        if
        :: may_leave = true
        :: may_leave = false
        fi;
        for (each : 0 .. BATCHES - 1) { at_giver[each] = SERVED; at_taker[each] = NOTHING };
        alive[0] = true; alive[1] = true;
        giver[0] = G_GIVING; taker[0] = T_TAKING;
        run Giver(); run Taker(); run Faults(); run Judge()
    }
}
