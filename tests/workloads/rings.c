// io_uring: one ring that is always in use, with registered buffers and without; one in which a request waits to be
// submitted and a completion to be taken; one without an array of indexes.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/io_uring.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#ifndef IORING_SETUP_NO_SQARRAY
#define IORING_SETUP_NO_SQARRAY (1U << 16)
#endif

enum { PAGES = 64 };

struct ring {
    int fd;
    struct io_uring_params p;
    char *queues;
    struct io_uring_sqe *entries;
    unsigned made, seen;
};

static volatile sig_atomic_t stop;
static char *memory;
static int data;

static void fail(const char *what) {
    fprintf(stderr, "%s: %s\n", what, strerror(errno));
    exit(1);
}

static void on_signal(int signal) {
    stop = signal;
}

// A stop of the tracer's must not show; our own signal may.
static void wait_for(int ring, unsigned count) {
    if (syscall(SYS_io_uring_enter, ring, 0, count, IORING_ENTER_GETEVENTS, 0, 0) < 0 && !(errno == EINTR && stop))
        fail("waiting");
}

static struct ring make(unsigned entries, unsigned flags) {
    struct ring r = {.p.flags = flags};
    r.fd = syscall(SYS_io_uring_setup, entries, &r.p);
    if (r.fd < 0) fail("io_uring_setup");
    size_t len = flags & IORING_SETUP_NO_SQARRAY ? r.p.cq_off.cqes + r.p.cq_entries * sizeof(struct io_uring_cqe)
                                                 : r.p.sq_off.array + r.p.sq_entries * 4;
    r.queues = mmap(0, len, PROT_READ | PROT_WRITE, MAP_SHARED, r.fd, IORING_OFF_SQ_RING);
    r.entries = mmap(0, r.p.sq_entries * 64, PROT_READ | PROT_WRITE, MAP_SHARED, r.fd, IORING_OFF_SQES);
    if (r.queues == MAP_FAILED || r.entries == MAP_FAILED) fail("mapping a ring");
    return r;
}

static unsigned *word(struct ring *r, unsigned offset) {
    return (unsigned *)(r->queues + offset);
}

// Puts a read of a page into the queue. Indexes are not the places they stand at.
static void queue(struct ring *r, int opcode, unsigned page) {
    unsigned mask = r->p.sq_entries - 1, at = r->made & mask;
    if (!(r->p.flags & IORING_SETUP_NO_SQARRAY)) {
        at ^= mask;
        word(r, r->p.sq_off.array)[r->made & mask] = at;
    }
    r->entries[at] = (struct io_uring_sqe){.opcode = opcode, .fd = data, .addr = (uintptr_t)(memory + page * 4096),
        .len = 4096, .off = page * 4096, .user_data = page};
    r->made++;
    __atomic_store_n(word(r, r->p.sq_off.tail), r->made, __ATOMIC_RELEASE);
}

static void submit(struct ring *r, unsigned count) {
    while (count) {
        int taken = syscall(SYS_io_uring_enter, r->fd, count, 0, 0, 0, 0);
        if (taken < 0 || taken == 0) fail("io_uring_enter takes nothing");
        count -= taken;
    }
}

// Takes a completion and looks at what it has read.
static void take(struct ring *r, unsigned page) {
    while (__atomic_load_n(word(r, r->p.cq_off.tail), __ATOMIC_ACQUIRE) == r->seen)
        wait_for(r->fd, 1);
    struct io_uring_cqe *done = (struct io_uring_cqe *)(r->queues + r->p.cq_off.cqes) + (r->seen & (r->p.cq_entries - 1));
    if (done->res != 4096 || done->user_data != page) {
        fprintf(stderr, "read %d of page %llu, expected %u\n", done->res, done->user_data, page);
        exit(1);
    }
    r->seen++;
    __atomic_store_n(word(r, r->p.cq_off.head), r->seen, __ATOMIC_RELEASE);
    for (int i = 0; i < 1024; i++)
        if (((unsigned *)(memory + page * 4096))[i] != page * 1024 + i) {
            fprintf(stderr, "page %u has other content\n", page);
            exit(1);
        }
    memset(memory + page * 4096, 0, 4096);
}

int main(void) {
    int file = open("rings.data", O_RDWR | O_CREAT | O_TRUNC, 0600);
    for (unsigned i = 0; i < PAGES * 1024; i++)
        if (write(file, &i, 4) != 4) fail("write");
    fsync(file);
    close(file);
    data = open("rings.data", O_RDONLY | O_DIRECT);
    if (data < 0) fail("open");
    memory = mmap(0, PAGES * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    signal(SIGUSR1, on_signal);
    struct ring busy = make(8, 0), waiting = make(4, 0), plain = make(64, IORING_SETUP_NO_SQARRAY);
    struct iovec buffers[] = {{0, 0}, {memory, PAGES / 2 * 4096}};
    if (syscall(SYS_io_uring_register, busy.fd, IORING_REGISTER_BUFFERS, buffers, 2)) fail("registering buffers");
    // In the last pages, which the others leave alone.
    for (unsigned page = PAGES - 8; page < PAGES - 3; page++) {
        queue(&waiting, IORING_OP_READ, page);
        submit(&waiting, 1);
        take(&waiting, page);
    }
    queue(&waiting, IORING_OP_READ, PAGES - 1);
    submit(&waiting, 1);
    queue(&waiting, IORING_OP_READ, PAGES - 2);
    puts("ready");
    fflush(stdout);
    for (unsigned round = 0; !stop; round++) {
        unsigned first = round % (PAGES / 2 - 8), other = PAGES / 2 + round % (PAGES / 2 - 16);
        for (unsigned i = 0; i < 6; i++) {
            queue(&busy, IORING_OP_READ_FIXED, first + i);
            busy.entries[((busy.made - 1) & 7) ^ 7].buf_index = 1;
        }
        queue(&plain, IORING_OP_READ, other);
        queue(&plain, IORING_OP_READ, other + 1);
        submit(&busy, 6);
        submit(&plain, 2);
        unsigned seen = 0;
        // Completions come in any order: each is for one of the pages.
        while (seen < 6) {
            while (__atomic_load_n(word(&busy, busy.p.cq_off.tail), __ATOMIC_ACQUIRE) == busy.seen)
                wait_for(busy.fd, 1);
            struct io_uring_cqe *all = (struct io_uring_cqe *)(busy.queues + busy.p.cq_off.cqes);
            take(&busy, all[busy.seen & (busy.p.cq_entries - 1)].user_data);
            seen++;
        }
        for (int i = 0; i < 2; i++) {
            while (__atomic_load_n(word(&plain, plain.p.cq_off.tail), __ATOMIC_ACQUIRE) == plain.seen)
                wait_for(plain.fd, 1);
            struct io_uring_cqe *all = (struct io_uring_cqe *)(plain.queues + plain.p.cq_off.cqes);
            take(&plain, all[plain.seen & (plain.p.cq_entries - 1)].user_data);
        }
    }
    submit(&waiting, 1);
    unsigned *tail = word(&waiting, waiting.p.cq_off.tail);
    while (__atomic_load_n(tail, __ATOMIC_ACQUIRE) != waiting.seen + 2)
        wait_for(waiting.fd, 2);
    take(&waiting, PAGES - 1);
    take(&waiting, PAGES - 2);
    puts("pass");
    return 0;
}
