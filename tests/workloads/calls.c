/* Threads that wait in system calls: none may see the freeze, neither as EINTR nor as an early return. */
#include "work.h"
#include <linux/futex.h>
#include <pthread.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/msg.h>
#include <sys/select.h>
#include <sys/sem.h>
#include <sys/socket.h>
#include <sys/un.h>

enum { EPOLL, EPOLL_TIMED, POLL, POLL_TIMED, SELECT, SLEEP, FUTEX, FUTEX_TIMED, PIPE, EVENT, RECV, RECV_TIMED, ACCEPT, SIGWAIT, FLOCK, KINDS };
static const char *names[] = { "epoll_wait", "epoll_wait timed", "poll", "poll timed", "select", "nanosleep", "futex", "futex timed", "read pipe", "read eventfd", "recv", "recv timed", "accept", "sigtimedwait", "flock" };
static int futex_word[2], tube[2], event, pair[2], pair2[2], listener, lock, epoll;
static volatile int returned[KINDS];
static const double LONG = 40;

static void *waiter(void *argument)
{
    int kind = (int)(intptr_t)argument, ms = (int)(LONG * 1000), file;
    struct timespec time = { (time_t)LONG, 0 };
    struct timeval val = { (time_t)LONG, 0 };
    struct epoll_event ready_event;
    struct pollfd poll_fd = { .fd = tube[0], .events = POLLIN };
    char c;
    long result = 0;
    uint64_t value;
    sigset_t set;
    fd_set fds;

    errno = 0;
    switch (kind) {
    case EPOLL: result = epoll_wait(epoll, &ready_event, 1, -1); break;
    case EPOLL_TIMED: result = epoll_wait(epoll, &ready_event, 1, ms); break;
    case POLL: result = poll(&poll_fd, 1, -1); break;
    case POLL_TIMED: result = poll(&poll_fd, 1, ms); break;
    case SELECT: FD_ZERO(&fds); FD_SET(tube[0], &fds); result = select(tube[0] + 1, &fds, NULL, NULL, &val); break;
    case SLEEP: result = nanosleep(&time, NULL); break;
    case FUTEX: result = syscall(SYS_futex, &futex_word[0], FUTEX_WAIT, 0, NULL, NULL, 0); break;
    case FUTEX_TIMED: result = syscall(SYS_futex, &futex_word[1], FUTEX_WAIT, 0, &time, NULL, 0); break;
    case PIPE: result = read(tube[0], &c, 1); break;
    case EVENT: result = read(event, &value, 8); break;
    case RECV: result = recv(pair[0], &c, 1, 0); break;
    case RECV_TIMED: setsockopt(pair2[0], SOL_SOCKET, SO_RCVTIMEO, &val, sizeof val); result = recv(pair2[0], &c, 1, 0); break;
    case ACCEPT: result = accept(listener, NULL, NULL); break;
    case SIGWAIT: sigemptyset(&set); sigaddset(&set, SIGUSR2); result = sigtimedwait(&set, NULL, &time); break;
    case FLOCK: file = open("lock", O_RDWR); result = flock(file, LOCK_EX); break;
    }
    printf("returned from %s: %ld, errno %d\n", names[kind], result, errno);
    fflush(stdout);
    returned[kind] = 1;
    for (;;)
        pause();
    return NULL;
}

int main(void)
{
    pthread_t thread;
    sigset_t set;

    sigemptyset(&set);
    sigaddset(&set, SIGUSR1);
    sigaddset(&set, SIGUSR2);
    sigprocmask(SIG_BLOCK, &set, NULL);
    CHECK(pipe(tube) == 0 && (event = eventfd(0, 0)) >= 0 && socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
    CHECK(socketpair(AF_UNIX, SOCK_DGRAM, 0, pair2) == 0);
    listener = socket(AF_UNIX, SOCK_STREAM, 0);
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    int length = snprintf(address.sun_path + 1, 40, "ckpt-calls-%d", getpid());
    CHECK(bind(listener, (void *)&address, (socklen_t)(3 + length)) == 0 && listen(listener, 1) == 0);
    lock = open("lock", O_RDWR | O_CREAT, 0600);
    CHECK(flock(lock, LOCK_EX) == 0 && (epoll = epoll_create1(0)) >= 0);
    for (long i = 0; i < KINDS; i++)
        CHECK(pthread_create(&thread, NULL, waiter, (void *)i) == 0);
    usleep(200000);
    ready();
    for (int i = 0; i < KINDS; i++)
        if (returned[i])
            FAIL("%s has returned", names[i]);
    return pass();
}
