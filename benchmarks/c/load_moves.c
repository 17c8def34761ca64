/* Clients that stay connected: --connections of them, of which the first --talkers send 64 bytes each in turn, --rate
   messages a second in all, and wait for the echo; every byte is compared. A connection whose echo has not come is not
   sent another message, so that its round trip is as long as it stood still. With --reconnect 1 a client whose
   connection ends connects again and makes one round trip. Prints "open" once every connection has had its first echo;
   with --reconnect "back NS" (CLOCK_MONOTONIC) when all of them have been lost and have come back. Commands on standard
   input, one a line:

     check           one round trip on every connection: "checked N", the number of those that made it within 20 s
     report FROM TO  one JSON object about the round trips under way between two instants (CLOCK_MONOTONIC, ns): for each
                     connection the longest of them. In the drain of a --reconnect it runs from the end of the old
                     connection to the first echo on the new one.

   With --forget 1 a report forgets the round trips that it was about, so that a long run has room for the next ones.
   `own_stall_ms` is the longest time in that window for which this program did not run though it had to, so that a
   standstill up to it proves nothing. Ends at the end of standard input, at most after --seconds. */
#define _GNU_SOURCE
#include "common.h"
#include <fcntl.h>
#include <sys/epoll.h>
#include <sys/timerfd.h>

enum { SIZE = 64, PERIOD = 4093, EVENTS = 512, BARRIER = 500, TICK = 1000000, ROUND_TRIPS = 1 << 22, STALLS = 1 << 16, LINE = 256 };

struct connection {
    int fd, connecting, waiting, lost, checking;
    uint32_t sent, received;
    int64_t since;
};

struct round_trip {
    int64_t began, ended;
    size_t connection;
};

struct stall {
    int64_t ended, length;
};

static const int64_t PATIENCE = INT64_C(20000000000);
static char pattern[PERIOD + SIZE], answer[SIZE];
static struct connection *connections;
static struct round_trip *round_trips;
static struct stall *stalls;
static size_t count, talkers, round_trip_count, stall_count, being_checked, checked, back;
static uint64_t sent, answered, closed, wrong;
static int64_t check_began;
static int epoll, port, reconnect, forget;

static const char *due(const struct connection *c, uint32_t position) {
    return pattern + ((size_t)(c - connections) * 61 + position) % PERIOD;
}

static void watch(int operation, struct connection *c, uint32_t events) {
    struct epoll_event event = {.events = events, .data.ptr = c};
    if (epoll_ctl(epoll, operation, c->fd, &event) < 0) fail("epoll_ctl");
}

static void open_socket(struct connection *c, int type) {
    struct sockaddr_in address = loopback(1, port);
    struct linger now = {1, 0};
    c->fd = loopback_socket(type);
    c->sent = c->received = 0;
    bind_source(c->fd, (uint64_t)(c - connections));
    if (setsockopt(c->fd, SOL_SOCKET, SO_LINGER, &now, sizeof now) < 0) fail("setsockopt SO_LINGER");
    c->connecting = connect(c->fd, (struct sockaddr *)&address, sizeof address) < 0;
    if (c->connecting && errno != EINPROGRESS) fail("connect");
}

static void uncheck(struct connection *c, int made_it) {
    if (!c->checking) return;
    c->checking = 0;
    being_checked--;
    checked += (size_t)made_it;
}

static void lose(struct connection *c, int64_t now);

static void say(struct connection *c, int64_t now) {
    if (!c->waiting) c->since = now;
    c->waiting = 1;
    ssize_t done = send(c->fd, due(c, c->sent), SIZE, MSG_NOSIGNAL);
    if (done != SIZE) {
        lose(c, now);
        return;
    }
    c->sent += SIZE;
    sent++;
}

/* Connects again, if that is the way: what it waits for began when the loss was seen, or with the message before it. */
static void lose(struct connection *c, int64_t now) {
    close(c->fd);
    c->fd = -1;
    closed++;
    uncheck(c, 0);
    if (!reconnect) {
        c->waiting = 0;
        return;
    }
    if (!c->waiting) c->since = now;
    c->waiting = c->lost = 1;
    open_socket(c, SOCK_NONBLOCK);
    watch(EPOLL_CTL_ADD, c, c->connecting ? EPOLLOUT : EPOLLIN);
    if (!c->connecting) say(c, now);
}

