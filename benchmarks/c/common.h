/* What every C program of the benchmarks shares: clock, options, sockets, latency histogram. */
#ifndef BENCHMARKS_COMMON_H
#define BENCHMARKS_COMMON_H

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define UNUSED __attribute__((unused))

static UNUSED void fail(const char *what) {
    fprintf(stderr, "%s: %s\n", what, strerror(errno));
    exit(1);
}

static UNUSED int64_t clock_ns(clockid_t clock) {
    struct timespec t;
    if (clock_gettime(clock, &t) < 0) fail("clock_gettime");
    return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

static UNUSED int64_t now_ns(void) { return clock_ns(CLOCK_MONOTONIC); }

/* CPU time of all threads of a process: the counter behind /proc/PID/schedstat, but brought up to this instant,
   where the file may lag a scheduler tick behind. */
static UNUSED int64_t cpu_ns(pid_t pid) {
    clockid_t clock;
    if (!pid) return 0;
    if ((errno = clock_getcpuclockid(pid, &clock))) fail("clock_getcpuclockid");
    return clock_ns(clock);
}

static UNUSED const char *text_option(int argc, char **argv, const char *name, const char *otherwise) {
    for (int i = 1; i + 1 < argc; i++)
        if (!strcmp(argv[i], name)) return argv[i + 1];
    return otherwise;
}

static UNUSED double option(int argc, char **argv, const char *name, double otherwise) {
    const char *text = text_option(argc, argv, name, NULL);
    return text ? atof(text) : otherwise;
}

static UNUSED size_t raise_descriptor_limit(void) {
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) < 0) fail("getrlimit");
    limit.rlim_cur = limit.rlim_max;
    if (setrlimit(RLIMIT_NOFILE, &limit) < 0) fail("setrlimit");
    return limit.rlim_cur < (1 << 20) ? limit.rlim_cur : (1 << 20);
}

/* TCP_NODELAY is inherited by what a listener accepts, so nobody pays for it by connection. */
static UNUSED int loopback_socket(int type) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | type, 0), on = 1;
    if (fd < 0) fail("socket");
    if (setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on) < 0) fail("setsockopt TCP_NODELAY");
    return fd;
}

static UNUSED struct sockaddr_in loopback(uint32_t host, int port) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    address.sin_addr.s_addr = htonl((127u << 24) + host);
    return address;
}

/* Source addresses 127.0.0.2 to 127.0.0.251 in turn: 28,000 ephemeral ports each, so that the ports which wait in
   TIME_WAIT never run out. */
static UNUSED void bind_source(int fd, uint64_t serial) {
    struct sockaddr_in address = loopback(2 + serial % 250, 0);
    int on = 1;
    if (setsockopt(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &on, sizeof on) < 0) fail("setsockopt IP_BIND_ADDRESS_NO_PORT");
    if (bind(fd, (struct sockaddr *)&address, sizeof address) < 0) fail("bind to a loopback source address");
}

/* Latencies in 32 buckets for each power of two: at most 3 % wide. */
struct histogram {
    uint64_t buckets[64 * 32], count;
    int64_t max;
};

static UNUSED void histogram_add(struct histogram *h, int64_t ns) {
    uint64_t value = ns < 32 ? 32 : (uint64_t)ns;
    int power = 63 - __builtin_clzll(value);
    h->buckets[power * 32 + ((value >> (power - 5)) & 31)]++;
    h->count++;
    if (ns > h->max) h->max = ns;
}

static UNUSED double histogram_us(const struct histogram *h, double fraction) {
    uint64_t wanted = (uint64_t)(fraction * (double)h->count), seen = 0;
    for (int i = 0; i < 64 * 32; i++)
        if ((seen += h->buckets[i]) > wanted) return (double)((UINT64_C(1) << (i / 32)) * (32 + i % 32)) / 32 / 1000;
    return (double)h->max / 1000;
}

#endif
