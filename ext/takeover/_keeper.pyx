# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False
"""The crash keeper: a process that holds copies of the listeners, and next to no memory. docs/keeper.md has its words.

It is forked, not executed: there is no smaller program at hand than the code that is here already. What the fork shares
with the owner becomes private when the owner dies, so the keeper unmaps it at once, all but this module, libc, and one
block that has its stack and its state; and no Python runs in it, no GIL, no malloc.

The order of birth. start() maps the block and runs a thread on the stack in it, with all signals blocked. The thread
clones itself with the raw system call: no handlers of pthread_atfork(3), and no SIGCHLD, so that neither those nor a
waitpid(-1) of the program around ever see anything of it. The child becomes leader of a new session, clones the keeper
and ends; so the keeper is a child of init (or of the nearest subreaper) and has no terminal.
"""

from libc.stdint cimport uint32_t, uint64_t, uintptr_t

from takeover._keeper_memory cimport PAGE, Range, free_memory, syscall
from takeover._keeper_state cimport (
    __WALL, BUSY, copy, EAGAIN, ECONNABORTED, EINTR, Entry, errno, F_DUPFD, Keeper, LONGEST, MAP_ANONYMOUS,
    MAP_FAILED, MAP_NORESERVE, MAP_PRIVATE, mmap, MOST_CONNECTIONS, MOST_ENTRIES, MOST_UIDS, munmap, POLLIN,
    PR_SET_NAME, PROT_READ, PROT_WRITE, pthread_attr_destroy, pthread_attr_init, pthread_attr_setstack,
    pthread_attr_t, pthread_create, pthread_join, pthread_self, pthread_sigmask, pthread_t, QUEUE, RLIMIT_NOFILE,
    SIG_SETMASK, sigfillset, sigset_t, SIGTERM, SO_PEERCRED, SOCK_CLOEXEC, SOCK_NONBLOCK, STACK, SYS_accept4,
    SYS_chdir, SYS_clone, SYS_close, SYS_close_range, SYS_dup3, SYS_exit_group, SYS_fcntl, SYS_getpid,
    SYS_getsockopt, SYS_listen, SYS_ppoll, SYS_prctl, SYS_prlimit64, SYS_recvmsg, SYS_sendmsg, SYS_setsid,
    SYS_signalfd4, SYS_wait4, TEXTS, timespec, ucred, VERSION,
)
from takeover._messages cimport (
    CMSG_DATA, CMSG_FIRSTHDR, CMSG_LEN, cmsghdr, iovec, MSG_CMSG_CLOEXEC, MSG_CTRUNC, MSG_DONTWAIT, MSG_NOSIGNAL,
    MSG_TRUNC, msghdr, SCM_RIGHTS, SOL_SOCKET,
)

from os import strerror

from takeover.errors import LocalError


def start(int listening, int first, allowed):
    """Starts a keeper, a process that is nobody's child but init's, in a session of its own.

    listening  a listening SEQPACKET socket, bound to the keeper's path
    first      one end of a pair of such sockets, its first connection
    allowed    the uids that may talk to it, at most 256

    Both descriptors stay the caller's; the keeper has copies, and is up when it answers at the other end of the pair.
    It keeps about 40 KiB of private memory while its parent lives. Raises LocalError where the kernel refuses.
    """
    cdef Keeper *keeper
    cdef void *block
    cdef int error = 0
    cdef size_t size = STACK + sizeof(Keeper) + PAGE
    uids = sorted(allowed)
    if len(uids) > MOST_UIDS:
        raise LocalError(f"start the keeper: {len(uids)} uids are allowed, it takes at most {MOST_UIDS}")
    block = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    if block == MAP_FAILED:
        raise LocalError(f"start the keeper: mmap: {strerror(errno)}")
    keeper = <Keeper *>(<char *>block + STACK)
    keeper.block, keeper.size = block, size
    keeper.listening, keeper.first = listening, first
    for uid in uids:
        keeper.uids[keeper.uid_count] = uid
        keeper.uid_count += 1
    with nogil:
        error = run_thread(keeper)
        munmap(block, size)
    if error:
        raise LocalError(f"start the keeper: {strerror(error)}")


