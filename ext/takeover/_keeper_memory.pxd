# cython: language_level=3, cdivision=True
"""Gives back nearly all the memory of a forked process, which nobody but one function is to run in from then on.

A page that a fork shares with its parent becomes private when the parent dies, so it does not help not to write to it:
it has to be unmapped. What stays is what is named to free_memory(), the files that hold this code and libc's, and what
the kernel maps itself ([vdso] and its kind). The thread's own data has to stay: errno is there, and an area that the
kernel writes to (rseq, and a process without it is killed). Of libc nothing may be called but syscall(2), whose wrapper
needs only its own code and errno: the variables of libc and of the dynamic linker are gone.
"""

from libc.stdint cimport uint64_t, uintptr_t

cdef extern from "<unistd.h>" nogil:
    long syscall(long number, ...)

cdef extern from "<sys/syscall.h>" nogil:
    enum: SYS_openat, SYS_read, SYS_close, SYS_munmap

cdef extern from "<fcntl.h>" nogil:
    enum: AT_FDCWD, O_RDONLY, O_CLOEXEC

cdef enum:
    PAGE = 65536            # the largest page of any Linux, so that a range in whole pages is one everywhere
    READ = 4096             # bytes of /proc/self/maps at a time

cdef struct Range:
    uintptr_t start
    uintptr_t end

cdef struct File:
    uint64_t device         # as /proc/self/maps has it: major and minor in one number
    uint64_t inode

# One line of /proc/self/maps, as far as it is of interest (proc_pid_maps(5)).
cdef struct Mapping:
    Range range
    File file
    bint of_kernel          # its name begins with "[v"

# A reader of /proc/self/maps that needs no memory but its own, and does not mind where a read ends.
cdef struct Maps:
    int fd
    ssize_t size
    ssize_t at
    unsigned char[READ] data


cdef inline int next_byte(Maps *maps) noexcept nogil:
    if maps.at == maps.size:
        maps.size = syscall(SYS_read, maps.fd, maps.data, <size_t>READ)
        maps.at = 0
        if maps.size <= 0:
            maps.size = 0
            return -1
    maps.at += 1
    return maps.data[maps.at - 1]


# A number in the given base; `last` is the byte that ended it.
cdef inline uint64_t number(Maps *maps, unsigned int base, int *last) noexcept nogil:
    cdef uint64_t value = 0
    cdef int byte
    while True:
        byte = next_byte(maps)
        if byte >= c"0" and byte <= c"9":
            value = value * base + <unsigned int>(byte - c"0")
        elif base == 16 and byte >= c"a" and byte <= c"f":
            value = value * base + 10 + <unsigned int>(byte - c"a")
        else:
            last[0] = byte
            return value


cdef inline bint next_mapping(Maps *maps, Mapping *mapping) noexcept nogil:
    """55d0c000-55d0d000 r-xp 00001000 fe:01 1234     /path"""
    cdef int byte = 0
    cdef uint64_t major
    mapping.range.start = number(maps, 16, &byte)
    if byte != c"-":
        return False
    mapping.range.end = number(maps, 16, &byte)
    byte = next_byte(maps)
    while byte != c" " and byte >= 0:
        byte = next_byte(maps)
    number(maps, 16, &byte)
    major = number(maps, 16, &byte)
    mapping.file.device = major << 32 | number(maps, 16, &byte)
    mapping.file.inode = number(maps, 10, &byte)
    while byte == c" ":
        byte = next_byte(maps)
    mapping.of_kernel = byte == c"[" and next_byte(maps) == c"v"
    while byte != c"\n" and byte >= 0:
        byte = next_byte(maps)
    return True


cdef inline bint open_maps(Maps *maps) noexcept nogil:
    maps.fd = <int>syscall(SYS_openat, AT_FDCWD, <const char *>b"/proc/self/maps", O_RDONLY | O_CLOEXEC)
    maps.size = maps.at = 0
    return maps.fd >= 0


# Which file an address is mapped from; all zeros where there is none.
cdef inline File file_at(Maps *maps, uintptr_t address) noexcept nogil:
    cdef Mapping mapping
    cdef File found
    found.device = found.inode = 0
    if open_maps(maps):
        while next_mapping(maps, &mapping):
            if mapping.range.start <= address < mapping.range.end:
                found = mapping.file
        syscall(SYS_close, maps.fd)
    return found


# Unmaps everything but the ranges, in whole pages, and the files in which the two addresses lie. Frees nothing where
# there is no /proc. `ranges` are in the order of their addresses; `maps` lies in one of them, and so does the stack.
cdef inline void free_memory(Maps *maps, const Range *ranges, int count, uintptr_t own, uintptr_t libc) noexcept nogil:
    cdef File own_file = file_at(maps, own)
    cdef File libc_file = file_at(maps, libc)
    cdef Mapping mapping
    cdef uintptr_t at
    cdef int i
    if not own_file.inode or not libc_file.inode or not open_maps(maps):
        return
    while next_mapping(maps, &mapping):
        if mapping.of_kernel or is_file(&mapping.file, &own_file) or is_file(&mapping.file, &libc_file):
            continue
        at = mapping.range.start
        for i in range(count):
            if at < ranges[i].start and ranges[i].start < mapping.range.end:
                syscall(SYS_munmap, at, ranges[i].start - at)
            if at < ranges[i].end and ranges[i].start < mapping.range.end:
                at = ranges[i].end
        if at < mapping.range.end:
            syscall(SYS_munmap, at, mapping.range.end - at)
    syscall(SYS_close, maps.fd)


cdef inline bint is_file(const File *one, const File *other) noexcept nogil:
    return one.inode == other.inode and one.device == other.device