static void note(struct connection *c, int64_t now) {
    if (round_trip_count < ROUND_TRIPS)
        round_trips[round_trip_count++] = (struct round_trip){c->since, now, (size_t)(c - connections)};
    answered++;
    c->waiting = 0;
    uncheck(c, 1);
    if (!c->lost) return;
    c->lost = 0;
    if (++back == count) {
        printf("back %ld\n", now);
        fflush(stdout);
    }
}

static void hear(struct connection *c, int64_t now) {
    ssize_t got = recv(c->fd, answer, SIZE, 0);
    if (got < 0 && errno == EAGAIN) return;
    if (got <= 0) {
        lose(c, now);
        return;
    }
    uint32_t left = c->sent - c->received;
    if ((size_t)got > left || memcmp(answer, due(c, c->received), (size_t)got)) {
        wrong++;
        lose(c, now);
        return;
    }
    c->received += (uint32_t)got;
    if (c->received == c->sent && c->waiting) note(c, now);
}

static void connected(struct connection *c, int64_t now) {
    int error = 0;
    socklen_t length = sizeof error;
    if (getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &error, &length) < 0) error = errno;
    if (error) {
        errno = error;
        fail("connect again");
    }
    c->connecting = 0;
    watch(EPOLL_CTL_MOD, c, EPOLLIN);
    say(c, now);
}

static void open_all(void) {
    for (size_t i = 0; i < count; i++) {
        struct connection *c = &connections[i];
        open_socket(c, 0);
        if (i % BARRIER != BARRIER - 1 && i != count - 1) continue;
        for (size_t each = i / BARRIER * BARRIER; each <= i; each++)
            if (send(connections[each].fd, due(&connections[each], 0), SIZE, MSG_NOSIGNAL) != SIZE) fail("send");
        for (size_t each = i / BARRIER * BARRIER; each <= i; each++) {
            struct connection *one = &connections[each];
            if (recv(one->fd, answer, SIZE, MSG_WAITALL) != SIZE || memcmp(answer, due(one, 0), SIZE)) fail("first round trip");
            one->sent = one->received = SIZE;
        }
    }
    for (size_t i = 0; i < count; i++) {
        if (fcntl(connections[i].fd, F_SETFL, O_NONBLOCK) < 0) fail("fcntl O_NONBLOCK");
        watch(EPOLL_CTL_ADD, &connections[i], EPOLLIN);
    }
    printf("open\n");
    fflush(stdout);
}

/* The next `messages` are due, each on the next talker that waits for nothing. */
static void talk(uint64_t messages) {
    static size_t next;
    for (size_t looked = 0; messages && looked < talkers; looked++, next = (next + 1) % talkers) {
        struct connection *c = &connections[next];
        if (c->fd < 0 || c->waiting) continue;
        say(c, now_ns());
        messages--;
    }
}

static void check(void) {
    check_began = now_ns();
    being_checked = checked = 0;
    for (size_t i = 0; i < count; i++) {
        struct connection *c = &connections[i];
        if (c->fd < 0) continue;
        c->checking = 1;
        being_checked++;
        if (!c->waiting) say(c, now_ns());
    }
}

