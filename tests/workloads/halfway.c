/* Pages of a private file mapping that are dropped, and of which the next write has come half way: the kernel has made the
   page again from the file, and a signal arrived before the instruction that writes was repeated. A handler that does not
   return leaves it there. The steps are said on standard output; the files `go1`, `go2` ... let it go on. */
#include "work.h"
#include <pthread.h>
#include <sys/mman.h>

#define PAGE 4096
#define PAGES 4096

static unsigned char *memory;
static pid_t main_thread;
static volatile int hammering;
static unsigned char *volatile target;
static volatile int caught;

static void wait_for(const char *file)
{
    while (access(file, F_OK) != 0)
        poll(NULL, 0, 5);
}

static void say(const char *what)
{
    CHECK(write(1, what, strlen(what)) == (ssize_t)strlen(what));
}

/* Documentation/admin-guide/mm/pagemap.rst: 63 present, 61 of a file, 57 protected by a userfaultfd. */
static int is_half_way(const void *page)
{
    uint64_t entry = 0;
    int fd = open("/proc/self/pagemap", O_RDONLY);

    CHECK(fd >= 0 && pread(fd, &entry, 8, (uintptr_t)page / PAGE * 8) == 8);
    close(fd);
    return entry >> 63 && !(entry >> 61 & 1) && (entry >> 57 & 1);
}

static const char *step, *next;

static void on_signal(int number)
{
    (void)number;
    if (caught || !target || !is_half_way(target))
        return;
    caught = 1;
    hammering = 0;
    say(step);
    wait_for(next);
}

static void *hammer(void *argument)
{
    (void)argument;
    for (;;)
        if (hammering)
            syscall(SYS_tgkill, getpid(), main_thread, SIGUSR2);
        else
            poll(NULL, 0, 1);
}

/* Writes one byte each to pages until one was left half way, says so and waits. Where the kernel does not protect the pages
   there is nothing to be left: then the last one stands for it. */
static void write_half_way(size_t from, size_t to, int drop, const char *what, const char *until)
{
    step = what;
    next = until;
    caught = 0;
    hammering = 1;
    for (size_t page = from; page < to && !caught; page++) {
        if (drop)
            CHECK(madvise(memory + page * PAGE, PAGE, MADV_DONTNEED) == 0);
        target = memory + page * PAGE;
        *(volatile unsigned char *)(memory + page * PAGE + 1) = 0xaa;
        target = NULL;
        CHECK(memory[page * PAGE + 1] == 0xaa && memory[page * PAGE + 2] == byte_at(page * PAGE + 2, 1));
        memory[page * PAGE + 1] = byte_at(page * PAGE + 1, 1);
    }
    hammering = 0;
    if (!caught) {
        say(what);
        wait_for(until);
    }
}

int main(void)
{
    struct sigaction action = {.sa_handler = on_signal};
    size_t size = (size_t)PAGES * PAGE, half = PAGES / 2;
    unsigned char *content = malloc(size);
    pthread_t thread;
    int fd = open("halfway.data", O_RDWR | O_CREAT | O_TRUNC, 0600);

    main_thread = syscall(SYS_gettid);
    CHECK(sigaction(SIGUSR2, &action, NULL) == 0);
    fill_bytes(content, size, 1);
    CHECK(fd >= 0 && write(fd, content, size) == (ssize_t)size);
    free(content);
    memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
    CHECK(memory != MAP_FAILED && close(fd) == 0);
    fill_bytes(memory, size, 2);
    CHECK(pthread_create(&thread, NULL, hammer, NULL) == 0);
    say("ready\n");

    /* Dropped and half written between two checkpoints. */
    wait_for("go1");
    write_half_way(0, half, 1, "half way 1\n", "go2");

    /* Dropped before a checkpoint, half written before the next one. */
    CHECK(madvise(memory + half * PAGE, half * PAGE, MADV_DONTNEED) == 0);
    say("dropped\n");
    wait_for("go3");
    write_half_way(half, PAGES, 0, "half way 2\n", "go4");

    /* What was never dropped is as it was written, everything else as in the file. */
    for (size_t page = 0; page < PAGES; page++) {
        unsigned char *p = memory + page * PAGE;
        unsigned seed = p[0] == byte_at(page * PAGE, 1) && p[1] == byte_at(page * PAGE + 1, 1) ? 1 : 2;

        CHECK(seed == 1 || page < half);
        for (size_t i = 0; i < PAGE; i++)
            if (p[i] != byte_at(page * PAGE + i, seed))
                FAIL("byte %zu of page %zu", i, page);
    }
    return pass();
}
