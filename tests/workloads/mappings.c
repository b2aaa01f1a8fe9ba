/* Every kind of mapping a normal program has. */
#include "work.h"
#include <sys/mman.h>

#define PAGE 4096
#define MANY 300

/* Does the mapping at `address` have this flag in smaps? */
static int has_flag(void *address, const char *flag)
{
    FILE *file = fopen("/proc/self/smaps", "r");
    char line[512];
    int here = 0, found = 0;

    while (fgets(line, sizeof line, file)) {
        unsigned long from, to;
        if (sscanf(line, "%lx-%lx ", &from, &to) == 2)
            here = (unsigned long)address >= from && (unsigned long)address < to;
        if (here && !strncmp(line, "VmFlags:", 8))
            found = strstr(line, flag) != NULL;
    }
    fclose(file);
    return found;
}

static int deep(int n)
{
    volatile unsigned char frame[PAGE];
    memset((void *)frame, n, sizeof frame);
    return n ? deep(n - 1) + frame[17] : frame[1];
}

/* `mappings MIB` has so much more memory. */
int main(int argc, char **argv)
{
    size_t ballast = argc > 1 ? (size_t)atoi(argv[1]) << 20 : 0;

    setvbuf(stdout, NULL, _IONBF, 0); /* stdio takes no memory later */
    if (ballast) {
        char *pages = mmap(NULL, ballast, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        CHECK(pages != MAP_FAILED);
        for (size_t at = 0; at < ballast; at += PAGE)
            pages[at] = 1;
    }
    unsigned char *anon = mmap(NULL, 64 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    unsigned char *hole = mmap(NULL, 64 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    unsigned char *shared = mmap(NULL, 16 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    unsigned char *none = mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    unsigned char *advised = mmap(NULL, 8 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    unsigned char *many[MANY], *brk = sbrk(40 * PAGE), *code, *big;
    int file = open("mapped", O_RDWR | O_CREAT | O_TRUNC, 0600), gone = open("gone", O_RDWR | O_CREAT, 0600);
    int memory = memfd_create("work", MFD_ALLOW_SEALING), status, tube[2];
    unsigned char page[PAGE], *private_map, *shared_map, *memory_map, *gone_map;
    pid_t child;

    for (unsigned i = 0; i < 8; i++) {
        fill_bytes(page, PAGE, 50 + i);
        CHECK(write(file, page, PAGE) == PAGE && write(gone, page, PAGE) == PAGE);
    }
    private_map = mmap(NULL, 8 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0);
    shared_map = mmap(NULL, 8 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    gone_map = mmap(NULL, 8 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, gone, 0);
    CHECK(unlink("gone") == 0 && close(gone) == 0);
    fill_bytes(private_map + PAGE, PAGE, 60);
    memset(private_map + 2 * PAGE, 0, PAGE); /* zero, where the file is not */
    fill_bytes(shared_map + 3 * PAGE, PAGE, 61);
    fill_bytes(gone_map + 3 * PAGE, PAGE, 62);
    CHECK(mprotect(private_map, 2 * PAGE, PROT_READ) == 0);
    CHECK(ftruncate(memory, 8 * PAGE) == 0);
    memory_map = mmap(NULL, 8 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, memory, 0);
    fill_bytes(memory_map, 8 * PAGE, 70);
    CHECK(fcntl(memory, F_ADD_SEALS, F_SEAL_GROW | F_SEAL_SHRINK) == 0);
    fill_bytes(anon, 64 * PAGE, 1);
    memset(anon + 5 * PAGE, 0, PAGE);
    CHECK(madvise(anon + 9 * PAGE, PAGE, MADV_DONTNEED) == 0);
    fill_bytes(hole, 64 * PAGE, 2);
    CHECK(munmap(hole + 10 * PAGE, 20 * PAGE) == 0);
    CHECK(mprotect(hole + 40 * PAGE, 5 * PAGE, PROT_NONE) == 0); /* content behind no access */
    fill_bytes(brk, 40 * PAGE, 3);
    fill_bytes(shared, 16 * PAGE, 4);
    CHECK(mprotect(none, 4 * PAGE, PROT_NONE) == 0);
    CHECK(madvise(advised, 4 * PAGE, MADV_DONTFORK) == 0 && madvise(advised + 4 * PAGE, 4 * PAGE, MADV_WIPEONFORK) == 0);
    CHECK(mlock(advised, PAGE) == 0);
    big = mmap(NULL, 16 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(madvise(big, 16 << 20, MADV_HUGEPAGE) == 0);
    fill_bytes(big + (4 << 20), 4 << 20, 8);
    code = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memcpy(code, "\xb8\x2a\x00\x00\x00\xc3", 6); /* mov $42, %eax; ret */
    CHECK(mprotect(code, PAGE, PROT_READ | PROT_EXEC) == 0);
    for (int i = 0; i < MANY; i++) {
        many[i] = mmap(NULL, PAGE, i % 2 ? PROT_READ | PROT_WRITE : PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (i % 2)
            fill_bytes(many[i], PAGE, 100 + (unsigned)i);
    }
    deep(100);
    CHECK(pipe(tube) == 0);
    if (!(child = fork())) { /* sees the shared memory change */
        char c;
        CHECK(read(tube[0], &c, 1) == 1);
        check_bytes(shared, 16 * PAGE, 5);
        fill_bytes(shared, 16 * PAGE, 6);
        _exit(33);
    }
    void *heap_end = sbrk(0);
    ready();

    CHECK(sbrk(PAGE) == heap_end); /* the heap goes on where it was */
    for (unsigned i = 0; i < 8; i++) {
        if (i == 2)
            for (int k = 0; k < PAGE; k++)
                CHECK(private_map[i * PAGE + (unsigned)k] == 0);
        else if (i == 3) /* untouched private page: shows the file, which the shared mapping has changed */
            check_bytes(private_map + i * PAGE, PAGE, 61);
        else
            check_bytes(private_map + i * PAGE, PAGE, i == 1 ? 60 : 50 + i);
        check_bytes(shared_map + i * PAGE, PAGE, i == 3 ? 61 : 50 + i);
        check_bytes(gone_map + i * PAGE, PAGE, i == 3 ? 62 : 50 + i);
    }
    CHECK(pread(file, page, PAGE, 3 * PAGE) == PAGE);
    check_bytes(page, PAGE, 61);
    fill_bytes(shared_map, PAGE, 63); /* still shared with the file */
    CHECK(pread(file, page, PAGE, 0) == PAGE);
    check_bytes(page, PAGE, 63);
    check_bytes(memory_map, 8 * PAGE, 70);
    CHECK(fcntl(memory, F_GET_SEALS) == (F_SEAL_GROW | F_SEAL_SHRINK) && ftruncate(memory, PAGE) == -1);
    memory_map[5] = 99;
    CHECK(pread(memory, page, 6, 0) == 6 && page[5] == 99);
    for (int i = 0; i < 64; i++)
        if (i == 5 || i == 9)
            for (int k = 0; k < PAGE; k++)
                CHECK(anon[i * PAGE + k] == 0);
    check_bytes(anon, 5 * PAGE, 1);
    check_bytes(hole, 10 * PAGE, 2);
    CHECK(mprotect(hole + 40 * PAGE, 5 * PAGE, PROT_READ) == 0);
    for (int i = 30; i < 64; i++)
        for (int k = 0; k < PAGE; k++) {
            size_t n = (size_t)i * PAGE + (size_t)k;
            CHECK(hole[n] == byte_at(n, 2));
        }
    check_bytes(brk, 40 * PAGE, 3);
    check_bytes(big + (4 << 20), 4 << 20, 8);
    CHECK(big[0] == 0 && big[(16 << 20) - 1] == 0 && has_flag(big, " hg"));
    CHECK(has_flag(advised, " dc") && has_flag(advised + 4 * PAGE, " wf") && has_flag(advised, " lo"));
    CHECK(((int (*)(void))code)() == 42);
    for (int i = 1; i < MANY; i += 2)
        check_bytes(many[i], PAGE, 100 + (unsigned)i);
    CHECK(deep(200) > 0); /* the stack still grows */
    fill_bytes(shared, 16 * PAGE, 5);
    CHECK(write(tube[1], "x", 1) == 1 && waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 33);
    check_bytes(shared, 16 * PAGE, 6);
    return pass();
}
