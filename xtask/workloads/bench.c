// A process with much of one thing: bench KIND COUNT READY-FILE. It sets it up, makes the file, and waits.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

static void *wait_thread(void *unused) {
    for (;;) pause();
    return unused;
}

// COUNT MiB, every second page of them without a pattern, the others text.
static void memory(long count) {
    static const char text[] = "what compresses well, as much of a program's memory does; ";
    uint64_t *words = mmap(NULL, count << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (words == MAP_FAILED) err(1, "mmap");
    uint64_t x = 88172645463325252u;
    for (long page = 0; page < count << 8; page++) {
        uint64_t *at = words + page * 512;
        for (long i = 0; i < 512; i++) {
            if (page % 2) {
                x ^= x << 13, x ^= x >> 7, x ^= x << 17;
                at[i] = x;
            } else {
                memcpy(at + i, text + (i * 8 + page) % 48, 8);
            }
        }
    }
}

static void threads(long count) {
    pthread_attr_t small;
    pthread_attr_init(&small);
    pthread_attr_setstacksize(&small, 64 << 10);
    for (pthread_t thread; count > 1; count--)
        if (pthread_create(&thread, &small, wait_thread, NULL)) errx(1, "pthread_create");
}

// Neighbours differ in protection, or the kernel would make one mapping of them.
static void mappings(long count) {
    for (long i = 0; i < count; i++) {
        int protection = i % 2 ? PROT_READ : PROT_READ | PROT_WRITE;
        char *at = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (at == MAP_FAILED) err(1, "mmap");
        *at = (char)i;
        if (mprotect(at, 4096, protection)) err(1, "mprotect");
    }
}

static void descriptors(long count) {
    for (long i = 0; i < count; i += 4) {
        int ends[2];
        if (pipe(ends) || eventfd(3, 0) < 0 || open("/proc/self/exe", O_RDONLY) < 0) err(1, "descriptors");
        if (write(ends[1], "x", 1) != 1) err(1, "write");
    }
}

static void children(long count) {
    for (; count > 0; count--) {
        pid_t child = fork();
        if (child < 0) err(1, "fork");
        if (child == 0) wait_thread(NULL);
    }
}

static void connections(long count) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof address;
    int listener = socket(AF_INET, SOCK_STREAM, 0);
    if (bind(listener, (void *)&address, length) || listen(listener, 16)) err(1, "listen");
    getsockname(listener, (void *)&address, &length);
    for (; count > 0; count--) {
        int one = socket(AF_INET, SOCK_STREAM, 0);
        if (connect(one, (void *)&address, sizeof address)) err(1, "connect");
        int other = accept(listener, NULL, NULL);
        if (other < 0 || write(one, "there", 5) != 5 || write(other, "back", 4) != 4) err(1, "accept");
    }
}

int main(int argc, char **argv) {
    static const struct {
        const char *name;
        void (*make)(long);
    } kinds[] = {
        {"memory", memory},     {"threads", threads},         {"mappings", mappings}, {"descriptors", descriptors},
        {"children", children}, {"connections", connections}, {"nothing", NULL},
    };
    if (argc != 4) errx(2, "usage: bench KIND COUNT READY-FILE");
    // What the launcher had open is not part of the job.
    close_range(3, ~0U, 0);
    struct rlimit files = {4096, 4096};
    setrlimit(RLIMIT_NOFILE, &files);
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        if (strcmp(kinds[i].name, argv[1])) continue;
        if (kinds[i].make) kinds[i].make(atol(argv[2]));
        int ready = open(argv[3], O_CREAT | O_WRONLY, 0644);
        if (ready < 0) err(1, "%s", argv[3]);
        close(ready);
        wait_thread(NULL);
    }
    errx(2, "%s: no such kind", argv[1]);
}