cdef int run_thread(Keeper *keeper) noexcept nogil:
    cdef pthread_attr_t attributes
    cdef pthread_t thread
    cdef sigset_t before
    cdef int error
    sigfillset(&keeper.all_signals)
    pthread_sigmask(SIG_SETMASK, &keeper.all_signals, &before)
    error = pthread_attr_init(&attributes)
    if not error:
        error = pthread_attr_setstack(&attributes, keeper.block, STACK)
        if not error:
            error = pthread_create(&thread, &attributes, give_birth, keeper)
        if not error:
            error = pthread_join(thread, NULL)
        pthread_attr_destroy(&attributes)
    pthread_sigmask(SIG_SETMASK, &before, NULL)
    return error or keeper.error


cdef void *give_birth(void *argument) noexcept nogil:
    cdef Keeper *keeper = <Keeper *>argument
    cdef long child = syscall(SYS_clone, 0, NULL, NULL, NULL, NULL)
    if child == 0:
        syscall(SYS_setsid)
        if syscall(SYS_clone, 0, NULL, NULL, NULL, NULL) == 0:
            live(keeper)
        syscall(SYS_exit_group, 0)
    if child < 0:
        keeper.error = errno
    else:
        while syscall(SYS_wait4, child, NULL, __WALL, NULL) < 0 and errno == EINTR:
            pass
    return NULL


cdef void live(Keeper *keeper) noexcept nogil:
    cdef Range[3] ranges
    cdef uintptr_t one, other
    take_descriptors(keeper)
    syscall(SYS_chdir, <const char *>b"/")
    syscall(SYS_prctl, PR_SET_NAME, <const char *>b"takeover-keeper", 0, 0, 0)
    syscall(SYS_prlimit64, 0, RLIMIT_NOFILE, NULL, &keeper.limit)
    keeper.limit.rlim_cur = keeper.limit.rlim_max
    syscall(SYS_prlimit64, 0, RLIMIT_NOFILE, &keeper.limit, NULL)
    one, other = <uintptr_t>&errno, <uintptr_t>pthread_self()
    if one > other:
        one, other = other, one
    ranges[0].start, ranges[0].end = one & ~<uintptr_t>(PAGE - 1), (other + PAGE) & ~<uintptr_t>(PAGE - 1)
    ranges[1].start, ranges[1].end = <uintptr_t>keeper.block, <uintptr_t>keeper.block + keeper.size
    if ranges[0].start > ranges[1].start:
        ranges[2] = ranges[0]
        ranges[0] = ranges[1]
        ranges[1] = ranges[2]
    free_memory(&keeper.maps, ranges, 2, <uintptr_t>&live, <uintptr_t>&syscall)
    # To listen anew makes the kernel name this process as the peer (unix(7)).
    syscall(SYS_listen, keeper.listening, QUEUE)
    while keeper.held or keeper.count:
        if not take_turn(keeper):
            break
    syscall(SYS_exit_group, 0)


# Keeps two descriptors and makes a third; everything else that was inherited is closed, standard streams included.
cdef void take_descriptors(Keeper *keeper) noexcept nogil:
    cdef long listening = syscall(SYS_fcntl, keeper.listening, F_DUPFD, 3)
    cdef long first = syscall(SYS_fcntl, keeper.first, F_DUPFD, 3)
    cdef unsigned int fd
    if listening < 0 or first < 0:
        syscall(SYS_exit_group, 1)
    syscall(SYS_dup3, listening, 0, 0)
    syscall(SYS_dup3, first, 1, 0)
    if syscall(SYS_close_range, 2, ~<unsigned int>0, 0) < 0:
        syscall(SYS_prlimit64, 0, RLIMIT_NOFILE, NULL, &keeper.limit)
        for fd in range(2, <unsigned int>keeper.limit.rlim_max if keeper.limit.rlim_max < 1 << 20 else 1 << 20):
            syscall(SYS_close, fd)
    keeper.listening = 0
    keeper.connections[0] = 1
    keeper.count = 1
    keeper.registrant = keeper.registering = -1
    # Of all signals, which stay blocked, only SIGTERM means anything; and SIGKILL and SIGSTOP, which nobody can block.
    sigterm_only(keeper)


cdef void sigterm_only(Keeper *keeper) noexcept nogil:
    cdef uint64_t only = <uint64_t>1 << (SIGTERM - 1)
    keeper.signals = <int>syscall(SYS_signalfd4, -1, &only, <size_t>8, 0)


