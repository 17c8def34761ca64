/* The reference that every echo server is measured against: level-triggered epoll, one shared receive buffer, send at
   once, and EPOLLOUT only after a short send. While a connection has unsent bytes it is not read, so that one block of
   the buffer's size holds all that it can owe; blocks come from a free list, since a malloc that gives memory back to
   the kernel halves the throughput of a stream. Prints its port. */
#define _GNU_SOURCE
#include "common.h"
#include <sys/epoll.h>

enum { BUFFER = 256 * 1024, EVENTS = 512, ACCEPTS = 64 };

struct block {
    struct block *next;
    char bytes[BUFFER];
};

struct connection {
    struct block *unsent;
    uint32_t begin, end;
};

static struct connection *connections;
static struct block *spare;
static char buffer[BUFFER];
static int epoll;

static void watch(int operation, int fd, uint32_t events) {
    struct epoll_event event = {.events = events, .data.fd = fd};
    if (epoll_ctl(epoll, operation, fd, &event) < 0) fail("epoll_ctl");
}

static void release(struct connection *c) {
    if (!c->unsent) return;
    c->unsent->next = spare;
    spare = c->unsent;
    c->unsent = NULL;
}

static void drop(int fd) {
    release(&connections[fd]);
    close(fd);
}

static void keep(int fd, size_t from, size_t to) {
    struct connection *c = &connections[fd];
    if ((c->unsent = spare))
        spare = spare->next;
    else if (!(c->unsent = malloc(sizeof *c->unsent)))
        fail("malloc");
    memcpy(c->unsent->bytes, buffer + from, to - from);
    c->begin = 0;
    c->end = (uint32_t)(to - from);
    watch(EPOLL_CTL_MOD, fd, EPOLLOUT);
}

static void readable(int fd) {
    ssize_t got = recv(fd, buffer, BUFFER, 0);
    if (got > 0) {
        ssize_t sent = send(fd, buffer, (size_t)got, MSG_NOSIGNAL);
        if (sent == got) return;
        if (sent >= 0 || errno == EAGAIN)
            keep(fd, sent > 0 ? (size_t)sent : 0, (size_t)got);
        else
            drop(fd);
    } else if (got == 0 || (errno != EAGAIN && errno != EINTR)) {
        drop(fd);
    }
}

static void writable(int fd) {
    struct connection *c = &connections[fd];
    ssize_t sent = send(fd, c->unsent->bytes + c->begin, c->end - c->begin, MSG_NOSIGNAL);
    if (sent < 0) {
        if (errno != EAGAIN && errno != EINTR) drop(fd);
    } else if ((c->begin += (uint32_t)sent) == c->end) {
        release(c);
        watch(EPOLL_CTL_MOD, fd, EPOLLIN);
    }
}

static void accept_batch(int listener) {
    for (int i = 0; i < ACCEPTS; i++) {
        int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd >= 0)
            watch(EPOLL_CTL_ADD, fd, EPOLLIN);
        else if (errno == EAGAIN)
            return;
        else if (errno != ECONNABORTED && errno != EINTR)
            fail("accept4");
    }
}

int main(void) {
    connections = calloc(raise_descriptor_limit(), sizeof *connections);
    int listener = loopback_socket(SOCK_NONBLOCK);
    struct sockaddr_in address = loopback(1, 0);
    socklen_t length = sizeof address;
    if (bind(listener, (struct sockaddr *)&address, length) < 0) fail("bind");
    if (listen(listener, 4096) < 0) fail("listen");
    if (getsockname(listener, (struct sockaddr *)&address, &length) < 0) fail("getsockname");
    if (!connections || (epoll = epoll_create1(EPOLL_CLOEXEC)) < 0) fail("epoll_create1");
    watch(EPOLL_CTL_ADD, listener, EPOLLIN);
    printf("%d\n", ntohs(address.sin_port));
    fflush(stdout);
    static struct epoll_event events[EVENTS];
    for (;;) {
        int ready = epoll_wait(epoll, events, EVENTS, -1);
        if (ready < 0 && errno != EINTR) fail("epoll_wait");
        for (int i = 0; i < ready; i++) {
            int fd = events[i].data.fd;
            if (fd == listener)
                accept_batch(listener);
            else if (connections[fd].unsent)
                writable(fd);
            else
                readable(fd);
        }
    }
}
