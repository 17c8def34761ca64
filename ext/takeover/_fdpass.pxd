# cython: language_level=3
"""Descriptors over an AF_UNIX stream socket for C callers: no GIL, no exception, -errno where the kernel refused.

EINTR and EAGAIN come back like any other error: only the caller knows whether to wait, and who runs signal handlers.
"""

from cpython cimport array

cdef enum:
    MOST = 252              # descriptors in one call: SCM_MAX_FD is 253 (include/net/scm.h), musl's sendmsg takes 252
    CONTROL_WORDS = 128     # 8-byte words of control data: CMSG_SPACE(MOST * sizeof(int)) is 1024 bytes

# Sends `data` with `count` descriptors, at most MOST, on its first byte; they stay the caller's. Returns how many bytes
# went out (any number from 1 took all descriptors along) or -errno. `size` is at least 1.
cdef ssize_t send_batch(int sock, const void *data, size_t size, const int *descriptors, int count) noexcept nogil

# Receives at most `size` bytes into `data` and at most `room` descriptors, close-on-exec, into `descriptors`; `count`
# says how many the caller now owns. Returns how many bytes came, 0 at end of file, or -errno: -EMSGSIZE, which
# recvmsg(2) itself has no use for, where the kernel dropped descriptors; those that had arrived were closed.
cdef ssize_t receive_batch(int sock, void *data, size_t size, int *descriptors, int room, int *count) noexcept nogil

# A Python array of C ints, for a Python caller.
cdef array.array descriptor_array(const int *descriptors, int count)