# Waits, and does what there is to do: for each connection one message at the most. False at the end.
cdef bint take_turn(Keeper *keeper) noexcept nogil:
    cdef timespec pause
    cdef int i, polled = keeper.count
    for i in range(polled):
        keeper.polled[i].fd = keeper.connections[i]
    keeper.polled[polled].fd = keeper.signals
    keeper.polled[polled + 1].fd = -1 if keeper.short_of_descriptors else keeper.listening
    for i in range(polled + 2):
        keeper.polled[i].events, keeper.polled[i].revents = POLLIN, 0
    pause.tv_sec, pause.tv_nsec = 0, BUSY
    syscall(SYS_ppoll, keeper.polled, polled + 2, &pause if keeper.short_of_descriptors else NULL, NULL, <size_t>8)
    keeper.short_of_descriptors = False
    if keeper.polled[polled].revents:
        return False
    for i in range(polled - 1, -1, -1):
        if keeper.polled[i].revents and not serve(keeper, keeper.polled[i].fd):
            hang_up(keeper, keeper.polled[i].fd)
    if keeper.polled[polled + 1].revents:
        accept_one(keeper)
    return True


cdef void accept_one(Keeper *keeper) noexcept nogil:
    cdef ucred peer
    cdef uint32_t size = sizeof(ucred)
    cdef int i, oldest = 0
    cdef bint allowed = False
    cdef long fd = syscall(SYS_accept4, keeper.listening, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK)
    if fd < 0:
        keeper.short_of_descriptors = errno != EAGAIN and errno != ECONNABORTED and errno != EINTR
        return
    if syscall(SYS_getsockopt, fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) == 0:
        for i in range(keeper.uid_count):
            allowed = allowed or keeper.uids[i] == peer.uid
    if not allowed:
        syscall(SYS_close, fd)
        return
    if keeper.count == MOST_CONNECTIONS:
        while keeper.connections[oldest] == keeper.registrant:
            oldest += 1
        hang_up(keeper, keeper.connections[oldest])
    keeper.connections[keeper.count] = <int>fd
    keeper.count += 1


cdef void hang_up(Keeper *keeper, int fd) noexcept nogil:
    cdef int i, left = 0
    for i in range(keeper.count):
        if keeper.connections[i] != fd:
            keeper.connections[left] = keeper.connections[i]
            left += 1
    keeper.count = left
    if keeper.registrant == fd:
        keeper.registrant = -1
    if keeper.registering == fd:
        forget_coming(keeper)
    syscall(SYS_close, fd)


# Reads one message and answers it; False where the connection has ended, or is not worth more.
cdef bint serve(Keeper *keeper, int fd) noexcept nogil:
    cdef int came = -1
    cdef long size = receive(keeper, fd, &came)
    cdef unsigned char kind = keeper.message[0]
    cdef uint32_t index
    cdef Entry *entry
    if size == -EAGAIN or size == -EINTR:
        return True
    if size < 1 or size > LONGEST or (came >= 0) != (kind == c"K"):
        if came >= 0:
            syscall(SYS_close, came)
        return False
    if kind == c"H":
        keeper.message[1] = VERSION
        put(keeper.message + 2, <uint32_t>syscall(SYS_getpid))
        put(keeper.message + 6, keeper.held)
        return answer(keeper, fd, 10, -1)
    if kind == c"B":
        forget_coming(keeper)
        keeper.registering = fd
        return done(keeper, fd)
    if kind == c"K":
        return take(keeper, fd, came, size - 1)
    if kind == c"C":
        if keeper.registering != fd:
            return refuse(keeper, fd)
        commit(keeper)
        keeper.registrant = fd
        return done(keeper, fd)
    if kind == c"G" and size == 5:
        index = get(keeper.message + 1)
        if index >= <uint32_t>keeper.held:
            keeper.message[0] = c"N"
            return answer(keeper, fd, 1, -1)
        entry = &keeper.entries[index]
        copy(keeper.message + 1, keeper.texts + entry.at, entry.size)
        return answer(keeper, fd, 1 + entry.size, entry.fd)
    if kind == c"E":
        done(keeper, fd)
        syscall(SYS_exit_group, 0)
    return False


