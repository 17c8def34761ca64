/* Written by draw_tables.py from src/takeover/protocol.py. */

mtype = {
    G_GIVING,
    G_RECLAIMING,
    G_OUTRUN,
    G_CLOSED,
    BATCH,
    ADOPTED,
    DROPPED,
    EMPTY,
    LOST,
    SILENT,
    LEAVING,
    BEATEN,
    GOT_CHANNEL,
    GOT_NOTHING,
    FAIL,
    CONNECTIONS,
    DO_RELINQUISH,
    RELEASED,
    DO_SERVE_ON,
    FINISHED,
    DO_CLOSE,
    DO_RECLAIM,
    DO_PUT_BACK,
    DO_FORGO,
    DO_RELINQUISH_ALL,
    T_TAKING,
    T_RESOLVING,
    T_CLAIMED,
    T_OUTRUN,
    T_CLOSED,
    PARTLY,
    DO_ADOPT,
    DO_START,
    DO_CLAIM,
    DO_START_ALL,
    DO_DROP_ALL
}

#define giver_has_LOST(link) (giver[link] == G_GIVING || giver[link] == G_OUTRUN)

#define giver_has_SILENT(link) (giver[link] == G_GIVING)

#define giver_has_OVERTIME(link) (false)

#define giver_has_LEAVING(link) (giver[link] == G_GIVING || giver[link] == G_OUTRUN)

#define giver_has_FAIL(link) (giver[link] == G_OUTRUN)

#define giver_has_WARM(link) (false)

#define giver_has_ACCEPTING(link) (false)

#define giver_has_PROBATION_OVER(link) (false)

#define giver_is_final(link) (giver[link] == G_CLOSED)

#define giver_is_undecided(link) (false)

inline giver_row(link, event) {
    if
    :: giver[link] == G_GIVING && event == BATCH ->
        giver[link] = G_GIVING; giver_todo[link]!CONNECTIONS
    :: giver[link] == G_GIVING && event == ADOPTED ->
        giver[link] = G_GIVING; giver_todo[link]!DO_RELINQUISH; giver_todo[link]!RELEASED
    :: giver[link] == G_GIVING && event == DROPPED ->
        giver[link] = G_GIVING; giver_todo[link]!DO_SERVE_ON
    :: giver[link] == G_GIVING && event == EMPTY ->
        giver[link] = G_CLOSED; giver_todo[link]!FINISHED; giver_todo[link]!DO_CLOSE
    :: giver[link] == G_GIVING && event == LOST ->
        giver[link] = G_RECLAIMING; giver_todo[link]!DO_RECLAIM
    :: giver[link] == G_GIVING && event == SILENT ->
        giver[link] = G_RECLAIMING; giver_todo[link]!DO_RECLAIM
    :: giver[link] == G_GIVING && event == LEAVING ->
        giver[link] = G_RECLAIMING; giver_todo[link]!DO_RECLAIM
    :: giver[link] == G_GIVING && event == BEATEN ->
        giver[link] = G_RECLAIMING; giver_todo[link]!DO_RECLAIM
    :: giver[link] == G_RECLAIMING && event == GOT_CHANNEL ->
        giver[link] = G_CLOSED; giver_todo[link]!DO_CLOSE; giver_todo[link]!DO_PUT_BACK
    :: giver[link] == G_RECLAIMING && event == GOT_NOTHING ->
        giver[link] = G_OUTRUN
    :: giver[link] == G_OUTRUN && event == ADOPTED ->
        giver[link] = G_OUTRUN; giver_todo[link]!DO_RELINQUISH
    :: giver[link] == G_OUTRUN && event == DROPPED ->
        giver[link] = G_OUTRUN; giver_todo[link]!DO_SERVE_ON
    :: giver[link] == G_OUTRUN && event == EMPTY ->
        giver[link] = G_CLOSED; giver_todo[link]!DO_FORGO; giver_todo[link]!FINISHED; giver_todo[link]!DO_CLOSE
    :: giver[link] == G_OUTRUN && event == LOST ->
        giver[link] = G_CLOSED; giver_todo[link]!DO_FORGO; giver_todo[link]!DO_PUT_BACK; giver_todo[link]!DO_CLOSE
    :: giver[link] == G_OUTRUN && event == FAIL ->
        giver[link] = G_CLOSED; giver_todo[link]!DO_RELINQUISH_ALL; giver_todo[link]!DO_CLOSE
    :: giver[link] == G_OUTRUN && event == LEAVING ->
        giver[link] = G_CLOSED; giver_todo[link]!DO_RELINQUISH_ALL; giver_todo[link]!DO_CLOSE
    :: else -> assert(false) /* nothing comes out of turn */
    fi
}

