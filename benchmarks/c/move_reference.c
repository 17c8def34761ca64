/* Moving established connections with no protocol at all, as fast as it goes: --connections of them are held by one
   process in an epoll set, the old one, which takes them out of it in batches of --batch (EPOLL_CTL_DEL), sends each
   batch in one message (SCM_RIGHTS, with --state bytes for each connection) and closes it; the new one receives a batch
   and watches it (EPOLL_CTL_ADD) while the old one goes on. The old one runs on --old-cpu, the new one on --new-cpu; a
   third process has the other ends and sleeps. With --close-epoll 1 the whole epoll descriptor is closed instead.
   With --window N no connection is lost, whoever dies: the old one keeps a batch until the new one has acknowledged it
   with a byte, closes it then and releases it with another one, and the new one watches only what was released; so many
   batches are on their way at a time.
   Prints one JSON object: nanoseconds of wall time from the first DEL to the last ADD, and of CPU on both sides. */
#define _GNU_SOURCE
#include "common.h"
#include <sched.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/wait.h>

enum { MOST = 253, QUEUE = 4096, BARRIER = 500 };

struct outcome {
    int64_t done, cpu;
};

static size_t count, batch, state_size, window;
static int released[2];
static char *states;

static union {
    struct cmsghdr align;
    char bytes[CMSG_SPACE(MOST * sizeof(int))];
} control;

static size_t least(size_t a, size_t b) { return a < b ? a : b; }

static void run_on(int cpu) {
    cpu_set_t set;
    if (cpu < 0) return;
    CPU_ZERO(&set);
    CPU_SET((size_t)cpu, &set);
    if (sched_setaffinity(0, sizeof set, &set) < 0) fail("sched_setaffinity");
}

static pid_t start(void) {
    pid_t pid = fork();
    if (pid < 0) fail("fork");
    if (!pid && prctl(PR_SET_PDEATHSIG, SIGKILL) < 0) fail("prctl");
    return pid;
}

static void read_all(int fd, void *bytes, size_t size) {
    for (size_t done = 0; done < size;) {
        ssize_t got = read(fd, (char *)bytes + done, size - done);
        if (got < 0) fail("read");
        if (!got) exit(1);
        done += (size_t)got;
    }
}

static void watch(int epoll, int operation, int fd) {
    struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
    if (epoll_ctl(epoll, operation, fd, &event) < 0) fail("epoll_ctl");
}

/* The other ends; a byte through `told` for each BARRIER of them, so that no accept queue is too short. */
static void be_client(struct sockaddr_in address, int told) {
    struct linger now = {1, 0};
    char byte;
    for (size_t i = 0; i < count; i++) {
        int fd = loopback_socket(0);
        bind_source(fd, i);
        if (setsockopt(fd, SOL_SOCKET, SO_LINGER, &now, sizeof now) < 0) fail("setsockopt SO_LINGER");
        if (connect(fd, (struct sockaddr *)&address, sizeof address) < 0) fail("connect");
        if (i % BARRIER == BARRIER - 1) read_all(told, &byte, 1);
    }
    if (read(told, &byte, 1) < 0) fail("read");
    exit(0);
}

/* One batch of those that have come was released. */
static size_t watch_batch(int epoll, const int *descriptors, size_t begin) {
    size_t end = begin + least(batch, count - begin);
    char byte;
    if (window) read_all(released[0], &byte, 1);
    for (size_t i = begin; i < end; i++) watch(epoll, EPOLL_CTL_ADD, descriptors[i]);
    return end;
}

static void take(int channel, int result) {
    size_t most = batch * state_size, taken = 0, watched = 0;
    int *descriptors = calloc(count, sizeof *descriptors), epoll = epoll_create1(EPOLL_CLOEXEC);
    if (!descriptors) fail("calloc");
    char first;
    if (epoll < 0) fail("epoll_create1");
    int64_t spent = -1;
    while (taken < count) {
        struct iovec vector = {state_size ? states + taken * state_size : &first, state_size ? most : 1};
        struct msghdr in = {.msg_iov = &vector, .msg_iovlen = 1, .msg_control = control.bytes, .msg_controllen = sizeof control.bytes};
        size_t expected = least(batch, count - taken);
        if (state_size) vector.iov_len = expected * state_size;
        ssize_t got = recvmsg(channel, &in, MSG_CMSG_CLOEXEC);
        if (spent < 0) spent = clock_ns(CLOCK_PROCESS_CPUTIME_ID);
        if (got < 1) fail("recvmsg");
        struct cmsghdr *header = CMSG_FIRSTHDR(&in);
        if ((in.msg_flags & MSG_CTRUNC) || !header || header->cmsg_len != CMSG_LEN(expected * sizeof(int))) exit(1);
        memcpy(descriptors + taken, CMSG_DATA(header), expected * sizeof(int));
        if (state_size) read_all(channel, states + taken * state_size + got, expected * state_size - (size_t)got);
        if (window && write(channel, &first, 1) != 1) fail("write");
        if (!window || taken) watched = watch_batch(epoll, descriptors, watched);
        taken += expected;
    }
    while (watched < count) watched = watch_batch(epoll, descriptors, watched);
    struct outcome outcome = {now_ns(), clock_ns(CLOCK_PROCESS_CPUTIME_ID) - spent};
    if (write(result, &outcome, sizeof outcome) != sizeof outcome) fail("write");
    exit(0);
}