# A listener more, with what is said of it, for the registration under way.
cdef bint take(Keeper *keeper, int fd, int came, long size) noexcept nogil:
    cdef Entry *entry = &keeper.entries[keeper.held + keeper.coming]
    if (
        keeper.registering != fd or keeper.held + keeper.coming == MOST_ENTRIES
        or keeper.written + <uint64_t>size > TEXTS
    ):
        syscall(SYS_close, came)
        return refuse(keeper, fd)
    entry.fd, entry.size, entry.at = came, <uint32_t>size, keeper.written
    copy(keeper.texts + keeper.written, keeper.message + 1, size)
    keeper.written += size
    keeper.coming += 1
    return done(keeper, fd)


# What has come takes the place of what was held. A copy that is closed resets nothing while the owner has another.
cdef void commit(Keeper *keeper) noexcept nogil:
    cdef int i
    cdef uint64_t start = 0
    for i in range(keeper.held):
        syscall(SYS_close, keeper.entries[i].fd)
        start += keeper.entries[i].size
    for i in range(keeper.coming):
        keeper.entries[i] = keeper.entries[keeper.held + i]
        keeper.entries[i].at -= start
    copy(keeper.texts, keeper.texts + start, keeper.written - start)
    keeper.written -= start
    keeper.held = keeper.coming
    keeper.coming = 0
    keeper.registering = -1


cdef void forget_coming(Keeper *keeper) noexcept nogil:
    cdef int i
    for i in range(keeper.held, keeper.held + keeper.coming):
        syscall(SYS_close, keeper.entries[i].fd)
        keeper.written -= keeper.entries[i].size
    keeper.coming = 0
    keeper.registering = -1


# One message, with at most one descriptor; its length, LONGEST + 1 for one that is too long, 0 at the end, or -errno.
cdef long receive(Keeper *keeper, int fd, int *came) noexcept nogil:
    cdef uint64_t[4] control
    cdef iovec part
    cdef msghdr message
    cdef cmsghdr *block
    cdef long size
    part.iov_base, part.iov_len = keeper.message, LONGEST + 1
    message.msg_name, message.msg_namelen = NULL, 0
    message.msg_iov, message.msg_iovlen = &part, 1
    message.msg_control, message.msg_controllen, message.msg_flags = control, CMSG_LEN(sizeof(int)), 0
    size = syscall(SYS_recvmsg, fd, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT)
    if size < 0:
        return -errno
    block = CMSG_FIRSTHDR(&message)
    if block != NULL and block.cmsg_level == SOL_SOCKET and block.cmsg_type == SCM_RIGHTS:
        if block.cmsg_len >= CMSG_LEN(sizeof(int)):
            copy(came, CMSG_DATA(block), sizeof(int))
    return 0 if message.msg_flags & (MSG_CTRUNC | MSG_TRUNC) else size


# False where the other side does not read its answers.
cdef bint answer(Keeper *keeper, int fd, size_t size, int descriptor) noexcept nogil:
    cdef uint64_t[4] control
    cdef iovec part
    cdef msghdr message
    cdef cmsghdr *block
    part.iov_base, part.iov_len = keeper.message, size
    message.msg_name, message.msg_namelen = NULL, 0
    message.msg_iov, message.msg_iovlen = &part, 1
    message.msg_control, message.msg_controllen, message.msg_flags = NULL, 0, 0
    if descriptor >= 0:
        message.msg_control, message.msg_controllen = control, CMSG_LEN(sizeof(int))
        block = CMSG_FIRSTHDR(&message)
        block.cmsg_level, block.cmsg_type, block.cmsg_len = SOL_SOCKET, SCM_RIGHTS, CMSG_LEN(sizeof(int))
        copy(CMSG_DATA(block), &descriptor, sizeof(int))
    return syscall(SYS_sendmsg, fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT) >= 0


cdef bint done(Keeper *keeper, int fd) noexcept nogil:
    keeper.message[0] = c"O"
    return answer(keeper, fd, 1, -1)


cdef bint refuse(Keeper *keeper, int fd) noexcept nogil:
    keeper.message[0] = c"R"
    return answer(keeper, fd, 1, -1)


cdef void put(unsigned char *at, uint32_t value) noexcept nogil:
    cdef int i
    for i in range(4):
        at[i] = value >> (24 - 8 * i) & 255


cdef uint32_t get(const unsigned char *at) noexcept nogil:
    return <uint32_t>at[0] << 24 | <uint32_t>at[1] << 16 | <uint32_t>at[2] << 8 | at[3]
