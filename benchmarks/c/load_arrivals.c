/* New clients at a steady --rate a second, whatever the server does: each connects, makes one round trip, checks every
   byte of it (an echo of 64 bytes that no other client sent, or with --http 1 a response of status 200) and leaves with
   a reset, so that no port waits in TIME_WAIT. Runs until standard input ends, at most --seconds. Prints one JSON object.

   A client's failure is counted by its errno. The generator's own trouble is kept apart: `withheld` clients that were
   never sent for want of descriptors, and `own_stall_ms`, the longest time for which the generator itself did not run, because a
   gap in the service that is no longer than that may be its own. --timeline FILE receives a line for each 10 ms:
   its start (CLOCK_MONOTONIC, ms), clients served, clients failed, then in µs the slowest connect, the slowest
   first byte, the longest gap between two clients served that ended there, the longest stall of the generator,
   and the 50th and 99th percentile of the connects. */
#define _GNU_SOURCE
#include "common.h"
#include <fcntl.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/timerfd.h>

enum { EVENTS = 512, SIZE = 64, BURST = 64, BUCKET_MS = 10, RESERVE = 64 };
enum { CLOSED_EARLY = 200, WRONG_BYTES, NO_ANSWER, KINDS };

struct client {
    int64_t started;
    uint64_t serial;
    int connected;
    size_t received;
    char answer[SIZE];
};

struct bucket {
    int64_t start;
    unsigned served, failed;
    int64_t connect, first, gap, stall;
};

static const char REQUEST[] = "GET / HTTP/1.0\r\nHost: localhost\r\n\r\n";
static const int64_t PATIENCE = INT64_C(10000000000);
static struct client *clients;
static struct bucket bucket;
static struct histogram connects, firsts, bucket_connects;
static uint64_t serial, served, failures[KINDS], failed, withheld;
static int64_t last_served, longest_gap, longest_stall;
static size_t limit, open_clients;
static int epoll, http, port, highest;
static FILE *timeline;

static void raise_to(int64_t *most, int64_t value) {
    if (value > *most) *most = value;
}

static void turn_bucket(int64_t now) {
    int64_t start = now / (BUCKET_MS * 1000000) * BUCKET_MS;
    if (start == bucket.start) return;
    if (timeline && bucket.start)
        fprintf(timeline, "%ld %u %u %ld %ld %ld %ld %.0f %.0f\n", bucket.start, bucket.served, bucket.failed, bucket.connect / 1000,
                bucket.first / 1000, bucket.gap / 1000, bucket.stall / 1000, histogram_us(&bucket_connects, 0.5),
                histogram_us(&bucket_connects, 0.99));
    if (bucket_connects.count) memset(&bucket_connects, 0, sizeof bucket_connects);
    bucket = (struct bucket){.start = start};
}

static void leave(int fd) {
    struct linger now = {1, 0};
    setsockopt(fd, SOL_SOCKET, SO_LINGER, &now, sizeof now);
    close(fd);
    clients[fd].started = 0;
    open_clients--;
}

static void lose(int fd, int kind) {
    failures[kind < KINDS ? kind : NO_ANSWER]++;
    failed++;
    bucket.failed++;
    leave(fd);
}

static void compose(char *bytes, uint64_t number) {
    for (int i = 0; i < SIZE; i++) bytes[i] = (char)(number * 2654435761u >> (i % 29) ^ (uint64_t)i);
    memcpy(bytes, &number, sizeof number);
}

static void arrive(int64_t now) {
    struct sockaddr_in address = loopback(1, port);
    if (open_clients + RESERVE > limit) {
        withheld++;
        return;
    }
    int fd = loopback_socket(SOCK_NONBLOCK);
    struct epoll_event event = {.events = EPOLLOUT, .data.fd = fd};
    bind_source(fd, serial);
    clients[fd] = (struct client){.started = now, .serial = ++serial};
    open_clients++;
    if (fd > highest) highest = fd;
    if (connect(fd, (struct sockaddr *)&address, sizeof address) < 0 && errno != EINPROGRESS)
        lose(fd, errno);
    else if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event) < 0)
        fail("epoll_ctl");
}

static void say(int fd, int64_t now) {
    struct client *c = &clients[fd];
    struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
    char bytes[SIZE];
    size_t size = http ? sizeof REQUEST - 1 : SIZE;
    int error = 0;
    socklen_t length = sizeof error;
    if (getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &length) < 0) error = errno;
    if (!error) {
        histogram_add(&connects, now - c->started);
        histogram_add(&bucket_connects, now - c->started);
        raise_to(&bucket.connect, now - c->started);
        c->connected = 1;
        compose(bytes, c->serial);
        if (send(fd, http ? REQUEST : bytes, size, MSG_NOSIGNAL) != (ssize_t)size) error = errno;
    }
    if (error)
        lose(fd, error);
    else if (epoll_ctl(epoll, EPOLL_CTL_MOD, fd, &event) < 0)
        fail("epoll_ctl");
}

