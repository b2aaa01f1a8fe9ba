/* Memory that comes while its program works with it: forks, moves, drops, grows, system calls, several threads. */
#include "work.h"
#include <pthread.h>
#include <sys/mman.h>

enum { PAGE = 4096, PAGES = 6144, THREADS = 4 };

static uint64_t *heap, *moved, *bss;
static uint64_t large[1024 * 512];
static pthread_t threads[THREADS];
static int hold[2];

static uint64_t pattern(uint64_t page, uint64_t word)
{
    uint64_t x = (page << 20) + word * 8 + 1;
    x ^= x >> 31, x *= 0x7fb5d329728ea185u, x ^= x >> 27, x *= 0x81dadef4bc2dd44du;
    return x ^ x >> 33;
}

static void fill(uint64_t *memory, uint64_t pages, uint64_t seed)
{
    for (uint64_t page = 0; page < pages; page++)
        /* Each fifth page is zero, each seventh was never touched. */
        if ((page + seed) % 7)
            for (uint64_t word = 0; word < 512; word++)
                memory[page * 512 + word] = (page + seed) % 5 ? pattern(page + seed, word) : 0;
}

static void expect(const uint64_t *memory, uint64_t page, uint64_t seed)
{
    int zero = (page + seed) % 7 == 0 || (page + seed) % 5 == 0;
    for (uint64_t word = 0; word < 512; word++)
        if (memory[page * 512 + word] != (zero ? 0 : pattern(page + seed, word)))
            FAIL("page %lu of %p: word %lu is %lx", page, (void *)memory, word, memory[page * 512 + word]);
}

static void *reader(void *argument)
{
    uint64_t state = (uintptr_t)argument;
    char c;
    CHECK(read(hold[0], &c, 1) == 1);
    for (int i = 0; i < 20000; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        expect(heap, 3000 + (state >> 33) % (PAGES - 3000), 0);
    }
    return NULL;
}

int main(void)
{
    int status;

    only_main_waits();
    CHECK(pipe(hold) == 0);
    heap = mmap((void *)0x200000000000, (size_t)PAGES * PAGE, PROT_READ | PROT_WRITE,
                MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    moved = mmap((void *)0x210000000000, 512 * PAGE, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    bss = large;
    CHECK(heap != MAP_FAILED && moved != MAP_FAILED);
    fill(heap, PAGES, 0);
    fill(moved, 512, 9000);
    fill(bss, 1024, 20000);
    CHECK(mprotect(heap + 1000 * 512, 100 * PAGE, PROT_READ) == 0);
    for (long i = 0; i < THREADS; i++)
        CHECK(pthread_create(&threads[i], NULL, reader, (void *)(i + 1)) == 0);
    ready();

    /* Threads that need pages at the same time. */
    CHECK(write(hold[1], "abcd", THREADS) == THREADS);
    /* A child, while much is missing: it has what the parent had at this moment. */
    pid_t child = fork();
    if (child == 0) {
        for (uint64_t page = 0; page < PAGES; page++)
            expect(heap, page, 0);
        for (uint64_t page = 0; page < 512; page++)
            expect(moved, page, 9000);
        pid_t grandchild = fork();
        if (grandchild == 0) {
            for (uint64_t page = 0; page < 1024; page++)
                expect(bss, page, 20000);
            _exit(6);
        }
        CHECK(waitpid(grandchild, &status, 0) == grandchild && WIFEXITED(status) && WEXITSTATUS(status) == 6);
        _exit(5);
    }
    CHECK(child > 0);
    /* What the parent does with its memory is not for the child to see. */
    memset(heap + 2000 * 512, 1, PAGE);
    CHECK(madvise(heap + 100 * 512, 50 * PAGE, MADV_DONTNEED) == 0);
    for (uint64_t page = 100; page < 150; page++)
        for (uint64_t word = 0; word < 512; word++)
            CHECK(heap[page * 512 + word] == 0);
    CHECK(munmap(heap + 200 * 512, 50 * PAGE) == 0);
    CHECK(mmap(heap + 200 * 512, 50 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0)
          == heap + 200 * 512);
    for (uint64_t page = 200; page < 250; page++)
        for (uint64_t word = 0; word < 512; word++)
            CHECK(heap[page * 512 + word] == 0);
    uint64_t *to = (uint64_t *)0x220000000000;
    CHECK(mremap(moved, 512 * PAGE, 512 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to) == to);
    for (uint64_t page = 0; page < 512; page++)
        expect(to, page, 9000);
    CHECK(mremap(to, 512 * PAGE, 600 * PAGE, 0) == to);
    for (uint64_t word = 512 * 512; word < 600 * 512; word++)
        CHECK(to[word] == 0);
    /* The kernel reads what is missing. */
    int pipes[2];
    static uint64_t copy[512];
    CHECK(pipe(pipes) == 0);
    for (uint64_t page = 300; page < 310; page++) {
        CHECK(write(pipes[1], heap + page * 512, PAGE) == PAGE && read(pipes[0], copy, PAGE) == PAGE);
        expect(copy - 0, 0, page);
    }
    for (uint64_t page = 0; page < PAGES; page++)
        if (!(page >= 100 && page < 150) && !(page >= 200 && page < 250) && page != 2000)
            expect(heap, page, 0);
    for (uint64_t page = 0; page < 1024; page++)
        expect(bss, page, 20000);
    for (int i = 0; i < THREADS; i++)
        CHECK(pthread_join(threads[i], NULL) == 0);
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 5);
    return pass();
}