#define taker_has_LOST(link) (taker[link] == T_TAKING || taker[link] == T_CLAIMED || taker[link] == T_OUTRUN)

#define taker_has_SILENT(link) (taker[link] == T_TAKING)

#define taker_has_OVERTIME(link) (false)

#define taker_has_LEAVING(link) (false)

#define taker_has_FAIL(link) (false)

#define taker_has_WARM(link) (false)

#define taker_has_ACCEPTING(link) (false)

#define taker_has_PROBATION_OVER(link) (false)

#define taker_is_final(link) (taker[link] == T_CLOSED)

#define taker_is_undecided(link) (false)

inline taker_row(link, event) {
    if
    :: taker[link] == T_TAKING && event == CONNECTIONS ->
        taker[link] = T_TAKING; taker_todo[link]!DO_ADOPT; taker_todo[link]!ADOPTED
    :: taker[link] == T_TAKING && event == RELEASED ->
        taker[link] = T_TAKING; taker_todo[link]!DO_START
    :: taker[link] == T_TAKING && event == PARTLY ->
        taker[link] = T_TAKING; taker_todo[link]!DO_START; taker_todo[link]!DROPPED
    :: taker[link] == T_TAKING && event == FINISHED ->
        taker[link] = T_CLOSED; taker_todo[link]!DO_CLOSE
    :: taker[link] == T_TAKING && event == LOST ->
        taker[link] = T_RESOLVING; taker_todo[link]!DO_CLAIM
    :: taker[link] == T_TAKING && event == SILENT ->
        taker[link] = T_RESOLVING; taker_todo[link]!DO_CLAIM
    :: taker[link] == T_RESOLVING && event == GOT_CHANNEL ->
        taker[link] = T_CLAIMED; taker_todo[link]!DO_START_ALL
    :: taker[link] == T_RESOLVING && event == GOT_NOTHING ->
        taker[link] = T_OUTRUN
    :: taker[link] == T_CLAIMED && event == CONNECTIONS ->
        taker[link] = T_CLAIMED; taker_todo[link]!DO_ADOPT; taker_todo[link]!ADOPTED; taker_todo[link]!DO_START_ALL
    :: taker[link] == T_CLAIMED && event == RELEASED ->
        taker[link] = T_CLAIMED
    :: taker[link] == T_CLAIMED && event == PARTLY ->
        taker[link] = T_CLAIMED
    :: taker[link] == T_CLAIMED && event == LOST ->
        taker[link] = T_CLOSED; taker_todo[link]!DO_CLOSE
    :: taker[link] == T_CLAIMED && event == FINISHED ->
        taker[link] = T_CLOSED; taker_todo[link]!DO_CLOSE
    :: taker[link] == T_OUTRUN && event == RELEASED ->
        taker[link] = T_OUTRUN; taker_todo[link]!DO_START
    :: taker[link] == T_OUTRUN && event == PARTLY ->
        taker[link] = T_OUTRUN; taker_todo[link]!DO_START
    :: taker[link] == T_OUTRUN && event == CONNECTIONS ->
        taker[link] = T_OUTRUN; taker_todo[link]!DO_ADOPT
    :: taker[link] == T_OUTRUN && event == LOST ->
        taker[link] = T_CLOSED; taker_todo[link]!DO_DROP_ALL; taker_todo[link]!DO_CLOSE
    :: else -> assert(false) /* nothing comes out of turn */
    fi
}
