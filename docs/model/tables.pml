/* Written by draw_tables.py from src/takeover/protocol.py. */

mtype = {
    I_GREETING,
    I_OFFERING,
    I_WARMING,
    I_COMMITTED,
    I_PROBATION,
    I_TAKING_BACK,
    I_DRAINING,
    I_STOPPING,
    I_CLOSED,
    JOIN,
    DENIED,
    STATUS,
    STOP,
    LOST,
    OVERTIME,
    LEAVING,
    TAKEN,
    OFFERED,
    HEARTBEAT,
    SILENT,
    FAIL,
    ABORT,
    READY,
    ALIVE,
    PROBATION_OVER,
    SETTLED,
    GOT_COMMIT,
    GOT_SETTLE,
    GOT_NOTHING,
    TAKE,
    DO_OFFER,
    REFUSE,
    DO_CLOSE,
    REPORT,
    STOPPING,
    DO_STOP,
    DO_TAKE_BACK,
    DO_STOP_ACCEPTING,
    DO_RELEASE,
    COMMIT,
    DONE,
    DO_START_ACCEPTING,
    UNDO,
    DO_MOVE,
    S_GREETING,
    S_JOINING,
    S_WARMING,
    S_ORPHANED,
    S_READY,
    S_CLAIMING,
    S_STARTING,
    S_PROBATION,
    S_RETURNING,
    S_SETTLING,
    S_OWNER,
    S_FAILED,
    S_UNDONE,
    HELLO,
    LISTENERS,
    COMPLETE,
    WARM,
    ACCEPTING,
    DRAINING,
    BLOB,
    DO_KEEP,
    DO_TAKE_COMMIT,
    DO_ELDERS,
    DO_OPEN_CHANNEL,
    DO_TAKE_SETTLE,
    DO_COUNT,
    DO_BEQUEATH
}

#define incumbent_has_LOST(link) (incumbent[link] == I_GREETING || incumbent[link] == I_OFFERING || incumbent[link] == I_WARMING || incumbent[link] == I_COMMITTED || incumbent[link] == I_PROBATION || incumbent[link] == I_DRAINING || incumbent[link] == I_STOPPING)

#define incumbent_has_SILENT(link) (incumbent[link] == I_OFFERING || incumbent[link] == I_WARMING || incumbent[link] == I_COMMITTED || incumbent[link] == I_PROBATION)

#define incumbent_has_OVERTIME(link) (incumbent[link] == I_GREETING || incumbent[link] == I_OFFERING || incumbent[link] == I_WARMING || incumbent[link] == I_COMMITTED)

#define incumbent_has_LEAVING(link) (incumbent[link] == I_GREETING || incumbent[link] == I_OFFERING || incumbent[link] == I_WARMING || incumbent[link] == I_COMMITTED || incumbent[link] == I_PROBATION || incumbent[link] == I_DRAINING)

#define incumbent_has_FAIL(link) (incumbent[link] == I_OFFERING)

#define incumbent_has_WARM(link) (false)

#define incumbent_has_ACCEPTING(link) (false)

#define incumbent_has_PROBATION_OVER(link) (incumbent[link] == I_PROBATION)

#define incumbent_is_final(link) (incumbent[link] == I_CLOSED)

#define incumbent_is_undecided(link) (incumbent[link] == I_OFFERING || incumbent[link] == I_WARMING || incumbent[link] == I_COMMITTED || incumbent[link] == I_PROBATION)

