# cython: language_level=3, cdivision=True
"""What the keeper has of the kernel and of libc, its limits, and its whole state."""

from libc.stdint cimport uint32_t, uint64_t

from takeover._keeper_memory cimport Maps
from takeover._messages cimport iovec, msghdr

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <errno.h>
    #include <fcntl.h>
    #include <poll.h>
    #include <pthread.h>
    #include <signal.h>
    #include <sys/mman.h>
    #include <sys/prctl.h>
    #include <sys/resource.h>
    #include <sys/signalfd.h>
    #include <sys/socket.h>
    #include <sys/syscall.h>
    #include <sys/wait.h>

    /* Forwards. Not memcpy(3), nor anything that a compiler takes for it: what libc chooses a way by is gone. */
    static void copy(void *to, const void *from, size_t size) {
        volatile unsigned char *target = (volatile unsigned char *)to;
        const volatile unsigned char *source = (const volatile unsigned char *)from;
        while (size--)
            *target++ = *source++;
    }
    """
    void copy(void *to, const void *source, size_t size) nogil

cdef extern from "<errno.h>" nogil:
    enum: EAGAIN, ECONNABORTED, EINTR, EBADF
    int errno

ctypedef void *(*Run)(void *) noexcept nogil

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_attr_t:
        pass
    ctypedef unsigned long pthread_t
    int pthread_attr_init(pthread_attr_t *attributes)
    int pthread_attr_destroy(pthread_attr_t *attributes)
    int pthread_attr_setstack(pthread_attr_t *attributes, void *start, size_t size)
    int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, Run run, void *argument)
    int pthread_join(pthread_t thread, void **result)
    pthread_t pthread_self()

cdef extern from "<signal.h>" nogil:
    ctypedef struct sigset_t:
        pass
    enum: SIG_SETMASK, SIGTERM
    int sigfillset(sigset_t *signals)
    int pthread_sigmask(int how, const sigset_t *signals, sigset_t *before)

cdef extern from "<sys/mman.h>" nogil:
    enum: PROT_READ, PROT_WRITE, MAP_PRIVATE, MAP_ANONYMOUS, MAP_NORESERVE
    void *MAP_FAILED
    void *mmap(void *address, size_t size, int protection, int flags, int fd, long offset)
    int munmap(void *address, size_t size)

cdef extern from "<poll.h>" nogil:
    enum: POLLIN
    struct pollfd:
        int fd
        short events
        short revents

cdef extern from "<sys/resource.h>" nogil:
    enum: RLIMIT_NOFILE
    struct rlimit:
        unsigned long rlim_cur
        unsigned long rlim_max

cdef extern from "<time.h>" nogil:
    struct timespec:
        long tv_sec
        long tv_nsec

cdef extern from "<sys/socket.h>" nogil:
    enum: SO_PEERCRED
    enum: SOCK_CLOEXEC, SOCK_NONBLOCK
    struct ucred:
        int pid
        uint32_t uid
        uint32_t gid

cdef extern from "<sys/prctl.h>" nogil:
    enum: PR_SET_NAME

cdef extern from "<sys/wait.h>" nogil:
    int __WALL

cdef extern from "<sys/syscall.h>" nogil:
    enum: SYS_accept4, SYS_chdir, SYS_clone, SYS_close, SYS_close_range, SYS_dup3, SYS_exit_group, SYS_fcntl, SYS_getpid
    enum: SYS_getsockopt, SYS_listen, SYS_ppoll, SYS_prctl, SYS_prlimit64, SYS_recvmsg, SYS_sendmsg, SYS_setsid
    enum: SYS_signalfd4, SYS_wait4

cdef extern from "<fcntl.h>" nogil:
    enum: F_DUPFD

cdef enum:
    VERSION = 1
    QUEUE = 4096            # connections to the keeper that may wait
    MOST_CONNECTIONS = 64
    MOST_UIDS = 256
    LONGEST = 32768         # bytes of one message
    MOST_ENTRIES = 40960    # listeners held, and those that are to take their place
    TEXTS = 16777216        # bytes of what was said of them
    STACK = 262144          # bytes; the C library puts the thread's own data there as well
    BUSY = 100000000        # nanoseconds until accepting is tried again where there is no descriptor for it

# A copy of a listener, and where what was said of it lies in the texts.
cdef struct Entry:
    int fd
    uint32_t size
    uint64_t at

# The keeper's whole state; it lies in the block, above the stack. `held` entries come first, then the `coming` ones,
# which take their place at once when all have come. The oldest connection is the first. 0 is the listening socket.
cdef struct Keeper:
    void *block
    size_t size
    int listening
    int first
    int error
    int signals
    int count
    int registrant          # the connection that has registered what is held: the owner's; -1 for none
    int registering         # the connection whose entries are coming; -1 for none
    bint short_of_descriptors
    int held
    int coming
    uint64_t written        # bytes of the texts
    int uid_count
    uint32_t[MOST_UIDS] uids
    int[MOST_CONNECTIONS] connections
    pollfd[MOST_CONNECTIONS + 2] polled
    sigset_t all_signals
    rlimit limit
    Maps maps
    unsigned char[LONGEST + 1] message
    Entry[MOST_ENTRIES] entries
    char[TEXTS] texts
