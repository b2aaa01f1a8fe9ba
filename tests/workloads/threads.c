/* Up to 64 threads (the first argument, 64 without one), each with its own registers, vector registers, FPU control, TLS, signal mask and pending signals. */
#include "work.h"
#include <pthread.h>
#include <sys/rseq.h>

#define THREADS 64
static int count = THREADS;
static __thread uint64_t tls_value;
static volatile int stop;
static pthread_barrier_t barrier;
static int tids[THREADS];
static volatile int handled[THREADS];
static __thread int self;

static void on_usr2(int signal, siginfo_t *info, void *context)
{
    (void)context;
    if (signal == SIGRTMIN && info->si_value.sival_int == 1000 + self)
        handled[self]++;
}

/* Spins with known values in every general register that is free and in ymm0-ymm15; returns the number of errors. */
static uint64_t spin(uint64_t seed)
{
    uint64_t bad = 0;
    uint64_t pattern[4] = { seed, ~seed, seed * 3, seed ^ 0x5555555555555555ULL };

    __asm__ volatile(
        "mov %[seed], %%r8\n lea 1(%%r8), %%r9\n lea 2(%%r8), %%r10\n lea 3(%%r8), %%r11\n"
        "lea 4(%%r8), %%r12\n lea 5(%%r8), %%r13\n lea 6(%%r8), %%r14\n lea 7(%%r8), %%r15\n"
        "vmovdqu (%[pattern]), %%ymm0\n vmovdqa %%ymm0, %%ymm7\n vmovdqa %%ymm0, %%ymm15\n"
        "mov $200000, %%ecx\n"
        "1: lea -1(%%r9), %%rax\n cmp %%rax, %%r8\n jne 2f\n"
        "lea -2(%%r10), %%rax\n cmp %%rax, %%r8\n jne 2f\n lea -3(%%r11), %%rax\n cmp %%rax, %%r8\n jne 2f\n"
        "lea -4(%%r12), %%rax\n cmp %%rax, %%r8\n jne 2f\n lea -5(%%r13), %%rax\n cmp %%rax, %%r8\n jne 2f\n"
        "lea -6(%%r14), %%rax\n cmp %%rax, %%r8\n jne 2f\n lea -7(%%r15), %%rax\n cmp %%rax, %%r8\n jne 2f\n"
        "cmp %[seed], %%r8\n jne 2f\n"
        "vpcmpeqq (%[pattern]), %%ymm7, %%ymm1\n vpmovmskb %%ymm1, %%eax\n cmp $-1, %%eax\n jne 2f\n"
        "vpcmpeqq (%[pattern]), %%ymm15, %%ymm2\n vpmovmskb %%ymm2, %%eax\n cmp $-1, %%eax\n jne 2f\n"
        "dec %%ecx\n jnz 1b\n jmp 3f\n"
        "2: inc %[bad]\n"
        "3: vzeroupper\n"
        : [bad] "+r"(bad) : [seed] "r"(seed), [pattern] "r"(pattern)
        : "rax", "rcx", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "memory", "cc",
          "xmm0", "xmm1", "xmm2", "xmm7", "xmm15");
    return bad;
}

/* How the kernel refuses to register restartable sequences: EBUSY where glibc has done so; 0 if it does not. */
static int registered(void)
{
    void *area = (char *)__builtin_thread_pointer() + __rseq_offset;

    return syscall(SYS_rseq, area, 32, 0, RSEQ_SIG) == -1 ? errno : 0;
}

static void *thread(void *argument)
{
    int i = (int)(intptr_t)argument;
    unsigned mxcsr = 0x1f80 | ((unsigned)(i % 4) << 13), got;
    unsigned short control = 0x37f | (unsigned short)((i % 4) << 10), got_control;
    sigset_t mask, now_mask;
    stack_t alt = { .ss_sp = malloc(SIGSTKSZ * 2), .ss_size = SIGSTKSZ * 2 }, got_alt;
    char name[16], got_name[16];

    CHECK(registered() == EBUSY);
    self = i;
    tls_value = 0x1000 + (uint64_t)i;
    tids[i] = (int)syscall(SYS_gettid);
    __asm__ volatile("ldmxcsr %0" :: "m"(mxcsr));
    __asm__ volatile("fldcw %0" :: "m"(control));
    snprintf(name, sizeof name, "worker-%d", i);
    pthread_setname_np(pthread_self(), name);
    CHECK(sigaltstack(&alt, NULL) == 0);
    sigemptyset(&mask);
    sigaddset(&mask, SIGRTMIN);
    sigaddset(&mask, SIGRTMIN + 1 + i % 8);
    pthread_sigmask(SIG_BLOCK, &mask, NULL);
    pthread_sigqueue(pthread_self(), SIGRTMIN, (union sigval){ .sival_int = 1000 + i });
    pthread_barrier_wait(&barrier);
    while (!stop) {
        CHECK(spin(0x123456789abcdefULL * (uint64_t)(i + 1)) == 0);
        if (i % 16) /* four never wait */
            usleep(20000 + 100 * i);
    }
    CHECK(registered() == EBUSY);
    CHECK(tls_value == 0x1000 + (uint64_t)i && self == i);
    CHECK(tids[i] == (int)syscall(SYS_gettid));
    __asm__ volatile("stmxcsr %0" : "=m"(got));
    CHECK((got & 0xffc0) == (mxcsr & 0xffc0));
    __asm__ volatile("fnstcw %0" : "=m"(got_control));
    CHECK(got_control == control);
    pthread_getname_np(pthread_self(), got_name, sizeof got_name);
    CHECK(strcmp(name, got_name) == 0);
    CHECK(sigaltstack(NULL, &got_alt) == 0 && got_alt.ss_sp == alt.ss_sp && got_alt.ss_size == alt.ss_size);
    pthread_sigmask(SIG_SETMASK, NULL, &now_mask);
    for (int s = SIGRTMIN; s < SIGRTMIN + 10; s++)
        CHECK(sigismember(&now_mask, s) == sigismember(&mask, s));
    CHECK(handled[i] == 0);
    pthread_sigmask(SIG_UNBLOCK, &mask, NULL);
    CHECK(handled[i] == 1);
    return NULL;
}

int main(int argc, char **argv)
{
    if (argc > 1 && atoi(argv[1]) > 0 && atoi(argv[1]) < THREADS)
        count = atoi(argv[1]);
    pthread_t threads[THREADS];
    struct sigaction action = { .sa_sigaction = on_usr2, .sa_flags = SA_SIGINFO | SA_ONSTACK };

    only_main_waits();
    CHECK(sigaction(SIGRTMIN, &action, NULL) == 0);
    pthread_barrier_init(&barrier, NULL, (unsigned)count + 1);
    for (int i = 0; i < count; i++)
        CHECK(pthread_create(&threads[i], NULL, thread, (void *)(intptr_t)i) == 0);
    pthread_barrier_wait(&barrier);
    ready();
    stop = 1;
    for (int i = 0; i < count; i++)
        CHECK(pthread_join(threads[i], NULL) == 0); /* needs clear_child_tid */
    return pass();
}
