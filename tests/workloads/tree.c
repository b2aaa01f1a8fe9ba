/* Parents and children, sessions, process groups, zombies, orphans; what a process inherits. */
#include "work.h"
#include <sched.h>
#include <sys/prctl.h>
#include <sys/resource.h>

static int tell[2];

/* A child that reports what it sees when it is asked to. */
static pid_t child(void (*before)(void))
{
    pid_t pid = fork();
    if (pid == 0) {
        if (before)
            before();
        char c;
        pid_t saw[4];
        CHECK(write(tell[1], "r", 1) == 1);
        sigset_t set;
        siginfo_t info;
        sigemptyset(&set);
        sigaddset(&set, SIGUSR2);
        sigprocmask(SIG_BLOCK, &set, NULL);
        while (sigwaitinfo(&set, &info) != SIGUSR2)
            ;
        saw[0] = getpid(), saw[1] = getppid(), saw[2] = getpgrp(), saw[3] = getsid(0);
        c = 0;
        (void)c;
        char name[64];
        snprintf(name, sizeof name, "saw-%d", saw[0]);
        int file = open(name, O_WRONLY | O_CREAT | O_TRUNC, 0600);
        CHECK(write(file, saw, sizeof saw) == sizeof saw);
        _exit(5);
    }
    char c;
    CHECK(pid > 0 && read(tell[0], &c, 1) == 1);
    return pid;
}

static void own_group(void) { CHECK(setpgid(0, 0) == 0); }
static void own_session(void) { CHECK(setsid() == getpid()); }
static pid_t group;
static void join_group(void) { CHECK(setpgid(0, group) == 0); }

static void expect(pid_t pid, pid_t parent, pid_t pgrp, pid_t session)
{
    char name[64];
    pid_t saw[4];
    CHECK(kill(pid, SIGUSR2) == 0);
    snprintf(name, sizeof name, "saw-%d", pid);
    for (int i = 0; i < 3000; i++) {
        int file = open(name, O_RDONLY);
        if (file >= 0 && read(file, saw, sizeof saw) == sizeof saw) {
            close(file);
            if (saw[0] != pid || (parent && saw[1] != parent) || saw[2] != pgrp || saw[3] != session)
                FAIL("%d sees pid %d parent %d group %d session %d", pid, saw[0], saw[1], saw[2], saw[3]);
            return;
        }
        if (file >= 0)
            close(file);
        usleep(1000);
    }
    FAIL("%d says nothing", pid);
}

int main(void)
{
    pid_t me = getpid(), plain, leader, session, member, exited, killed[64], orphan, dead_group;
    int status;
    /* Among them signals that ckpt itself ignores or handles, and one that would dump core. */
    int deadly[] = { SIGTERM, SIGPIPE, SIGINT, SIGHUP, SIGSEGV, SIGABRT, SIGKILL, SIGTRAP, SIGRTMIN + 3 };
    int deaths = sizeof deadly / sizeof *deadly;
    struct rlimit no_core = { 0, 0 };
    cpu_set_t cpus, got_cpus;
    struct rlimit files = { 123, 456 }, got_files;
    char name[16];

    CHECK(pipe2(tell, O_CLOEXEC) == 0);
    CHECK(setrlimit(RLIMIT_NOFILE, &files) == 0);
    CHECK(setpriority(PRIO_PROCESS, 0, 5) == 0 && umask(027) <= 0777);
    CHECK(prctl(PR_SET_NAME, "tree-work") == 0 && prctl(PR_SET_CHILD_SUBREAPER, 1) == 0);
    CPU_ZERO(&cpus);
    CPU_SET(1, &cpus);
    CHECK(sched_setaffinity(0, sizeof cpus, &cpus) == 0);
    CHECK(mkdir("below", 0700) == 0 || errno == EEXIST);
    CHECK(prctl(PR_SET_TIMERSLACK, 70000) == 0);
    plain = child(NULL);
    group = leader = child(own_group);
    member = child(join_group);
    session = child(own_session);
    if (!(exited = fork()))
        _exit(7);
    CHECK(setrlimit(RLIMIT_CORE, &no_core) == 0);
    for (int i = 0; i < deaths; i++) {
        if (!(killed[i] = fork()))
            for (;;)
                pause();
        CHECK(kill(killed[i], deadly[i]) == 0);
    }
    /* A grandchild whose parent ends: ours, because we are a subreaper. */
    int hand[2];
    CHECK(pipe(hand) == 0);
    pid_t between = fork();
    if (between == 0) {
        pid_t pid = child(own_group);
        CHECK(write(hand[1], &pid, sizeof pid) == sizeof pid);
        _exit(0);
    }
    CHECK(read(hand[0], &orphan, sizeof orphan) == sizeof orphan && waitpid(between, &status, 0) == between);
    /* A group whose leader is gone. */
    pid_t short_lived = fork();
    if (short_lived == 0) {
        CHECK(setpgid(0, 0) == 0);
        group = getpid();
        pid_t pid = child(NULL);
        CHECK(write(hand[1], &pid, sizeof pid) == sizeof pid);
        _exit(0);
    }
    CHECK(read(hand[0], &dead_group, sizeof dead_group) == sizeof dead_group);
    CHECK(waitpid(short_lived, &status, 0) == short_lived);
    CHECK(chdir("below") == 0);
    usleep(50000);
    ready();

    CHECK(getpid() == me && getsid(0) == me);
    char where[512];
    CHECK(getcwd(where, sizeof where) && !strcmp(strrchr(where, '/'), "/below") && chdir("..") == 0);
    CHECK(waitpid(exited, &status, WNOHANG) == exited && WIFEXITED(status) && WEXITSTATUS(status) == 7);
    for (int i = 0; i < deaths; i++) {
        CHECK(waitpid(killed[i], &status, WNOHANG) == killed[i]);
        if (!WIFSIGNALED(status) || WTERMSIG(status) != deadly[i])
            FAIL("died with status %x instead of by signal %d", status, deadly[i]);
    }
    /* Children create files through the working directory they were born in. */
    expect(plain, me, me, me);
    expect(leader, me, leader, me);
    expect(member, me, leader, me);
    expect(session, me, session, session);
    expect(orphan, me, orphan, me);
    expect(dead_group, me, short_lived, me);
    for (int i = 0; i < 6; i++)
        CHECK(wait(&status) > 0 && WIFEXITED(status) && WEXITSTATUS(status) == 5);
    CHECK(wait(&status) == -1 && errno == ECHILD);
    CHECK(getrlimit(RLIMIT_NOFILE, &got_files) == 0 && got_files.rlim_cur == 123 && got_files.rlim_max == 456);
    CHECK(getpriority(PRIO_PROCESS, 0) == 5 && umask(0) == 027);
    CHECK(prctl(PR_GET_NAME, name) == 0 && !strcmp(name, "tree-work"));
    CHECK(prctl(PR_GET_TIMERSLACK) == 70000);
    int subreaper;
    CHECK(prctl(PR_GET_CHILD_SUBREAPER, &subreaper) == 0 && subreaper == 1);
    CHECK(sched_getaffinity(0, sizeof got_cpus, &got_cpus) == 0 && CPU_EQUAL(&cpus, &got_cpus));
    return pass();
}
