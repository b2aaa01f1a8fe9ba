/* One parent with much memory, and many children that share it, each with a change of its own. */
#include "work.h"
#include <sys/mman.h>
#include <sys/prctl.h>

enum { PAGE = 4096, PAGES = 16384, CHILDREN = 24, SIDE = 64 };

/* What everyone begins with; memory that children do not get; memory that they get empty; a file's. */
static uint64_t *heap, *no_fork, *wiped, *file;

static uint64_t pattern(uint64_t page, uint64_t word, uint64_t who)
{
    uint64_t x = (page << 20) + word * 8 + who * 0x9e3779b97f4a7c15u + 1;
    x ^= x >> 31, x *= 0x7fb5d329728ea185u, x ^= x >> 27, x *= 0x81dadef4bc2dd44du;
    return x ^ x >> 33;
}

static void fill(uint64_t *memory, uint64_t from, uint64_t to, uint64_t step, uint64_t who)
{
    for (uint64_t page = from; page < to; page += step)
        for (uint64_t word = 0; word < 512; word++)
            memory[page * 512 + word] = pattern(page, word, who);
}

/* Is page as `who` has filled it? */
static void expect(const uint64_t *memory, uint64_t page, uint64_t who)
{
    for (uint64_t word = 0; word < 512; word++)
        if (memory[page * 512 + word] != pattern(page, word, who))
            FAIL("page %lu of %p: word %lu is not what %lu wrote", page, (void *)memory, word, who);
}

static void expect_zero(const uint64_t *memory, uint64_t page)
{
    for (uint64_t word = 0; word < 512; word++)
        if (memory[page * 512 + word])
            FAIL("page %lu of %p is not zero", page, (void *)memory);
}

static int mapped(const void *at)
{
    unsigned char in;
    return mincore((void *)((uintptr_t)at / PAGE * PAGE), PAGE, &in) == 0;
}

/* The first pages of the file are as the parent had them, the rest is the file's. */
static void expect_file(uint64_t who)
{
    expect(file, 0, who);
    expect_zero(file, 1);
    expect(file, 2, 77);
}