inline incumbent_row(link, event) {
    if
    :: incumbent[link] == I_GREETING && event == JOIN ->
        incumbent[link] = I_OFFERING; incumbent_todo[link]!DO_OFFER
    :: incumbent[link] == I_GREETING && event == DENIED ->
        incumbent[link] = I_CLOSED; incumbent_todo[link]!REFUSE; incumbent_todo[link]!DO_CLOSE
    :: incumbent[link] == I_GREETING && event == STATUS ->
        incumbent[link] = I_CLOSED; incumbent_todo[link]!REPORT; incumbent_todo[link]!DO_CLOSE
    :: incumbent[link] == I_GREETING && event == STOP ->
        incumbent[link] = I_STOPPING; incumbent_todo[link]!STOPPING; incumbent_todo[link]!DO_STOP
    :: incumbent[link] == I_GREETING && event == LOST ->
        incumbent[link] = I_CLOSED; incumbent_todo[link]!DO_CLOSE
    :: incumbent[link] == I_GREETING && event == OVERTIME ->
        incumbent[link] = I_CLOSED; incumbent_todo[link]!DO_CLOSE
    :: incumbent[link] == I_GREETING && event == LEAVING ->
        incumbent[link] = I_CLOSED; incumbent_todo[link]!DO_CLOSE
    :: incumbent[link] == I_OFFERING && event == TAKEN ->
        incumbent[link] = I_OFFERING; incumbent_todo[link]!DO_OFFER
    :: incumbent[link] == I_OFFERING && event == OFFERED ->
        incumbent[link] = I_WARMING
    :: incumbent[link] == I_OFFERING && event == HEARTBEAT ->
        incumbent[link] = I_OFFERING
    :: incumbent[link] == I_OFFERING && event == LOST ->
        incumbent[link] = I_TAKING_BACK; incumbent_todo[link]!DO_TAKE_BACK
    :: incumbent[link] == I_OFFERING && event == SILENT ->
        incumbent[link] = I_TAKING_BACK; incumbent_todo[link]!DO_TAKE_BACK
    :: incumbent[link] == I_OFFERING && event == OVERTIME ->
        incumbent[link] = I_TAKING_BACK; incumbent_todo[link]!DO_TAKE_BACK
    :: incumbent[link] == I_OFFERING && event == FAIL ->
        incumbent[link] = I_TAKING_BACK; incumbent_todo[link]!DO_TAKE_BACK
    :: incumbent[link] == I_OFFERING && event == ABORT ->
        incumbent[link] = I_TAKING_BACK; incumbent_todo[link]!DO_TAKE_BACK
    :: incumbent[link] == I_OFFERING && event == LEAVING ->
        incumbent[link] = I_CLOSED; incumbent_todo[link]!DO_STOP_ACCEPTING; incumbent_todo[link]!DO_RELEASE; incumbent_todo[link]!DO_CLOSE
    :: incumbent[link] == I_WARMING && event == HEARTBEAT ->
        incumbent[link] = I_WARMING
    :: incumbent[link] == I_WARMING && event == READY ->
        incumbent[link] = I_COMMITTED; incumbent_todo[link]!DO_STOP_ACCEPTING; incumbent_todo[link]!COMMIT
    :: incumbent[link] == I_WARMING && event == LOST ->
        incumbent[link] = I_TAKING_BACK; incumbent_todo[link]!DO_TAKE_BACK
    :: incumbent[link] == I_WARMING && event == SILENT ->
        incumbent[link] = I_TAKING_BACK; incumbent_todo[link]!DO_TAKE_BACK
    :: incumbent[link] == I_WARMING && event == OVERTIME ->
        incumbent[link] = I_TAKING_BACK; incumbent_todo[link]!DO_TAKE_BACK
    :: incumbent[link] == I_WARMING && event == ABORT ->
        incumbent[link] = I_TAKING_BACK; incumbent_todo[link]!DO_TAKE_BACK
    :: incumbent[link] == I_WARMING && event == LEAVING ->
        incumbent[link] = I_CLOSED; incumbent_todo[link]!DO_STOP_ACCEPTING; incumbent_todo[link]!DO_RELEASE; incumbent_todo[link]!DO_CLOSE
    :: incumbent[link] == I_COMMITTED && event == HEARTBEAT ->
        incumbent[link] = I_COMMITTED
    :: incumbent[link] == I_COMMITTED && event == ALIVE ->
        incumbent[link] = I_PROBATION
    :: incumbent[link] == I_COMMITTED && event == LOST ->
        incumbent[link] = I_TAKING_BACK; incumbent_todo[link]!DO_TAKE_BACK
    :: incumbent[link] == I_COMMITTED && event == SILENT ->
        incumbent[link] = I_TAKING_BACK; incumbent_todo[link]!DO_TAKE_BACK
    :: incumbent[link] == I_COMMITTED && event == OVERTIME ->
        incumbent[link] = I_TAKING_BACK; incumbent_todo[link]!DO_TAKE_BACK
    :: incumbent[link] == I_COMMITTED && event == ABORT ->
        incumbent[link] = I_TAKING_BACK; incumbent_todo[link]!DO_TAKE_BACK
    :: incumbent[link] == I_COMMITTED && event == LEAVING ->
        incumbent[link] = I_CLOSED; incumbent_todo[link]!DO_RELEASE; incumbent_todo[link]!DO_CLOSE
    :: incumbent[link] == I_PROBATION && event == HEARTBEAT ->
        incumbent[link] = I_PROBATION
    :: incumbent[link] == I_PROBATION && event == PROBATION_OVER ->
        incumbent[link] = I_DRAINING; incumbent_todo[link]!DO_RELEASE; incumbent_todo[link]!DONE
    :: incumbent[link] == I_PROBATION && event == SETTLED ->
        incumbent[link] = I_DRAINING; incumbent_todo[link]!DO_RELEASE; incumbent_todo[link]!DONE
    :: incumbent[link] == I_PROBATION && event == LOST ->
        incumbent[link] = I_TAKING_BACK; incumbent_todo[link]!DO_TAKE_BACK
    :: incumbent[link] == I_PROBATION && event == SILENT ->
        incumbent[link] = I_TAKING_BACK; incumbent_todo[link]!DO_TAKE_BACK
    :: incumbent[link] == I_PROBATION && event == ABORT ->
        incumbent[link] = I_TAKING_BACK; incumbent_todo[link]!DO_TAKE_BACK
    :: incumbent[link] == I_PROBATION && event == LEAVING ->
        incumbent[link] = I_DRAINING; incumbent_todo[link]!DO_RELEASE; incumbent_todo[link]!DONE
    :: incumbent[link] == I_TAKING_BACK && event == GOT_COMMIT ->
        incumbent[link] = I_CLOSED; incumbent_todo[link]!DO_START_ACCEPTING; incumbent_todo[link]!ABORT; incumbent_todo[link]!DO_CLOSE
    :: incumbent[link] == I_TAKING_BACK && event == GOT_SETTLE ->
        incumbent[link] = I_CLOSED; incumbent_todo[link]!DO_START_ACCEPTING; incumbent_todo[link]!UNDO; incumbent_todo[link]!DO_CLOSE
    :: incumbent[link] == I_TAKING_BACK && event == GOT_NOTHING ->
        incumbent[link] = I_DRAINING; incumbent_todo[link]!DO_RELEASE; incumbent_todo[link]!DONE
    :: incumbent[link] == I_DRAINING && event == HEARTBEAT ->
        incumbent[link] = I_DRAINING
    :: incumbent[link] == I_DRAINING && event == TAKEN ->
        incumbent[link] = I_DRAINING
    :: incumbent[link] == I_DRAINING && event == READY ->
        incumbent[link] = I_DRAINING
    :: incumbent[link] == I_DRAINING && event == ALIVE ->
        incumbent[link] = I_DRAINING
    :: incumbent[link] == I_DRAINING && event == ABORT ->
        incumbent[link] = I_DRAINING
    :: incumbent[link] == I_DRAINING && event == SETTLED ->
        incumbent[link] = I_DRAINING
    :: incumbent[link] == I_DRAINING && event == TAKE ->
        incumbent[link] = I_DRAINING; incumbent_todo[link]!DO_MOVE
    :: incumbent[link] == I_DRAINING && event == LOST ->
        incumbent[link] = I_CLOSED; incumbent_todo[link]!DO_CLOSE
    :: incumbent[link] == I_DRAINING && event == LEAVING ->
        incumbent[link] = I_CLOSED; incumbent_todo[link]!DO_CLOSE
    :: incumbent[link] == I_STOPPING && event == LOST ->
        incumbent[link] = I_CLOSED; incumbent_todo[link]!DO_CLOSE
    :: else -> assert(false) /* nothing comes out of turn */
    fi
}

