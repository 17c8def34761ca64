/* `rate`: connect, shut down the writing half, wait for the server's end-of-file, close; --connections at a time for
   --warm-up and then --seconds. Prints one JSON object.
   `hold`: open --connections, one round trip of 64 bytes on each so that the server has given it all it ever will,
   print "holding", and keep them until standard input ends. */
#define _GNU_SOURCE
#include "common.h"
#include <sys/epoll.h>

enum { EVENTS = 512 };

static int connect_from(uint64_t serial, int port) {
    struct sockaddr_in address = loopback(1, port);
    int fd = loopback_socket(0);
    bind_source(fd, serial);
    if (connect(fd, (struct sockaddr *)&address, sizeof address) < 0) fail("connect");
    return fd;
}

static void open_half_closed(int epoll, uint64_t serial, int port) {
    int fd = connect_from(serial, port);
    struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
    if (shutdown(fd, SHUT_WR) < 0) fail("shutdown");
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event) < 0) fail("epoll_ctl");
}

static int rate(int port, int connections, double warm_up, double seconds, pid_t server) {
    static struct epoll_event events[EVENTS];
    uint64_t closed = 0, serial = 0;
    int epoll = epoll_create1(EPOLL_CLOEXEC), measuring = 0;
    int64_t start = now_ns() + (int64_t)(warm_up * 1e9), end = INT64_MAX, spent = 0;
    alarm((unsigned)(warm_up + seconds) + 60);
    while (serial < (uint64_t)connections) open_half_closed(epoll, serial++, port);
    for (;;) {
        int ready = epoll_wait(epoll, events, EVENTS, 1000);
        if (ready < 0 && errno != EINTR) fail("epoll_wait");
        for (int i = 0; i < ready; i++) {
            char byte;
            if (recv(events[i].data.fd, &byte, 1, 0) != 0) fail("end-of-file expected, recv");
            close(events[i].data.fd);
            closed++;
            open_half_closed(epoll, serial++, port);
        }
        int64_t now = now_ns();
        if (!measuring && now >= start) {
            measuring = 1;
            closed = 0;
            start = now;
            end = now + (int64_t)(seconds * 1e9);
            spent = cpu_ns(server);
        } else if (measuring && now >= end) {
            end = now_ns();
            spent = cpu_ns(server) - spent;
            break;
        }
    }
    printf("{\"messages\": %lu, \"seconds\": %.6f, \"server_cpu_ns\": %ld}\n", closed, (double)(end - start) / 1e9, spent);
    return 0;
}

static int hold(int port, int connections) {
    char out[64] = "a connection that does nothing more", in[64];
    for (int i = 0; i < connections; i++) {
        int fd = connect_from((uint64_t)i, port);
        if (send(fd, out, sizeof out, MSG_NOSIGNAL) != sizeof out) fail("send");
        if (recv(fd, in, sizeof in, MSG_WAITALL) != sizeof in || memcmp(in, out, sizeof in)) fail("recv");
    }
    printf("holding\n");
    fflush(stdout);
    while (read(0, in, sizeof in) > 0) continue;
    return 0;
}

int main(int argc, char **argv) {
    int port = (int)option(argc, argv, "--port", 0), connections = (int)option(argc, argv, "--connections", 64);
    raise_descriptor_limit();
    if (argc > 1 && !strcmp(argv[1], "rate"))
        return rate(port, connections, option(argc, argv, "--warm-up", 0.2), option(argc, argv, "--seconds", 1),
                    (pid_t)option(argc, argv, "--server-pid", 0));
    if (argc > 1 && !strcmp(argv[1], "hold")) return hold(port, connections);
    fprintf(stderr, "usage: load_connect rate|hold --port PORT [--connections N] [--seconds S] [--server-pid PID]\n");
    return 2;
}
