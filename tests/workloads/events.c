/* eventfd, epoll, timerfd, signalfd. */
#include "work.h"
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/signalfd.h>
#include <sys/timerfd.h>

int main(void)
{
    int count = eventfd(41, EFD_NONBLOCK), semaphore = eventfd(3, EFD_SEMAPHORE | EFD_NONBLOCK), epoll = epoll_create1(EPOLL_CLOEXEC);
    int once = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK), every = timerfd_create(CLOCK_REALTIME, TFD_NONBLOCK);
    int idle = timerfd_create(CLOCK_BOOTTIME, TFD_NONBLOCK), tube[2], tube2[2], inner = epoll_create1(0), signals;
    struct itimerspec far = { .it_value = { 500, 0 } }, near = { { 0, 20000000 }, { 0, 20000000 } }, left;
    struct epoll_event event, got[8];
    uint64_t value, ticks;
    sigset_t set;
    struct signalfd_siginfo info;

    sigemptyset(&set);
    sigaddset(&set, SIGUSR2);
    sigaddset(&set, SIGRTMIN + 2);
    CHECK(sigprocmask(SIG_BLOCK, &set, NULL) == 0);
    CHECK((signals = signalfd(-1, &set, SFD_NONBLOCK)) >= 0);
    CHECK(sigqueue(getpid(), SIGRTMIN + 2, (union sigval){ .sival_int = 4711 }) == 0);
    CHECK(timerfd_settime(once, 0, &far, NULL) == 0 && timerfd_settime(every, 0, &near, NULL) == 0);
    usleep(100000); /* some expirations wait to be read */
    CHECK(pipe(tube) == 0 && pipe(tube2) == 0);
    event = (struct epoll_event){ .events = EPOLLIN, .data.u64 = 0xdeadbeef00000001 };
    CHECK(epoll_ctl(epoll, EPOLL_CTL_ADD, tube[0], &event) == 0);
    event = (struct epoll_event){ .events = EPOLLOUT | EPOLLONESHOT, .data.u64 = 2 };
    CHECK(epoll_ctl(epoll, EPOLL_CTL_ADD, tube2[1], &event) == 0);
    CHECK(epoll_wait(epoll, got, 8, 0) == 1 && got[0].data.u64 == 2); /* disarmed now */
    event = (struct epoll_event){ .events = EPOLLIN | EPOLLET, .data.u64 = 3 };
    CHECK(epoll_ctl(epoll, EPOLL_CTL_ADD, inner, &event) == 0);
    event = (struct epoll_event){ .events = EPOLLIN, .data.u64 = 4 };
    CHECK(epoll_ctl(inner, EPOLL_CTL_ADD, tube2[0], &event) == 0);
    ready();

    CHECK(read(count, &value, 8) == 8 && value == 41 && read(count, &value, 8) == -1 && errno == EAGAIN);
    for (int i = 0; i < 3; i++)
        CHECK(read(semaphore, &value, 8) == 8 && value == 1);
    CHECK(read(semaphore, &value, 8) == -1 && errno == EAGAIN);
    CHECK(timerfd_gettime(once, &left) == 0 && left.it_value.tv_sec > 100 && left.it_value.tv_sec < 500);
    CHECK(timerfd_gettime(idle, &left) == 0 && left.it_value.tv_sec == 0 && left.it_value.tv_nsec == 0);
    CHECK(read(every, &ticks, 8) == 8 && ticks >= 4);
    CHECK(timerfd_gettime(every, &left) == 0 && left.it_interval.tv_nsec == 20000000);
    for (double until = now() + 5; read(every, &ticks, 8) != 8;)
        CHECK(now() < until && errno == EAGAIN);
    CHECK(read(signals, &info, sizeof info) == sizeof info && info.ssi_signo == (unsigned)SIGRTMIN + 2 && info.ssi_int == 4711);
    CHECK(read(signals, &info, sizeof info) == -1 && errno == EAGAIN);
    CHECK(epoll_wait(epoll, got, 8, 0) == 0);
    CHECK(write(tube[1], "x", 1) == 1);
    CHECK(epoll_wait(epoll, got, 8, 1000) == 1 && got[0].data.u64 == 0xdeadbeef00000001 && got[0].events == EPOLLIN);
    event = (struct epoll_event){ .events = EPOLLIN | EPOLLOUT, .data.u64 = 5 };
    CHECK(epoll_ctl(epoll, EPOLL_CTL_ADD, tube[0], &event) == -1 && errno == EEXIST);
    CHECK(epoll_ctl(epoll, EPOLL_CTL_MOD, tube2[1], &event) == 0); /* keyed by its number */
    CHECK(epoll_ctl(epoll, EPOLL_CTL_DEL, tube[0], NULL) == 0);
    CHECK(epoll_wait(epoll, got, 8, 0) == 1 && got[0].data.u64 == 5 && got[0].events == EPOLLOUT);
    CHECK(epoll_ctl(epoll, EPOLL_CTL_DEL, tube2[1], NULL) == 0);
    CHECK(write(tube2[1], "y", 1) == 1 && epoll_wait(epoll, got, 8, 1000) == 1 && got[0].data.u64 == 3);
    CHECK(epoll_wait(inner, got, 8, 0) == 1 && got[0].data.u64 == 4);
    CHECK(fcntl(epoll, F_GETFD) == FD_CLOEXEC);
    return pass();
}