#define successor_has_LOST(link) (successor[link] == S_GREETING || successor[link] == S_JOINING || successor[link] == S_WARMING || successor[link] == S_READY || successor[link] == S_PROBATION || successor[link] == S_RETURNING || successor[link] == S_OWNER)

#define successor_has_SILENT(link) (successor[link] == S_JOINING || successor[link] == S_READY || successor[link] == S_PROBATION || successor[link] == S_RETURNING)

#define successor_has_OVERTIME(link) (successor[link] == S_GREETING || successor[link] == S_JOINING)

#define successor_has_LEAVING(link) (successor[link] == S_PROBATION || successor[link] == S_RETURNING)

#define successor_has_FAIL(link) (successor[link] == S_GREETING || successor[link] == S_JOINING || successor[link] == S_WARMING || successor[link] == S_ORPHANED || successor[link] == S_READY || successor[link] == S_STARTING || successor[link] == S_PROBATION)

#define successor_has_WARM(link) (successor[link] == S_WARMING || successor[link] == S_ORPHANED)

#define successor_has_ACCEPTING(link) (successor[link] == S_STARTING)

#define successor_has_PROBATION_OVER(link) (false)

#define successor_is_final(link) (successor[link] == S_FAILED || successor[link] == S_UNDONE)

#define successor_is_undecided(link) (successor[link] == S_WARMING || successor[link] == S_PROBATION)

