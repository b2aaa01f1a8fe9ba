// A program that measures itself: writer MIB huge|small THREADS BENCH READY-FILE SAVE-FILE. What it does is told to it through
// its memory (struct board, whose address is in READY-FILE), so that it has no descriptor open. It ends when process BENCH does. Per millisecond it notes
// how much it did, and the longest time between two looks at the clock. Half of its pages are incompressible.
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { SAMPLES = 1 << 20, WORDS = 512 };
enum { RATE = 1, TOUCH, MODIFY, FORK, FORK_AND_SAVE, REFRESH, GROW };
#define FULL UINT64_MAX

// xtask/src/bench/program.rs reads and writes this.
static struct board {
    volatile uint64_t order, argument, number; // what to do; `number` is written last, and counts up
    volatile uint64_t done, result;            // number of the last order that was carried out
    uint64_t start;                            // ns of CLOCK_MONOTONIC: sample 0 begins
    uint64_t memory;                           // address of the memory that is written to
    struct {
        uint32_t work, gap; // units of work; us
    } samples[SAMPLES];
} board;

static uint64_t *memory;
static uint64_t pages;
static int huge;
static uint64_t rate;
static int grows;
static const char *save;
static pid_t bench;
static uint64_t state = 88172645463325252u;
static volatile uint64_t sink;

static uint64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static uint64_t next(void) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state;
}

// No two pages are the same, half of them are text.
static void fill(void) {
    static const char text[] = "what compresses well, as much of a program's memory does; ";
    memory = mmap(NULL, pages * 4096 + (2 << 20), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) err(1, "mmap");
    memory = (void *)(((uintptr_t)memory + (2 << 20) - 1) & ~(uintptr_t)((2 << 20) - 1));
    madvise(memory, pages * 4096, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
    for (uint64_t page = 0; page < pages; page++) {
        uint64_t *at = memory + page * WORDS;
        for (int i = 0; i < WORDS; i++)
            if (page % 2) at[i] = next();
            else memcpy(at + i, text + (i * 8 + page) % 48, 8);
        at[0] = page;
    }
    board.memory = (uintptr_t)memory;
}

static void tick(uint64_t *last, uint32_t work) {
    uint64_t t = now(), gap = (t - *last) / 1000, at = (t - board.start) / 1000000;
    *last = t;
    if (at >= SAMPLES) return;
    board.samples[at].work += work;
    if (gap > board.samples[at].gap) board.samples[at].gap = gap > UINT32_MAX ? UINT32_MAX : gap;
}

// The child reads all memory, and in FORK_AND_SAVE gives it to `zstd -1`.
static void snapshot(int saves) {
    static char buffer[1 << 20];
    pid_t child = fork();
    if (child < 0) err(1, "fork");
    if (child) {
        board.result = child;
        return;
    }
    char command[4200];
    snprintf(command, sizeof command, "exec zstd -1 -q -f -o '%s'", save);
    FILE *to = saves ? popen(command, "w") : NULL;
    for (uint64_t at = 0; at < pages * 4096; at += sizeof buffer) {
        memcpy(buffer, (char *)memory + at, sizeof buffer);
        sink = buffer[at % sizeof buffer];
        if (to) fwrite(buffer, sizeof buffer, 1, to);
    }
    if (to) pclose(to);
    _exit(0);
}

// Its heap has another end ten times per millisecond.
static void grow(void) {
    static uint64_t grown;
    char *at = sbrk(4096);
    if (at == (void *)-1) err(1, "sbrk");
    *at = 1;
    if (++grown % 4096 == 0 && sbrk(-4096 * 4096) == (void *)-1) err(1, "sbrk");
}

static void obey(void) {
    static uint64_t cursor;
    uint64_t argument = board.argument, begin = now();
    board.result = 0;
    switch (board.order) {
    case RATE: rate = argument; break;
    case TOUCH: // each first word of so many pages; ns in all
        for (uint64_t i = 0; i < argument; i++, cursor++) memory[cursor % pages * WORDS]++;
        board.result = now() - begin;
        break;
    case MODIFY: // so many pages, evenly spread
        for (uint64_t i = 0; i < argument; i++) memory[i * pages / argument * WORDS + 8]++;
        board.result = now() - begin;
        break;
    case FORK: snapshot(0); break;
    case FORK_AND_SAVE: snapshot(1); break;
    case REFRESH:
        munmap(memory, pages * 4096);
        fill();
        break;
    case GROW: grows = argument; break;
    }
    board.done = board.number;
}

// Where nobody tells it what to do any more, it ends.
static void *watch(void *unused) {
    while (kill(bench, 0) == 0 || errno != ESRCH) sleep(1);
    _exit(1);
    return unused;
}

static void *other(void *unused) {
    static const struct timespec ms = {0, 10000000};
    for (;;) {
        nanosleep(&ms, NULL);
        sink++;
    }
    return unused;
}

int main(int argc, char **argv) {
    if (argc != 7) errx(2, "usage: writer MIB huge|small THREADS BENCH READY-FILE SAVE-FILE");
    close_range(3, ~0U, 0);
    signal(SIGCHLD, SIG_IGN);
    pages = strtoull(argv[1], NULL, 10) << 8, huge = !strcmp(argv[2], "huge"), save = argv[6], bench = atol(argv[4]);
    fill();
    pthread_attr_t small;
    pthread_attr_init(&small);
    pthread_attr_setstacksize(&small, 64 << 10);
    for (long i = atol(argv[3]); i > 0; i--) {
        pthread_t thread;
        if (pthread_create(&thread, &small, i > 1 ? other : watch, NULL)) errx(1, "pthread_create");
    }
    board.start = now();
    FILE *ready = fopen(argv[5], "w");
    if (!ready) err(1, "%s", argv[5]);
    fprintf(ready, "%lu\n", (unsigned long)&board);
    fclose(ready);

    uint64_t last = now(), since = last, written = 0, place = 0;
    for (;;) {
        if (board.number != board.done) {
            obey();
            last = since = now(), written = 0;
        }
        if (rate == 0) {
            const struct timespec pause = {0, grows ? 100000 : 1000000};
            nanosleep(&pause, NULL);
            if (grows) grow();
        } else if (rate == FULL) {
            uint64_t *at = memory + place++ % pages * WORDS;
            for (int i = 1; i < WORDS; i += 8) at[i]++;
        } else {
            // About a microsecond of work that writes nothing, and a write when one is due.
            for (int i = 0; i < 400; i++) next();
            uint64_t due = (last - since) / 1000 * rate / 1000000;
            // After a pause it does not catch up.
            if (due > written + rate / 100 + 1) since = last, written = 0;
            else if (due > written) written++, memory[next() % pages * WORDS + 1]++;
        }
        tick(&last, rate != 0);
    }
}
