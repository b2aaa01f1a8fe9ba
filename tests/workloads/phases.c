// Has much memory while it is busy, and gives it back when it is told to be quiet: SIGUSR1 and SIGUSR2. SIGTERM: says
// in which phase it is.
#include "work.h"
#include <sys/mman.h>

enum { SIZE = 64 << 20 };

int main(void)
{
    sigset_t set;
    volatile char *memory = NULL;
    const char *phase = "quiet";

    sigemptyset(&set);
    sigaddset(&set, SIGUSR1);
    sigaddset(&set, SIGUSR2);
    sigaddset(&set, SIGTERM);
    sigprocmask(SIG_BLOCK, &set, NULL);
    puts(phase);
    fflush(stdout);
    for (char round = 1;; round++) {
        struct timespec moment = { .tv_nsec = 5000000 };
        int signal = sigtimedwait(&set, NULL, &moment);
        if (signal == SIGUSR1) {
            phase = "busy";
            memory = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            if (memory == MAP_FAILED)
                return 1;
        } else if (signal == SIGUSR2) {
            munmap((void *)memory, SIZE);
            memory = NULL;
            phase = "quiet";
        } else if (signal == SIGTERM) {
            printf("was %s\n", phase);
            return 0;
        }
        for (long i = 0; memory && i < SIZE; i += 4096)
            memory[i] = round;
        if (signal > 0) {
            puts(phase);
            fflush(stdout);
        }
    }
}
