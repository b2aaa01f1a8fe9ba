/* Threads that make threads and wait for their ends, as fast as they can, and count signals meanwhile. */
#include "work.h"
#include <pthread.h>

static volatile int signals;

static void on_signal(int number)
{
    (void)number;
    __atomic_add_fetch(&signals, 1, __ATOMIC_RELAXED);
}

static void *nothing(void *argument)
{
    return argument;
}

static void *again(void *argument)
{
    pthread_t thread;

    for (;;)
        CHECK(pthread_create(&thread, NULL, nothing, NULL) == 0 && pthread_join(thread, NULL) == 0);
    return argument;
}

int main(void)
{
    struct sigaction action = { .sa_handler = on_signal, .sa_flags = SA_RESTART };
    struct itimerval often = { { 0, 500 }, { 0, 500 } };
    pthread_t thread;

    CHECK(sigaction(SIGALRM, &action, NULL) == 0 && setitimer(ITIMER_REAL, &often, NULL) == 0);
    for (int i = 0; i < 3; i++)
        CHECK(pthread_create(&thread, NULL, again, NULL) == 0);
    printf("ready\n");
    fflush(stdout);
    again(NULL);
}