/* What child number n does to its memory. */
static uint64_t *change(int n, uint64_t who)
{
    uint64_t *extra = NULL;

    switch (n % 8) {
    case 1:
        fill(heap, 0, PAGES, 64, who);
        break;
    case 2:
        CHECK(munmap(heap + 4096 * 512, 2048 * PAGE) == 0);
        break;
    case 3:
        CHECK(madvise(heap, 1024 * PAGE, MADV_DONTNEED) == 0);
        fill(heap, 10, 11, 1, who);
        memset(heap + 2000 * 512, 0, 5 * PAGE);
        break;
    case 4:
        CHECK(mprotect(heap + 1000 * 512, 100 * PAGE, PROT_READ) == 0);
        CHECK(mprotect(heap + 3000 * 512, PAGE, PROT_NONE) == 0);
        break;
    case 5:
        extra = mmap(no_fork, SIDE * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
        CHECK(extra == no_fork);
        fill(extra, 0, SIDE, 1, who);
        fill(wiped, 3, 4, 1, who);
        break;
    case 6:
        fill(file, 0, 1, 1, who);
        CHECK(madvise(heap + 100 * 512, 10 * PAGE, MADV_DONTDUMP) == 0);
        break;
    case 7: {
        /* Larger in place: what lies behind is free. */
        uint64_t *tail = heap + PAGES * 512;
        CHECK(mremap(heap, (size_t)PAGES * PAGE, (size_t)(PAGES + SIDE) * PAGE, 0) == heap);
        fill(heap, PAGES, PAGES + SIDE, 1, who);
        extra = tail;
        break;
    }
    }
    return extra;
}

static void verify(int n, uint64_t who, const uint64_t *extra)
{
    int kind = n % 8;

    for (uint64_t page = 0; page < PAGES; page++) {
        if (kind == 1 && page % 64 == 0)
            expect(heap, page, who);
        else if (kind == 2 && page >= 4096 && page < 4096 + 2048)
            CHECK(!mapped(heap + page * 512));
        else if (kind == 3 && page == 10)
            expect(heap, page, who);
        else if (kind == 3 && (page < 1024 || (page >= 2000 && page < 2005)))
            expect_zero(heap, page);
        else if (kind == 4 && page == 3000)
            continue;
        else
            expect(heap, page, 0);
    }
    if (kind == 4) {
        CHECK(mprotect(heap + 3000 * 512, PAGE, PROT_READ) == 0);
        expect(heap, 3000, 0);
        /* Still not writable: read(2) tells without a signal. */
        int zero = open("/dev/zero", O_RDONLY);
        CHECK(read(zero, heap + 1000 * 512, 8) == -1 && errno == EFAULT && close(zero) == 0);
    }
    if (kind == 5) {
        for (uint64_t page = 0; page < SIDE; page++)
            expect(extra, page, who);
        expect(wiped, 3, who);
        expect_zero(wiped, 4);
    } else {
        CHECK(!mapped(no_fork));
        expect_zero(wiped, 3);
    }
    if (kind == 7)
        for (uint64_t page = PAGES; page < PAGES + SIDE; page++)
            expect(heap, page, who);
    expect_file(kind == 6 ? who : 0);
}

/* Waits for the parent's word, verifies, ends with 5. */
static void live(int n, uint64_t who, const uint64_t *extra, int tell)
{
    sigset_t set;
    siginfo_t info;

    sigemptyset(&set);
    sigaddset(&set, SIGUSR2);
    CHECK(sigprocmask(SIG_BLOCK, &set, NULL) == 0);
    CHECK(write(tell, "r", 1) == 1);
    while (sigwaitinfo(&set, &info) != SIGUSR2)
        ;
    verify(n, who, extra);
    /* Everything can still be written, and only here. */
    heap[0] = who;
    file[2 * 512] = who;
    _exit(5);
}

int main(int argc, char **argv)
{
    pid_t children[CHILDREN], grandchild = 0, other;
    int tell[2], hand[2], status, zeros;
    char c;

    if (argc > 1) {
        /* A child that is another program by now: nothing is shared. */
        CHECK(write(atoi(argv[1]), "r", 1) == 1);
        heap = mmap(NULL, SIDE * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        fill(heap, 0, SIDE, 1, 99);
        sigset_t set;
        siginfo_t info;
        sigemptyset(&set);
        sigaddset(&set, SIGUSR2);
        sigprocmask(SIG_BLOCK, &set, NULL);
        while (sigwaitinfo(&set, &info) != SIGUSR2)
            ;
        for (uint64_t page = 0; page < SIDE; page++)
            expect(heap, page, 99);
        _exit(5);
    }
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGUSR2);
    CHECK(sigprocmask(SIG_BLOCK, &set, NULL) == 0);
    CHECK(pipe(tell) == 0 && pipe(hand) == 0);
    zeros = open("family.data", O_RDWR | O_CREAT | O_TRUNC, 0600);
    CHECK(zeros >= 0 && ftruncate(zeros, 4 * PAGE) == 0);
    file = mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, zeros, 0);
    fill(file, 0, 4, 1, 77);
    CHECK(munmap(file, 4 * PAGE) == 0);
    file = mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, zeros, 0);
    fill(file, 0, 1, 1, 0);
    memset(file + 512, 0, PAGE);
    /* Far from everything, so that there is room behind it. */
    heap = mmap((void *)0x200000000000, (size_t)PAGES * PAGE, PROT_READ | PROT_WRITE,
                MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    CHECK(heap != MAP_FAILED);
    CHECK(madvise(heap, (size_t)PAGES * PAGE, MADV_NOHUGEPAGE) == 0);
    fill(heap, 0, PAGES, 1, 0);
    no_fork = mmap(NULL, SIDE * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    wiped = mmap(NULL, SIDE * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(madvise(no_fork, SIDE * PAGE, MADV_DONTFORK) == 0 && madvise(wiped, SIDE * PAGE, MADV_WIPEONFORK) == 0);
    fill(no_fork, 0, SIDE, 1, 50);
    fill(wiped, 0, SIDE, 1, 51);
    for (int n = 0; n < CHILDREN; n++) {
        if ((children[n] = fork()) == 0) {
            uint64_t who = 100 + n;
            /* Nobody stays behind when the parent fails. */
            CHECK(prctl(PR_SET_PDEATHSIG, SIGKILL) == 0);
            if (n == 9 || n == 16)
                CHECK(setsid() == getpid());
            uint64_t *extra = change(n, who);
            if (n == 9) {
                /* A child of its own, which has these changes and one more. */
                pid_t below = fork();
                if (below == 0) {
                    CHECK(mprotect(heap, PAGE, PROT_READ | PROT_WRITE) == 0);
                    live(n, who, extra, tell[1]);
                }
                CHECK(write(hand[1], &below, sizeof below) == sizeof below);
            }
            live(n, who, extra, tell[1]);
        }
        CHECK(children[n] > 0 && read(tell[0], &c, 1) == 1);
    }
    CHECK(read(tell[0], &c, 1) == 1 && read(hand[0], &grandchild, sizeof grandchild) == sizeof grandchild);
    if ((other = fork()) == 0) {
        char number[16];
        snprintf(number, sizeof number, "%d", tell[1]);
        execl("/proc/self/exe", "family", number, NULL);
        _exit(1);
    }
    CHECK(read(tell[0], &c, 1) == 1);
    usleep(20000);
    /* What the parent writes from now on its children have as it was. */
    fill(heap, 8000, 9600, 1, 1);
    CHECK(madvise(heap + 12000 * 512, 100 * PAGE, MADV_DONTNEED) == 0);
    ready();

    for (uint64_t page = 0; page < PAGES; page++)
        if (page >= 12000 && page < 12100)
            expect_zero(heap, page);
        else
            expect(heap, page, page >= 8000 && page < 9600 ? 1 : 0);
    for (uint64_t page = 0; page < SIDE; page++) {
        expect(no_fork, page, 50);
        expect(wiped, page, 51);
    }
    expect_file(0);
    /* What one writes no other sees: the parent first, then the children one after the other. */
    memset(heap, 1, PAGE);
    CHECK(kill(grandchild, SIGUSR2) == 0);
    for (int n = 0; n < CHILDREN; n++) {
        CHECK(kill(children[n], SIGUSR2) == 0 && waitpid(children[n], &status, 0) == children[n]);
        if (!WIFEXITED(status) || WEXITSTATUS(status) != 5)
            FAIL("child %d ended with status %x", n, status);
    }
    CHECK(kill(other, SIGUSR2) == 0 && waitpid(other, &status, 0) == other);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 5);
    for (int i = 0; i < 3000 && kill(grandchild, 0) == 0; i++)
        usleep(1000);
    return pass();
}