static int compare(const void *a, const void *b) {
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

static void report(int64_t from, int64_t to) {
    int64_t *longest = calloc(count + 1, sizeof *longest), stalled = 0;
    size_t seen = 0, messages = 0;
    if (!longest) fail("calloc");
    for (size_t i = 0; i < round_trip_count; i++) {
        struct round_trip *r = &round_trips[i];
        if (r->ended < from || r->began > to) continue;
        messages++;
        if (r->ended - r->began > longest[r->connection]) longest[r->connection] = r->ended - r->began;
    }
    for (size_t i = 0; i < count; i++) {
        struct connection *c = &connections[i];
        if (c->waiting && c->since <= to && now_ns() - c->since > longest[i]) longest[i] = now_ns() - c->since;
        if (longest[i]) longest[seen++] = longest[i];
    }
    qsort(longest, seen, sizeof *longest, compare);
    for (size_t i = 0; i < stall_count; i++)
        if (stalls[i].ended >= from && stalls[i].ended - stalls[i].length <= to && stalls[i].length > stalled) stalled = stalls[i].length;
    printf("{\"connections\": %zu, \"messages\": %zu, \"p50_ms\": %.3f, \"p99_ms\": %.3f, \"worst_ms\": %.3f, \"own_stall_ms\": %.3f, "
           "\"sent\": %lu, \"answered\": %lu, \"closed\": %lu, \"wrong\": %lu}\n",
           seen, messages, (double)longest[seen / 2] / 1e6, (double)longest[seen * 99 / 100] / 1e6,
           (double)longest[seen ? seen - 1 : 0] / 1e6, (double)stalled / 1e6, sent, answered, closed, wrong);
    fflush(stdout);
    free(longest);
    if (forget) round_trip_count = stall_count = 0;
}

/* False at the end of standard input. */
static int obey(void) {
    static char line[LINE];
    static size_t length;
    ssize_t got = read(0, line + length, LINE - 1 - length);
    if (got <= 0) return 0;
    line[length += (size_t)got] = 0;
    for (char *end; (end = strchr(line, '\n'));) {
        int64_t from, to;
        if (!strncmp(line, "check\n", 6)) check();
        if (sscanf(line, "report %ld %ld\n", &from, &to) == 2) report(from, to);
        length -= (size_t)(end + 1 - line);
        memmove(line, end + 1, length + 1);
    }
    return 1;
}

static void look_whether_checked(int64_t now) {
    if (!check_began || (being_checked && now - check_began < PATIENCE)) return;
    check_began = 0;
    printf("checked %zu\n", checked);
    fflush(stdout);
}

int main(int argc, char **argv) {
    double rate = option(argc, argv, "--rate", 20000), seconds = option(argc, argv, "--seconds", 120), owed = 0;
    static struct epoll_event events[EVENTS];
    struct epoll_event input = {.events = EPOLLIN, .data.ptr = &input}, tick = {.events = EPOLLIN, .data.ptr = &tick};
    struct itimerspec every = {{0, TICK}, {0, TICK}};
    count = (size_t)option(argc, argv, "--connections", 1000);
    talkers = (size_t)option(argc, argv, "--talkers", 0);
    port = (int)option(argc, argv, "--port", 0);
    reconnect = (int)option(argc, argv, "--reconnect", 0);
    forget = (int)option(argc, argv, "--forget", 0);
    if (!count || talkers > count) return 2;
    raise_descriptor_limit();
    alarm((unsigned)seconds);
    for (size_t i = 0; i < sizeof pattern; i++) pattern[i] = (char)((i % PERIOD * 2654435761u) >> 13);
    connections = calloc(count, sizeof *connections);
    round_trips = calloc(ROUND_TRIPS, sizeof *round_trips);
    stalls = calloc(STALLS, sizeof *stalls);
    if (!connections || !round_trips || !stalls) fail("calloc");
    int timer = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    if (timer < 0 || (epoll = epoll_create1(EPOLL_CLOEXEC)) < 0) fail("timerfd or epoll");
    open_all();
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, 0, &input) < 0 || epoll_ctl(epoll, EPOLL_CTL_ADD, timer, &tick) < 0) fail("epoll_ctl");
    if (talkers && timerfd_settime(timer, 0, &every, NULL) < 0) fail("timerfd_settime");
    int64_t before = now_ns();
    for (int on = 1; on;) {
        int ready = epoll_wait(epoll, events, EVENTS, check_began ? 100 : -1);
        if (ready < 0 && errno != EINTR) fail("epoll_wait");
        int64_t now = now_ns();
        if (talkers && now - before > TICK && stall_count < STALLS) stalls[stall_count++] = (struct stall){now, now - before - TICK};
        before = now;
        int told = 0;
        uint64_t expirations = 0;
        for (int i = 0; i < ready; i++) {
            struct connection *c = events[i].data.ptr;
            if (events[i].data.ptr == &input)
                told = 1;
            else if (events[i].data.ptr == &tick)
                (void)!read(timer, &expirations, sizeof expirations);
            else if (c->connecting)
                connected(c, now_ns());
            else
                hear(c, now_ns());
        }
        owed += rate * (double)expirations * TICK / 1e9;
        talk((uint64_t)owed);
        owed -= (double)(uint64_t)owed;
        if (told) on = obey();
        look_whether_checked(now_ns());
    }
    return 0;
}
