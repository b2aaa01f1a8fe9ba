/* Memory in huge pages for which no advice was given. */
#include "work.h"
#include <sys/mman.h>

enum { HUGE = 2 << 20, BLOCKS = 12 };

int main(void)
{
    char *at = mmap(NULL, (BLOCKS + 1) * HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(at != MAP_FAILED);
    at = (char *)(((uintptr_t)at + HUGE - 1) / HUGE * HUGE);
    for (long i = 0; i < (long)BLOCKS * HUGE; i += 8)
        *(uint64_t *)(at + i) = (uint64_t)i * 0x9e3779b97f4a7c15u;
    /* A part of it; the others stay small, and one loses a page again. */
    CHECK(madvise(at, (BLOCKS - 4) * HUGE, 25) == 0);
    CHECK(madvise(at + 3 * HUGE + 8192, 4096, MADV_DONTNEED) == 0);
    ready();
    for (long i = 0; i < (long)BLOCKS * HUGE; i += 8) {
        int gone = i >= 3 * HUGE + 8192 && i < 3 * HUGE + 8192 + 4096;
        CHECK(*(uint64_t *)(at + i) == (gone ? 0 : (uint64_t)i * 0x9e3779b97f4a7c15u));
    }
    return pass();
}
