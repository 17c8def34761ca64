# cython: language_level=3
"""What sendmsg(2), recvmsg(2) and cmsg(3) take, as the modules here use it."""

from libc.stdint cimport uint32_t

cdef extern from "<sys/socket.h>" nogil:
    enum: SOL_SOCKET, SCM_RIGHTS, MSG_CMSG_CLOEXEC, MSG_CTRUNC, MSG_DONTWAIT, MSG_NOSIGNAL, MSG_TRUNC
    struct iovec:
        void *iov_base
        size_t iov_len
    struct msghdr:
        void *msg_name
        uint32_t msg_namelen
        iovec *msg_iov
        size_t msg_iovlen
        void *msg_control
        size_t msg_controllen
        int msg_flags
    struct cmsghdr:
        size_t cmsg_len
        int cmsg_level
        int cmsg_type
    size_t CMSG_LEN(size_t size)
    cmsghdr *CMSG_FIRSTHDR(msghdr *message)
    cmsghdr *CMSG_NXTHDR(msghdr *message, cmsghdr *block)
    unsigned char *CMSG_DATA(cmsghdr *block)
    ssize_t sendmsg(int sock, const msghdr *message, int flags)
    ssize_t recvmsg(int sock, msghdr *message, int flags)
