/* Open files: positions, flags, sharing, deleted files, directories, devices, locks. */
#include "work.h"
#include <dirent.h>
#include <sys/file.h>

#define NAMES 300

/* Reads names from a directory, a few or all of them: notes those that begin with `n`, and fails if one comes twice. */
static int names(int directory, int all, char seen[NAMES])
{
    char buffer[2048];
    int length, found = 0;

    while ((length = syscall(SYS_getdents64, directory, buffer, sizeof buffer)) > 0) {
        for (int at = 0; at < length; at += *(unsigned short *)(buffer + at + 16)) {
            const char *name = buffer + at + 19;
            if (name[0] == 'n') {
                CHECK(!seen[atoi(name + 1)]);
                seen[atoi(name + 1)] = 1;
                found++;
            }
        }
        if (!all)
            break;
    }
    CHECK(length >= 0);
    return found;
}

int main(void)
{
    static char half[NAMES], whole[NAMES];
    int halfway, done, some;
    char got[64] = { 0 }, path[512];
    int plain = open("plain", O_RDWR | O_CREAT | O_TRUNC, 0640), append = open("append", O_WRONLY | O_APPEND | O_CREAT | O_TRUNC, 0600);
    int gone = open("gone", O_RDWR | O_CREAT | O_TRUNC, 0600), gone2, same, other, directory = open(".", O_RDONLY | O_DIRECTORY);
    int null = open("/dev/null", O_RDWR), zero = open("/dev/zero", O_RDONLY), handle = open("plain", O_PATH);
    int locked = open("locked", O_RDWR | O_CREAT, 0600), probe, status;
    struct flock record = { .l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 10, .l_len = 20 }, ask;
    int homeless, replaced, replacing;
    struct stat facts, named;
    pid_t child;

    CHECK(write(plain, "0123456789", 10) == 10 && lseek(plain, 4, SEEK_SET) == 4);
    same = dup(plain);
    other = open("plain", O_RDONLY);
    CHECK(lseek(other, 7, SEEK_SET) == 7);
    CHECK(write(append, "one\n", 4) == 4);
    gone2 = open("gone", O_RDONLY);
    CHECK(write(gone, "secret content", 14) == 14 && unlink("gone") == 0);
    /* With its directories; and one whose name is in use again. */
    CHECK(mkdir("lost", 0700) == 0 && mkdir("lost/found", 0700) == 0);
    homeless = open("lost/found/file", O_RDWR | O_CREAT, 0600);
    CHECK(write(homeless, "nowhere", 7) == 7 && unlink("lost/found/file") == 0);
    CHECK(rmdir("lost/found") == 0 && rmdir("lost") == 0);
    replaced = open("replaced", O_RDWR | O_CREAT, 0600);
    CHECK(write(replaced, "old", 3) == 3 && unlink("replaced") == 0);
    CHECK((replacing = open("replaced", O_RDWR | O_CREAT, 0600)) >= 0 && write(replacing, "new", 3) == 3);
    CHECK(flock(locked, LOCK_EX) == 0 && fcntl(locked, F_SETLK, &record) == 0);
    CHECK(mkdir("names", 0700) == 0);
    for (int i = 0; i < NAMES; i++) {
        snprintf(path, sizeof path, "names/n%d", i);
        CHECK(close(open(path, O_WRONLY | O_CREAT, 0600)) == 0);
    }
    halfway = open("names", O_RDONLY | O_DIRECTORY);
    done = open("names", O_RDONLY | O_DIRECTORY);
    some = names(halfway, 0, half);
    CHECK(some > 0 && some < NAMES && names(done, 1, whole) == NAMES);
    ready();
    CHECK(pread(homeless, got, 64, 0) == 7 && !memcmp(got, "nowhere", 7) && access("lost", F_OK) == -1);
    CHECK(fstat(homeless, &facts) == 0 && facts.st_nlink == 0);
    CHECK(pread(replaced, got, 64, 0) == 3 && !memcmp(got, "old", 3));
    CHECK(pread(replacing, got, 64, 0) == 3 && !memcmp(got, "new", 3) && fstat(replacing, &facts) == 0);
    CHECK(facts.st_nlink == 1 && stat("replaced", &named) == 0 && named.st_ino == facts.st_ino);
    CHECK(names(halfway, 1, half) == NAMES - some && names(done, 1, whole) == 0);

    CHECK(read(plain, got, 2) == 2 && !memcmp(got, "45", 2));
    CHECK(read(same, got, 2) == 2 && !memcmp(got, "67", 2)); /* one position */
    CHECK(read(other, got, 3) == 3 && !memcmp(got, "789", 3)); /* another one */
    CHECK(write(append, "two\n", 4) == 4 && (fcntl(append, F_GETFL) & (O_ACCMODE | O_APPEND)) == (O_WRONLY | O_APPEND));
    probe = open("append", O_RDONLY);
    CHECK(read(probe, got, 20) == 8 && !memcmp(got, "one\ntwo\n", 8));
    CHECK(open("gone", O_RDONLY) == -1 && errno == ENOENT);
    CHECK(pread(gone, got, 20, 0) == 14 && !memcmp(got, "secret content", 14));
    CHECK(pwrite(gone, "S", 1, 0) == 1 && read(gone2, got, 6) == 6 && !memcmp(got, "Secret", 6)); /* one file */
    CHECK(fchdir(directory) == 0 && openat(directory, "plain", O_RDONLY) >= 0);
    CHECK(write(null, "x", 1) == 1 && read(zero, got, 8) == 8 && got[7] == 0);
    snprintf(path, sizeof path, "/proc/self/fd/%d", handle);
    CHECK(read(handle, got, 1) == -1 && errno == EBADF && open(path, O_RDONLY) >= 0);
    CHECK((fcntl(handle, F_GETFL) & O_PATH));
    if (!(child = fork())) { /* another process must see the locks */
        int again = open("locked", O_RDWR);
        CHECK(flock(again, LOCK_EX | LOCK_NB) == -1 && errno == EWOULDBLOCK);
        ask = (struct flock){ .l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 15, .l_len = 1 };
        CHECK(fcntl(again, F_GETLK, &ask) == 0 && ask.l_type == F_WRLCK && ask.l_start == 10 && ask.l_len == 20);
        CHECK(ask.l_pid == getppid());
        _exit(3);
    }
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 3);
    return pass();
}
