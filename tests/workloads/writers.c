// Writes to memory in one of several ways, for ever, so that a copy of it is never easy to take.
//   writers KIND THREADS MIB huge|small
// KIND: random, slow (random, few), sequential, noise (random content), file, direct, shared, sysv, churn, uring (direct reads
// by io_uring, several at a time), uring-fixed (the same, now and then into a registered buffer). Says "ready" when it has begun.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/io_uring.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/shm.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

static char *memory;
static size_t size;
static const char *kind;
static int data;

static void fail(const char *what) {
    fprintf(stderr, "%s: %s\n", what, strerror(errno));
    exit(1);
}

static uint64_t number(uint64_t *state) {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    return *state ^= *state << 17;
}

// A page is written as a whole, with different words, so that half a write is seen.
static void fill(char *page, uint64_t value) {
    for (int i = 0; i < 512; i++) ((volatile uint64_t *)page)[i] = value * 512 + i;
}

static void churn(uint64_t *state) {
    static __thread char *blocks[64];
    static __thread size_t sizes[64];
    int n = number(state) % 64;
    if (!blocks[n]) {
        sizes[n] = (1 + number(state) % 64) * 4096;
        blocks[n] = mmap(0, sizes[n], PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (blocks[n] == MAP_FAILED) fail("mmap");
        for (size_t at = 0; at < sizes[n]; at += 4096) fill(blocks[n] + at, number(state));
        return;
    }
    switch (number(state) % 6) {
    case 0:
        munmap(blocks[n], sizes[n]);
        blocks[n] = 0;
        break;
    case 1: {
        size_t new = (1 + number(state) % 64) * 4096;
        blocks[n] = mremap(blocks[n], sizes[n], new, MREMAP_MAYMOVE);
        if (blocks[n] == MAP_FAILED) fail("mremap");
        sizes[n] = new;
        break;
    }
    case 2:
        if (madvise(blocks[n], sizes[n] / 8192 * 4096, MADV_DONTNEED)) fail("madvise");
        break;
    case 3: {
        char *heap = malloc(1000 + number(state) % 300000);
        if (!heap) fail("malloc");
        memset(heap, n, 1000);
        heap = realloc(heap, 1 + number(state) % 600000);
        free(heap);
        break;
    }
    default:
        fill(blocks[n] + number(state) % (sizes[n] / 4096) * 4096, number(state));
    }
}

// Direct reads by io_uring, DEPTH always under way, while we write to other pages. Never returns.
enum { DEPTH = 4, BLOCK = 4 * 4096 };

static void rings(uint64_t *state, int fixed) {
    struct io_uring_params p = {0};
    int ring = syscall(SYS_io_uring_setup, DEPTH, &p);
    if (ring < 0) fail("io_uring_setup");
    char *queues = mmap(0, p.sq_off.array + p.sq_entries * 4, PROT_READ | PROT_WRITE, MAP_SHARED, ring, IORING_OFF_SQ_RING);
    struct io_uring_sqe *entries =
        mmap(0, p.sq_entries * sizeof *entries, PROT_READ | PROT_WRITE, MAP_SHARED, ring, IORING_OFF_SQES);
    if (queues == MAP_FAILED || entries == MAP_FAILED) fail("mapping a ring");
    unsigned *array = (unsigned *)(queues + p.sq_off.array), *tail = (unsigned *)(queues + p.sq_off.tail);
    unsigned *head = (unsigned *)(queues + p.cq_off.head), *done = (unsigned *)(queues + p.cq_off.tail);
    struct io_uring_cqe *completions = (struct io_uring_cqe *)(queues + p.cq_off.cqes);
    // The first quarter is for reads, the rest for us.
    size_t places = size / 4 / BLOCK;
    struct iovec buffer = {memory, size / 4};
    unsigned made = 0, seen = 0;
    int registered = 0;
    for (unsigned round = 0;; round++) {
        // What was registered at one checkpoint need not be at the next.
        if (fixed && round % 1024 == 0) {
            registered = !registered;
            if (registered && syscall(SYS_io_uring_register, ring, IORING_REGISTER_BUFFERS, &buffer, 1)) fail("registering");
            if (!registered && syscall(SYS_io_uring_register, ring, IORING_UNREGISTER_BUFFERS, 0, 0)) fail("unregistering");
        }
        while (made - seen < DEPTH) {
            unsigned at = made & (p.sq_entries - 1);
            char *into = memory + number(state) % places * BLOCK;
            entries[at] = (struct io_uring_sqe){.opcode = registered ? IORING_OP_READ_FIXED : IORING_OP_READ, .fd = data,
                .addr = (uintptr_t)into, .len = BLOCK, .off = number(state) % 256 * 4096, .user_data = made};
            array[at] = at;
            made++;
        }
        unsigned new = made - __atomic_load_n(tail, __ATOMIC_RELAXED);
        __atomic_store_n(tail, made, __ATOMIC_RELEASE);
        while (new) {
            int taken = syscall(SYS_io_uring_enter, ring, new, 0, 0, 0, 0);
            if (taken < 0 && errno != EINTR) fail("io_uring_enter");
            if (taken > 0) new -= taken;
        }
        for (int i = 0; i < 8; i++) fill(memory + size / 4 + number(state) % (size / 4096 * 3 / 4) * 4096, number(state));
        if (__atomic_load_n(done, __ATOMIC_ACQUIRE) == seen
            && syscall(SYS_io_uring_enter, ring, 0, 1, IORING_ENTER_GETEVENTS, 0, 0) < 0 && errno != EINTR)
            fail("io_uring_enter");
        for (; seen != __atomic_load_n(done, __ATOMIC_ACQUIRE); seen++) {
            struct io_uring_cqe *completion = &completions[seen & (p.cq_entries - 1)];
            if (completion->res != BLOCK) errno = -completion->res, fail("reading by io_uring");
        }
        __atomic_store_n(head, seen, __ATOMIC_RELEASE);
    }
}

static void *work(void *argument) {
    uint64_t state = 88172645463325252ull + (uintptr_t)argument * 7919;
    size_t pages = size / 4096, next = number(&state) % pages;
    if (!strncmp(kind, "uring", 5)) rings(&state, !strcmp(kind, "uring-fixed"));
    for (;;) {
        if (!strcmp(kind, "sequential")) {
            fill(memory + next * 4096, number(&state));
            next = (next + 1) % pages;
        } else if (!strcmp(kind, "direct")) {
            size_t at = number(&state) % (pages - 16), from = number(&state) % 256;
            if (pread(data, memory + at * 4096, 16 * 4096, from * 4096) != 16 * 4096) fail("direct read");
            // The kernel writes to other pages meanwhile, and so do we.
            fill(memory + number(&state) % pages * 4096, number(&state));
        } else if (!strcmp(kind, "noise")) {
            uint64_t *page = (uint64_t *)(memory + number(&state) % pages * 4096);
            for (int i = 0; i < 512; i++) page[i] = number(&state);
        } else if (!strcmp(kind, "churn")) {
            churn(&state);
        } else {
            fill(memory + number(&state) % pages * 4096, number(&state));
            if (!strcmp(kind, "slow")) usleep(500);
            if (!strcmp(kind, "file") && number(&state) % 64 == 0) {
                char *page = memory + number(&state) % pages * 4096;
                if (madvise(page, 4096, MADV_DONTNEED)) fail("madvise");
            }
        }
    }
    return 0;
}

int main(int argc, char **argv) {
    if (argc != 5) return 2;
    kind = argv[1];
    int threads = atoi(argv[2]);
    size = (size_t)atoi(argv[3]) << 20;
    int flags = MAP_PRIVATE | MAP_ANONYMOUS, fd = -1;
    if (!strcmp(kind, "shared")) flags = MAP_SHARED | MAP_ANONYMOUS;
    int direct = !strcmp(kind, "direct") || !strncmp(kind, "uring", 5);
    if (!strcmp(kind, "file") || direct) {
        fd = open("writers.data", O_RDWR | O_CREAT | O_TRUNC, 0600);
        if (fd < 0) fail("open");
        char *page = malloc(4096);
        for (size_t at = 0; at < size + (2 << 20); at += 4096) {
            fill(page, at);
            if (write(fd, page, 4096) != 4096) fail("write");
        }
        fsync(fd);
    }
    if (direct) {
        data = open("writers.data", O_RDONLY | O_DIRECT);
        if (data < 0) fail("open O_DIRECT");
        close(fd);
        fd = -1;
    }
    if (fd >= 0) flags = MAP_PRIVATE;
    char *reserved = mmap(0, size + (2 << 20), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    char *aligned = (char *)(((uintptr_t)reserved + (2 << 20) - 1) & ~(uintptr_t)((2 << 20) - 1));
    if (!strcmp(kind, "sysv")) {
        int id = shmget(IPC_PRIVATE, size, IPC_CREAT | 0600);
        memory = shmat(id, aligned, SHM_REMAP);
        if (id < 0 || memory == (char *)-1 || shmctl(id, IPC_RMID, 0)) fail("shared memory");
    } else {
        memory = mmap(aligned, size, PROT_READ | PROT_WRITE, flags | MAP_FIXED, fd, 0);
        if (memory == MAP_FAILED) fail("mmap");
    }
    if (flags & MAP_ANONYMOUS) madvise(memory, size, !strcmp(argv[4], "huge") ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
    for (size_t at = 0; at < size; at += 4096) fill(memory + at, at);
    if ((!strcmp(kind, "shared") || !strcmp(kind, "sysv")) && fork() == 0) work((void *)1000);
    puts("ready");
    fflush(stdout);
    for (int i = 1; i < threads; i++) {
        pthread_t thread;
        if (pthread_create(&thread, 0, work, (void *)(intptr_t)i)) fail("pthread_create");
    }
    work(0);
}
