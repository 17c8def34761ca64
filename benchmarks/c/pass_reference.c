/* Passing descriptors in C: --batch B of them in one message from one end of a socket pair to the other, received
   close-on-exec and closed, --count in all. Prints the nanoseconds of wall time for each descriptor, with and without
   the closing. */
#define _GNU_SOURCE
#include "common.h"
#include <fcntl.h>

enum { MOST = 253 };

int main(int argc, char **argv) {
    int batch = (int)option(argc, argv, "--batch", 1), pair[2], sent[MOST], received[MOST];
    long rounds = (long)option(argc, argv, "--count", 10000) / batch;
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(sizeof sent)];
    } control;
    char payload = 'x';
    struct iovec vector = {&payload, 1};
    size_t size = (size_t)batch * sizeof(int);
    if (batch < 1 || batch > MOST || rounds < 1) return 2;
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) < 0) fail("socketpair");
    for (int i = 0; i < batch; i++)
        if ((sent[i] = open("/dev/null", O_RDONLY | O_CLOEXEC)) < 0) fail("open /dev/null");
    int64_t start = now_ns(), closing = 0;
    for (long round = 0; round < rounds; round++) {
        struct msghdr out = {.msg_iov = &vector, .msg_iovlen = 1, .msg_control = control.bytes, .msg_controllen = CMSG_SPACE(size)};
        struct cmsghdr *header = CMSG_FIRSTHDR(&out);
        header->cmsg_level = SOL_SOCKET;
        header->cmsg_type = SCM_RIGHTS;
        header->cmsg_len = CMSG_LEN(size);
        memcpy(CMSG_DATA(header), sent, size);
        if (sendmsg(pair[0], &out, MSG_NOSIGNAL) != 1) fail("sendmsg");
        struct msghdr in = {.msg_iov = &vector, .msg_iovlen = 1, .msg_control = control.bytes, .msg_controllen = sizeof control.bytes};
        if (recvmsg(pair[1], &in, MSG_CMSG_CLOEXEC) != 1) fail("recvmsg");
        header = CMSG_FIRSTHDR(&in);
        if ((in.msg_flags & MSG_CTRUNC) || !header || header->cmsg_len != CMSG_LEN(size)) return 1;
        memcpy(received, CMSG_DATA(header), size);
        int64_t passed = now_ns();
        for (int i = 0; i < batch; i++) close(received[i]);
        closing += now_ns() - passed;
    }
    int64_t all = now_ns() - start;
    printf("%.1f %.1f\n", (double)all / ((double)rounds * batch), (double)(all - closing) / ((double)rounds * batch));
    return 0;
}