static size_t close_batch(int channel, const int *descriptors, size_t begin) {
    size_t end = begin + least(batch, count - begin);
    char byte = 'x';
    if (window) read_all(channel, &byte, 1);
    for (size_t i = begin; i < end; i++) close(descriptors[i]);
    if (window && write(released[1], &byte, 1) != 1) fail("write");
    return end;
}

static void give(int channel, int epoll, const int *descriptors, int close_epoll) {
    char byte = 'x';
    size_t closed = 0;
    if (close_epoll) close(epoll);
    for (size_t given = 0; given < count;) {
        size_t now = least(batch, count - given), size = now * sizeof(int), bytes = state_size ? now * state_size : 1;
        struct iovec vector = {state_size ? states + given * state_size : &byte, bytes};
        struct msghdr out = {.msg_iov = &vector, .msg_iovlen = 1, .msg_control = control.bytes, .msg_controllen = CMSG_SPACE(size)};
        for (size_t i = 0; i < now && !close_epoll; i++) watch(epoll, EPOLL_CTL_DEL, descriptors[given + i]);
        struct cmsghdr *header = CMSG_FIRSTHDR(&out);
        header->cmsg_level = SOL_SOCKET;
        header->cmsg_type = SCM_RIGHTS;
        header->cmsg_len = CMSG_LEN(size);
        memcpy(CMSG_DATA(header), descriptors + given, size);
        if (sendmsg(channel, &out, MSG_NOSIGNAL) != (ssize_t)bytes) fail("sendmsg");
        given += now;
        if (!window || given - closed >= window * batch) closed = close_batch(channel, descriptors, closed);
    }
    while (closed < count) closed = close_batch(channel, descriptors, closed);
}

int main(int argc, char **argv) {
    int old_cpu = (int)option(argc, argv, "--old-cpu", -1), new_cpu = (int)option(argc, argv, "--new-cpu", -1);
    int close_epoll = (int)option(argc, argv, "--close-epoll", 0), channel[2], result[2], told[2];
    count = (size_t)option(argc, argv, "--connections", 9000);
    batch = (size_t)option(argc, argv, "--batch", 252);
    state_size = (size_t)option(argc, argv, "--state", 0);
    window = (size_t)option(argc, argv, "--window", 0);
    if (!count || !batch || batch > MOST) return 2;
    raise_descriptor_limit();
    alarm(60);
    int *descriptors = calloc(count, sizeof *descriptors), listener = loopback_socket(0);
    struct sockaddr_in address = loopback(1, 0);
    socklen_t length = sizeof address;
    if (bind(listener, (struct sockaddr *)&address, length) < 0) fail("bind");
    if (listen(listener, QUEUE) < 0) fail("listen");
    if (getsockname(listener, (struct sockaddr *)&address, &length) < 0) fail("getsockname");
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, channel) < 0) fail("socketpair");
    if (pipe(result) < 0 || pipe(told) < 0 || pipe(released) < 0) fail("pipe");
    if (!descriptors || !(states = malloc(count * state_size + 1))) fail("malloc");
    memset(states, 's', count * state_size + 1);
    pid_t client = start();
    if (!client) {
        close(told[1]);
        be_client(address, told[0]);
    }
    pid_t taker = start();
    if (!taker) {
        close(told[1]);
        run_on(new_cpu);
        take(channel[1], result[1]);
    }
    run_on(old_cpu);
    int epoll = epoll_create1(EPOLL_CLOEXEC);
    if (epoll < 0) fail("epoll_create1");
    for (size_t i = 0; i < count; i++) {
        if ((descriptors[i] = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) < 0) fail("accept4");
        watch(epoll, EPOLL_CTL_ADD, descriptors[i]);
        if (i % BARRIER == BARRIER - 1 && write(told[1], "x", 1) != 1) fail("write");
    }
    close(channel[1]);
    close(result[1]);
    usleep(20000);
    int64_t spent = clock_ns(CLOCK_PROCESS_CPUTIME_ID), began = now_ns();
    give(channel[0], epoll, descriptors, close_epoll);
    spent = clock_ns(CLOCK_PROCESS_CPUTIME_ID) - spent;
    struct outcome outcome;
    read_all(result[0], &outcome, sizeof outcome);
    close(told[1]);
    if (waitpid(client, NULL, 0) < 0 || waitpid(taker, NULL, 0) < 0) fail("waitpid");
    printf("{\"ns\": %ld, \"old_cpu_ns\": %ld, \"new_cpu_ns\": %ld}\n", outcome.done - began, spent, outcome.cpu);
    return 0;
}
