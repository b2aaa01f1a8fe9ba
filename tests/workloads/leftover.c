/* As if a ckpt had been killed: memory of its batches is there, and a thread has not come out of it yet. */
#include "work.h"
#include <pthread.h>
#include <sys/mman.h>

#define PLACE ((void *)0x636b70740000)
static volatile int out;

/* Time that we run: in a freeze it does not pass. */
static void *clock_work(void *argument)
{
    (void)argument;
    for (int i = 0; i < 200; i++)
        usleep(1000);
    out = 1;
    return NULL;
}

int main(void)
{
    /* 1: cmpl $0, (%rdi); je 1b; ret */
    static const unsigned char code[] = { 0x83, 0x3f, 0x00, 0x74, 0xfb, 0xc3 };
    pthread_t thread;

    only_main_waits();
    char *arena = mmap(PLACE, 128 << 10, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(arena == PLACE);
    memcpy(arena, code, sizeof code);
    printf("inside\n");
    fflush(stdout);
    CHECK(pthread_create(&thread, NULL, clock_work, NULL) == 0);
    ((void (*)(volatile int *))arena)(&out);
    /* As if it had been killed before its code was there; what is there never ends: 1: jmp 1b. */
    memcpy(arena, "\xeb\xfe", 2);
    printf("outside\n");
    fflush(stdout);
    CHECK(pthread_join(thread, NULL) == 0);
    ready();
    return pass();
}
