/* What the self-checking workloads share: set up state, say ready, wait for SIGUSR1, check the state, say pass. */
#ifndef WORK_H
#define WORK_H
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define FAIL(...) do { printf("fail %s:%d: ", __FILE__, __LINE__); printf(__VA_ARGS__); \
        printf(" (errno %d %s)\n", errno, strerror(errno)); fflush(stdout); _exit(1); } while (0)
#define CHECK(condition) do { if (!(condition)) FAIL("%s", #condition); } while (0)

/* To be called before there are threads: the signal that ready() waits for must not end a thread that does not wait. */
static inline void only_main_waits(void)
{
    sigset_t set;

    sigemptyset(&set);
    sigaddset(&set, SIGUSR1);
    CHECK(sigprocmask(SIG_BLOCK, &set, NULL) == 0);
}

/* Says that the state is set up, and waits until the test has dumped, killed and restored us. */
static inline void ready(void)
{
    sigset_t set, old;
    siginfo_t info;

    sigemptyset(&set);
    sigaddset(&set, SIGUSR1);
    CHECK(sigprocmask(SIG_BLOCK, &set, &old) == 0);
    printf("ready\n");
    fflush(stdout);
    while (sigwaitinfo(&set, &info) != SIGUSR1)
        CHECK(errno == EINTR);
    CHECK(sigprocmask(SIG_SETMASK, &old, NULL) == 0);
}

static inline int pass(void)
{
    printf("pass\n");
    fflush(stdout);
    return 0;
}

/* Bytes that tell where they belong; `seed` says to what. */
static inline unsigned char byte_at(size_t i, unsigned seed)
{
    return (unsigned char)((i * 7 + seed * 13) ^ (i >> 8));
}

static inline void fill_bytes(unsigned char *p, size_t n, unsigned seed)
{
    for (size_t i = 0; i < n; i++)
        p[i] = byte_at(i, seed);
}

static inline void check_bytes(const unsigned char *p, size_t n, unsigned seed)
{
    for (size_t i = 0; i < n; i++)
        if (p[i] != byte_at(i, seed))
            FAIL("byte %zu of %u", i, seed);
}

static inline double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}
#endif