inline successor_row(link, event) {
    if
    :: successor[link] == S_GREETING && event == HELLO ->
        successor[link] = S_JOINING; successor_todo[link]!JOIN
    :: successor[link] == S_GREETING && event == LOST ->
        successor[link] = S_FAILED; successor_todo[link]!DO_CLOSE
    :: successor[link] == S_GREETING && event == OVERTIME ->
        successor[link] = S_FAILED; successor_todo[link]!DO_CLOSE
    :: successor[link] == S_GREETING && event == FAIL ->
        successor[link] = S_FAILED; successor_todo[link]!DO_CLOSE
    :: successor[link] == S_GREETING && event == REFUSE ->
        successor[link] = S_FAILED; successor_todo[link]!DO_CLOSE
    :: successor[link] == S_JOINING && event == LISTENERS ->
        successor[link] = S_JOINING; successor_todo[link]!DO_KEEP; successor_todo[link]!TAKEN
    :: successor[link] == S_JOINING && event == COMPLETE ->
        successor[link] = S_WARMING
    :: successor[link] == S_JOINING && event == HEARTBEAT ->
        successor[link] = S_JOINING
    :: successor[link] == S_JOINING && event == LOST ->
        successor[link] = S_FAILED; successor_todo[link]!DO_CLOSE
    :: successor[link] == S_JOINING && event == SILENT ->
        successor[link] = S_FAILED; successor_todo[link]!DO_CLOSE
    :: successor[link] == S_JOINING && event == OVERTIME ->
        successor[link] = S_FAILED; successor_todo[link]!DO_CLOSE
    :: successor[link] == S_JOINING && event == REFUSE ->
        successor[link] = S_FAILED; successor_todo[link]!DO_CLOSE
    :: successor[link] == S_JOINING && event == ABORT ->
        successor[link] = S_FAILED; successor_todo[link]!DO_CLOSE
    :: successor[link] == S_JOINING && event == FAIL ->
        successor[link] = S_FAILED; successor_todo[link]!ABORT; successor_todo[link]!DO_CLOSE
    :: successor[link] == S_WARMING && event == HEARTBEAT ->
        successor[link] = S_WARMING
    :: successor[link] == S_WARMING && event == WARM ->
        successor[link] = S_READY; successor_todo[link]!READY
    :: successor[link] == S_WARMING && event == LOST ->
        successor[link] = S_ORPHANED
    :: successor[link] == S_WARMING && event == ABORT ->
        successor[link] = S_FAILED; successor_todo[link]!DO_CLOSE
    :: successor[link] == S_WARMING && event == FAIL ->
        successor[link] = S_FAILED; successor_todo[link]!ABORT; successor_todo[link]!DO_CLOSE
    :: successor[link] == S_ORPHANED && event == WARM ->
        successor[link] = S_CLAIMING; successor_todo[link]!DO_TAKE_COMMIT
    :: successor[link] == S_ORPHANED && event == FAIL ->
        successor[link] = S_FAILED; successor_todo[link]!DO_CLOSE
    :: successor[link] == S_READY && event == HEARTBEAT ->
        successor[link] = S_READY
    :: successor[link] == S_READY && event == COMMIT ->
        successor[link] = S_CLAIMING; successor_todo[link]!DO_TAKE_COMMIT
    :: successor[link] == S_READY && event == LOST ->
        successor[link] = S_CLAIMING; successor_todo[link]!DO_TAKE_COMMIT
    :: successor[link] == S_READY && event == SILENT ->
        successor[link] = S_CLAIMING; successor_todo[link]!DO_TAKE_COMMIT
    :: successor[link] == S_READY && event == ABORT ->
        successor[link] = S_FAILED; successor_todo[link]!DO_CLOSE
    :: successor[link] == S_READY && event == FAIL ->
        successor[link] = S_FAILED; successor_todo[link]!ABORT; successor_todo[link]!DO_CLOSE
    :: successor[link] == S_CLAIMING && event == GOT_COMMIT ->
        successor[link] = S_STARTING; successor_todo[link]!DO_START_ACCEPTING
    :: successor[link] == S_CLAIMING && event == GOT_NOTHING ->
        successor[link] = S_FAILED; successor_todo[link]!DO_CLOSE
    :: successor[link] == S_STARTING && event == COMMIT ->
        successor[link] = S_STARTING
    :: successor[link] == S_STARTING && event == HEARTBEAT ->
        successor[link] = S_STARTING
    :: successor[link] == S_STARTING && event == ACCEPTING ->
        successor[link] = S_PROBATION; successor_todo[link]!ALIVE
    :: successor[link] == S_STARTING && event == FAIL ->
        successor[link] = S_FAILED; successor_todo[link]!DO_STOP_ACCEPTING; successor_todo[link]!ABORT; successor_todo[link]!DO_CLOSE
    :: successor[link] == S_STARTING && event == UNDO ->
        successor[link] = S_UNDONE; successor_todo[link]!DO_STOP_ACCEPTING; successor_todo[link]!DO_CLOSE
    :: successor[link] == S_PROBATION && event == COMMIT ->
        successor[link] = S_PROBATION
    :: successor[link] == S_PROBATION && event == HEARTBEAT ->
        successor[link] = S_PROBATION
    :: successor[link] == S_PROBATION && event == DONE ->
        successor[link] = S_OWNER; successor_todo[link]!DO_ELDERS; successor_todo[link]!DO_OPEN_CHANNEL
    :: successor[link] == S_PROBATION && event == UNDO ->
        successor[link] = S_UNDONE; successor_todo[link]!DO_STOP_ACCEPTING; successor_todo[link]!DO_CLOSE
    :: successor[link] == S_PROBATION && event == LOST ->
        successor[link] = S_SETTLING; successor_todo[link]!DO_TAKE_SETTLE
    :: successor[link] == S_PROBATION && event == SILENT ->
        successor[link] = S_SETTLING; successor_todo[link]!DO_TAKE_SETTLE
    :: successor[link] == S_PROBATION && event == LEAVING ->
        successor[link] = S_SETTLING; successor_todo[link]!DO_TAKE_SETTLE
    :: successor[link] == S_PROBATION && event == FAIL ->
        successor[link] = S_RETURNING; successor_todo[link]!ABORT
    :: successor[link] == S_RETURNING && event == COMMIT ->
        successor[link] = S_RETURNING
    :: successor[link] == S_RETURNING && event == HEARTBEAT ->
        successor[link] = S_RETURNING
    :: successor[link] == S_RETURNING && event == DONE ->
        successor[link] = S_OWNER; successor_todo[link]!DO_ELDERS; successor_todo[link]!DO_OPEN_CHANNEL
    :: successor[link] == S_RETURNING && event == UNDO ->
        successor[link] = S_UNDONE; successor_todo[link]!DO_STOP_ACCEPTING; successor_todo[link]!DO_CLOSE
    :: successor[link] == S_RETURNING && event == LOST ->
        successor[link] = S_SETTLING; successor_todo[link]!DO_TAKE_SETTLE
    :: successor[link] == S_RETURNING && event == SILENT ->
        successor[link] = S_SETTLING; successor_todo[link]!DO_TAKE_SETTLE
    :: successor[link] == S_RETURNING && event == LEAVING ->
        successor[link] = S_SETTLING; successor_todo[link]!DO_TAKE_SETTLE
    :: successor[link] == S_SETTLING && event == GOT_SETTLE ->
        successor[link] = S_OWNER; successor_todo[link]!SETTLED
    :: successor[link] == S_SETTLING && event == GOT_NOTHING ->
        successor[link] = S_UNDONE; successor_todo[link]!DO_STOP_ACCEPTING; successor_todo[link]!DO_CLOSE
    :: successor[link] == S_OWNER && event == HEARTBEAT ->
        successor[link] = S_OWNER
    :: successor[link] == S_OWNER && event == COMMIT ->
        successor[link] = S_OWNER
    :: successor[link] == S_OWNER && event == DONE ->
        successor[link] = S_OWNER; successor_todo[link]!DO_ELDERS; successor_todo[link]!DO_OPEN_CHANNEL
    :: successor[link] == S_OWNER && event == DRAINING ->
        successor[link] = S_OWNER; successor_todo[link]!DO_COUNT
    :: successor[link] == S_OWNER && event == BLOB ->
        successor[link] = S_OWNER; successor_todo[link]!DO_BEQUEATH
    :: successor[link] == S_OWNER && event == LOST ->
        successor[link] = S_OWNER; successor_todo[link]!DO_CLOSE
    :: else -> assert(false) /* nothing comes out of turn */
    fi
}