static void hear(int fd, int64_t now) {
    struct client *c = &clients[fd];
    char bytes[SIZE];
    ssize_t got = recv(fd, c->answer + c->received, SIZE - c->received, 0);
    if (got < 0 && errno == EAGAIN) return;
    if (got <= 0) {
        lose(fd, got ? errno : CLOSED_EARLY);
        return;
    }
    if (!c->received) {
        histogram_add(&firsts, now - c->started);
        raise_to(&bucket.first, now - c->started);
    }
    if ((c->received += (size_t)got) < SIZE) return;
    compose(bytes, c->serial);
    if (http ? memcmp(c->answer, "HTTP/1.", 7) || memcmp(c->answer + 8, " 200 ", 5) : memcmp(c->answer, bytes, SIZE)) {
        lose(fd, WRONG_BYTES);
        return;
    }
    served++;
    bucket.served++;
    if (last_served) {
        raise_to(&bucket.gap, now - last_served);
        raise_to(&longest_gap, now - last_served);
    }
    last_served = now;
    leave(fd);
}

static void give_up_on_the_silent(int64_t now, int64_t patience) {
    for (int fd = 0; fd <= highest; fd++)
        if (clients[fd].started && now - clients[fd].started > patience) lose(fd, NO_ANSWER);
}

static const char *kind_name(int kind) {
    static char number[16];
    switch (kind) {
    case ECONNREFUSED: return "refused";
    case ECONNRESET: return "reset";
    case EPIPE: return "broken pipe";
    case ETIMEDOUT: return "timed out";
    case EADDRNOTAVAIL: return "no port left";
    case CLOSED_EARLY: return "closed early";
    case WRONG_BYTES: return "wrong bytes";
    case NO_ANSWER: return "no answer";
    }
    snprintf(number, sizeof number, "errno %d", kind);
    return number;
}

static void report(void) {
    const char *comma = "";
    printf("{\"clients\": %lu, \"served\": %lu, \"failed\": %lu, \"withheld\": %lu, \"failures\": {", serial, served, failed, withheld);
    for (int i = 0; i < KINDS; i++)
        if (failures[i]) {
            printf("%s\"%s\": %lu", comma, kind_name(i), failures[i]);
            comma = ", ";
        }
    printf("}, \"connect_p50_us\": %.1f, \"connect_p99_us\": %.1f, \"connect_max_ms\": %.3f, \"first_byte_p50_us\": %.1f, "
           "\"first_byte_p99_us\": %.1f, \"first_byte_max_ms\": %.3f, \"gap_max_ms\": %.3f, \"own_stall_ms\": %.3f}\n",
           histogram_us(&connects, 0.5), histogram_us(&connects, 0.99), (double)connects.max / 1e6, histogram_us(&firsts, 0.5),
           histogram_us(&firsts, 0.99), (double)firsts.max / 1e6, (double)longest_gap / 1e6, (double)longest_stall / 1e6);
}

int main(int argc, char **argv) {
    double rate = option(argc, argv, "--rate", 5000), seconds = option(argc, argv, "--seconds", 10);
    const char *path = text_option(argc, argv, "--timeline", NULL);
    port = (int)option(argc, argv, "--port", 0);
    http = (int)option(argc, argv, "--http", 0);
    limit = raise_descriptor_limit();
    if (!(clients = calloc(limit, sizeof *clients))) fail("calloc");
    if (path && !(timeline = fopen(path, "w"))) fail(path);
    if ((epoll = epoll_create1(EPOLL_CLOEXEC)) < 0) fail("epoll_create1");
    int timer = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    long interval = (long)(1e9 / rate);
    struct itimerspec every = {{interval / 1000000000, interval % 1000000000}, {0, 1}};
    struct epoll_event tick = {.events = EPOLLIN, .data.fd = timer};
    if (timer < 0 || timerfd_settime(timer, 0, &every, NULL) < 0) fail("timerfd");
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, timer, &tick) < 0) fail("epoll_ctl");
    alarm((unsigned)seconds + 30);
    static struct epoll_event events[EVENTS];
    int64_t before = now_ns(), end = before + (int64_t)(seconds * 1e9), looked = before;
    uint64_t due = 0;
    int arriving = 1;
    while (arriving || open_clients) {
        int ready = epoll_wait(epoll, events, EVENTS, 100);
        if (ready < 0 && errno != EINTR) fail("epoll_wait");
        int64_t now = now_ns();
        turn_bucket(now);
        if (arriving && serial > 1) {
            raise_to(&bucket.stall, now - before);
            raise_to(&longest_stall, now - before);
        }
        before = now;
        for (int i = 0; i < ready; i++) {
            int fd = events[i].data.fd;
            uint64_t expirations;
            if (fd == timer) {
                if (read(timer, &expirations, sizeof expirations) == sizeof expirations && arriving) due += expirations;
            } else if (!clients[fd].connected) {
                say(fd, now_ns());
            } else {
                hear(fd, now_ns());
            }
        }
        for (int i = 0; i < BURST && due; i++, due--) arrive(now_ns());
        if (now - looked > 200000000) {
            struct pollfd input = {.fd = 0, .events = POLLIN};
            char byte;
            looked = now;
            if (poll(&input, 1, 0) > 0 && read(0, &byte, 1) <= 0) arriving = 0;
            if (now >= end) arriving = 0;
            if (!arriving) due = 0;
            give_up_on_the_silent(now, PATIENCE);
        }
    }
    turn_bucket(now_ns() + BUCKET_MS * 1000000);
    if (timeline) fclose(timeline);
    report();
    return 0;
}
