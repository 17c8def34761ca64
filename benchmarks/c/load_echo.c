/* Echo round trips: --connections of them, each with --in-flight messages of --size bytes under way, for --warm-up and
   then --seconds (or until --messages). Every byte is compared in the warm-up, none afterwards, so that the generator
   stays faster than the server. The server's CPU time is read at the same two instants at which the messages are
   counted. Prints one JSON object. */
#define _GNU_SOURCE
#include "common.h"
#include <fcntl.h>
#include <sys/epoll.h>

enum { CHUNK = 256 * 1024, PERIOD = 4093, EVENTS = 512, BARRIER = 500 };

struct connection {
    int fd;
    int blocked;
    uint64_t sent, received, allowed;
    int64_t *sent_at;
};

static char pattern[CHUNK + PERIOD], buffer[CHUNK];
static struct histogram latencies;
static uint64_t size, in_flight, messages;
static int epoll, measuring;

static void connect_one(struct connection *c, int port, size_t index) {
    struct sockaddr_in address = loopback(1, port);
    c->fd = loopback_socket(0);
    bind_source(c->fd, index);
    if (connect(c->fd, (struct sockaddr *)&address, sizeof address) < 0) fail("connect");
    if (!(c->sent_at = calloc(in_flight, sizeof *c->sent_at))) fail("calloc");
}

/* An accept queue is served in order: one answer says that all earlier connections have been accepted too. */
static void barrier(struct connection *c) {
    if (send(c->fd, pattern, 1, MSG_NOSIGNAL) != 1 || recv(c->fd, buffer, 1, 0) != 1) fail("first round trip");
    c->sent = c->received = c->allowed = 0;
}

static void push(struct connection *c, int64_t now) {
    while (c->sent < c->allowed) {
        uint64_t left = c->allowed - c->sent;
        ssize_t sent = send(c->fd, pattern + c->sent % PERIOD, left < CHUNK ? left : CHUNK, MSG_NOSIGNAL);
        int blocked = sent < 0 && errno == EAGAIN;
        if (sent < 0 && !blocked) fail("send");
        if (!blocked) {
            for (uint64_t m = (c->sent + size - 1) / size; m * size < c->sent + (uint64_t)sent; m++) c->sent_at[m % in_flight] = now;
            c->sent += (uint64_t)sent;
        }
        if (blocked != c->blocked) {
            struct epoll_event event = {.events = EPOLLIN | (blocked ? EPOLLOUT : 0u), .data.ptr = c};
            if (epoll_ctl(epoll, EPOLL_CTL_MOD, c->fd, &event) < 0) fail("epoll_ctl");
            c->blocked = blocked;
        }
        if (blocked) return;
    }
}

static void pull(struct connection *c, int64_t now) {
    ssize_t got = recv(c->fd, buffer, CHUNK, 0);
    if (got < 0 && errno == EAGAIN) return;
    if (got <= 0) {
        if (!got) errno = ECONNRESET;
        fail("recv");
    }
    if (!measuring && memcmp(buffer, pattern + c->received % PERIOD, (size_t)got)) {
        fprintf(stderr, "the server echoed other bytes than it was sent\n");
        exit(1);
    }
    uint64_t before = c->received / size, after = (c->received += (uint64_t)got) / size;
    for (uint64_t m = before; measuring && m < after; m++) histogram_add(&latencies, now - c->sent_at[m % in_flight]);
    messages += after - before;
    c->allowed += (after - before) * size;
}

int main(int argc, char **argv) {
    size_t count = (size_t)option(argc, argv, "--connections", 1);
    int port = (int)option(argc, argv, "--port", 0);
    pid_t server = (pid_t)option(argc, argv, "--server-pid", 0);
    double warm_up = option(argc, argv, "--warm-up", 0.2), seconds = option(argc, argv, "--seconds", 1);
    uint64_t most = (uint64_t)option(argc, argv, "--messages", 1e18);
    size = (uint64_t)option(argc, argv, "--size", 64);
    in_flight = (uint64_t)option(argc, argv, "--in-flight", 1);
    raise_descriptor_limit();
    alarm((unsigned)(warm_up + seconds) + 60);
    for (size_t i = 0; i < sizeof pattern; i++) pattern[i] = (char)((i % PERIOD * 2654435761u) >> 13);
    struct connection *connections = calloc(count, sizeof *connections);
    if (!connections || (epoll = epoll_create1(EPOLL_CLOEXEC)) < 0) fail("epoll_create1");
    for (size_t i = 0; i < count; i++) {
        connect_one(&connections[i], port, i);
        if (i % BARRIER == BARRIER - 1 || i == count - 1) barrier(&connections[i]);
    }
    for (size_t i = 0; i < count; i++) {
        struct connection *c = &connections[i];
        struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
        if (fcntl(c->fd, F_SETFL, O_NONBLOCK) < 0) fail("fcntl O_NONBLOCK");
        if (epoll_ctl(epoll, EPOLL_CTL_ADD, c->fd, &event) < 0) fail("epoll_ctl");
        c->allowed = in_flight * size;
        push(c, now_ns());
    }
    static struct epoll_event events[EVENTS];
    int64_t start = now_ns() + (int64_t)(warm_up * 1e9), end = INT64_MAX, own = 0, spent = 0;
    for (;;) {
        int ready = epoll_wait(epoll, events, EVENTS, 1000);
        if (ready < 0 && errno != EINTR) fail("epoll_wait");
        int64_t now = now_ns();
        for (int i = 0; i < ready; i++) {
            struct connection *c = events[i].data.ptr;
            if (events[i].events & ~(uint32_t)EPOLLOUT) pull(c, now);
            push(c, now);
        }
        if (!measuring && now >= start) {
            measuring = 1;
            messages = 0;
            start = now_ns();
            end = start + (int64_t)(seconds * 1e9);
            own = cpu_ns(getpid());
            spent = cpu_ns(server);
        } else if (measuring && (now >= end || messages >= most)) {
            end = now_ns();
            spent = cpu_ns(server) - spent;
            own = cpu_ns(getpid()) - own;
            break;
        }
    }
    printf("{\"messages\": %lu, \"seconds\": %.6f, \"server_cpu_ns\": %ld, \"own_cpu_ns\": %ld, "
           "\"p50_us\": %.2f, \"p99_us\": %.2f, \"max_us\": %.2f}\n",
           messages, (double)(end - start) / 1e9, spent, own, histogram_us(&latencies, 0.5), histogram_us(&latencies, 0.99),
           (double)latencies.max / 1000);
    return 0;
}
