/* Pipes and FIFOs with content, shared ends, closed ends. */
#include "work.h"

int main(void)
{
    int full[2], fifo, lost, empty[2], half[2], status;
    char data[70000], got[70000], c;
    pid_t reader;

    for (size_t i = 0; i < sizeof data; i++)
        data[i] = (char)(i * 31 + (i >> 7));
    CHECK(pipe2(full, O_NONBLOCK) == 0 && fcntl(full[1], F_SETPIPE_SZ, 1 << 17) == 1 << 17);
    CHECK(write(full[1], data, sizeof data) == sizeof data);
    CHECK(pipe(empty) == 0 && pipe(half) == 0);
    CHECK(write(half[1], "tail", 4) == 4 && close(half[1]) == 0); /* data, then end of file */
    CHECK(mkfifo("fifo", 0640) == 0 || errno == EEXIST);
    fifo = open("fifo", O_RDWR);
    CHECK(fifo >= 0 && write(fifo, "first", 5) == 5);
    CHECK(mkfifo("lost", 0640) == 0 && (lost = open("lost", O_RDWR)) >= 0 && unlink("lost") == 0);
    CHECK(write(lost, "nameless", 8) == 8);
    int high = fcntl(empty[1], F_DUPFD_CLOEXEC, 200);
    CHECK(high == 200);
    if (!(reader = fork())) { /* blocks in read across the checkpoint */
        CHECK(close(empty[1]) == 0 && close(high) == 0);
        CHECK(read(empty[0], &c, 1) == 1 && c == 'q');
        CHECK(read(empty[0], &c, 1) == 0); /* every writer is gone */
        _exit(9);
    }
    ready();

    CHECK(fcntl(full[1], F_GETPIPE_SZ) == 1 << 17 && (fcntl(full[0], F_GETFL) & O_NONBLOCK));
    CHECK(read(full[0], got, sizeof got) == sizeof got && !memcmp(got, data, sizeof data));
    CHECK(read(full[0], got, 1) == -1 && errno == EAGAIN);
    CHECK(read(half[0], got, 10) == 4 && !memcmp(got, "tail", 4) && read(half[0], got, 10) == 0);
    CHECK(read(lost, got, 20) == 8 && !memcmp(got, "nameless", 8));
    CHECK(access("lost", F_OK) == -1 && access("lost (deleted)", F_OK) == -1);
    CHECK(write(fifo, "second", 6) == 6 && read(fifo, got, 20) == 11 && !memcmp(got, "firstsecond", 11));
    CHECK(fcntl(high, F_GETFD) == FD_CLOEXEC && fcntl(empty[1], F_GETFD) == 0);
    CHECK(!(fcntl(empty[0], F_GETFL) & O_NONBLOCK));
    CHECK(write(high, "q", 1) == 1 && close(high) == 0 && close(empty[1]) == 0);
    CHECK(waitpid(reader, &status, 0) == reader && WIFEXITED(status) && WEXITSTATUS(status) == 9);
    signal(SIGPIPE, SIG_IGN);
    CHECK(close(full[0]) == 0 && write(full[1], "x", 1) == -1 && errno == EPIPE);
    return pass();
}
