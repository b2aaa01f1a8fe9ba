/* Handlers, masks, queued signals with their values, alternate stack, interval and POSIX timers. */
#include "work.h"

static volatile sig_atomic_t order[64], count, on_alternate, alarms, ticks;
static char *alternate;

static void queued(int signal, siginfo_t *info, void *context)
{
    char here;
    (void)context;
    order[count++] = signal * 1000 + info->si_value.sival_int;
    if (&here >= alternate && &here < alternate + 65536)
        on_alternate++;
}

static void on_alarm(int signal)
{
    if (signal == SIGALRM)
        alarms++;
    else
        ticks++;
}

int main(void)
{
    struct sigaction action = { .sa_sigaction = queued, .sa_flags = SA_SIGINFO | SA_ONSTACK }, got;
    struct sigaction plain = { .sa_handler = on_alarm, .sa_flags = SA_RESTART };
    struct sigevent event = { .sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGRTMIN + 5, .sigev_value.sival_int = 77 };
    struct itimerspec once = { .it_value = { 3600, 0 } }, every = { { 0, 50000000 }, { 0, 50000000 } }, left;
    struct itimerval interval = { { 0, 30000 }, { 0, 30000 } };
    stack_t stack, old;
    timer_t gone, timer, ticking;
    sigset_t set, got_set;

    alternate = malloc(65536);
    stack = (stack_t){ .ss_sp = alternate, .ss_size = 65536 };
    CHECK(sigaltstack(&stack, NULL) == 0);
    sigemptyset(&action.sa_mask);
    sigaddset(&action.sa_mask, SIGTERM);
    CHECK(sigaction(SIGRTMIN + 3, &action, NULL) == 0 && sigaction(SIGRTMIN + 4, &action, NULL) == 0);
    CHECK(sigaction(SIGALRM, &plain, NULL) == 0 && sigaction(SIGRTMIN + 5, &plain, NULL) == 0);
    CHECK(signal(SIGHUP, SIG_IGN) != SIG_ERR && signal(SIGTRAP, SIG_IGN) != SIG_ERR);
    sigemptyset(&set);
    sigaddset(&set, SIGRTMIN + 3);
    sigaddset(&set, SIGRTMIN + 4);
    sigaddset(&set, SIGWINCH);
    CHECK(sigprocmask(SIG_BLOCK, &set, NULL) == 0);
    for (int i = 0; i < 40; i++)
        CHECK(sigqueue(getpid(), SIGRTMIN + 3, (union sigval){ .sival_int = i }) == 0);
    CHECK(sigqueue(getpid(), SIGRTMIN + 4, (union sigval){ .sival_int = 999 }) == 0);
    CHECK(kill(getpid(), SIGWINCH) == 0);
    CHECK(timer_create(CLOCK_MONOTONIC, &event, &gone) == 0 && timer_create(CLOCK_REALTIME, &event, &timer) == 0);
    CHECK(timer_delete(gone) == 0 && timer_settime(timer, 0, &once, NULL) == 0);
    CHECK(timer_create(CLOCK_MONOTONIC, &event, &ticking) == 0 && timer_settime(ticking, 0, &every, NULL) == 0);
    CHECK(setitimer(ITIMER_REAL, &interval, NULL) == 0);
    ready();

    int before = alarms, ticks_before = ticks;
    for (double until = now() + 5; now() < until && (alarms < before + 3 || ticks < ticks_before + 3);)
        usleep(1000);
    CHECK(alarms >= before + 3 && ticks >= ticks_before + 3);
    interval = (struct itimerval){ 0 };
    CHECK(setitimer(ITIMER_REAL, &interval, NULL) == 0);
    CHECK(timer_gettime(timer, &left) == 0 && left.it_value.tv_sec > 3000 && left.it_value.tv_sec < 3600);
    CHECK(timer_gettime(gone, &left) == -1 || gone == timer || gone == ticking);
    CHECK(timer_delete(ticking) == 0);
    CHECK(sigaction(SIGHUP, NULL, &got) == 0 && got.sa_handler == SIG_IGN);
    CHECK(sigaction(SIGTRAP, NULL, &got) == 0 && got.sa_handler == SIG_IGN);
    CHECK(sigaction(SIGRTMIN + 3, NULL, &got) == 0 && got.sa_sigaction == queued && sigismember(&got.sa_mask, SIGTERM) == 1);
    CHECK(sigpending(&got_set) == 0 && sigismember(&got_set, SIGWINCH) == 1);
    CHECK(sigaltstack(NULL, &old) == 0 && old.ss_sp == alternate && old.ss_size == 65536);
    CHECK(count == 0);
    CHECK(sigprocmask(SIG_UNBLOCK, &set, NULL) == 0);
    CHECK(count == 41 && on_alternate == 41);
    /* The kernel takes lower numbers first; each handler runs on top of the one taken before. */
    int next = 0, seen = 0;
    for (int i = 0; i < 41; i++)
        if (order[i] / 1000 == SIGRTMIN + 3)
            CHECK(order[i] % 1000 == next++);
        else
            seen += order[i] == (SIGRTMIN + 4) * 1000 + 999;
    CHECK(next == 40 && seen == 1);
    return pass();
}
