/* System V shared memory. `sysv attach ID` is somebody else who attaches a segment. */
#include "work.h"
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/shm.h>

#define PAGE 4096
#define ODD (3 * PAGE + 100) /* no whole number of pages: the last one has a tail */

enum { KEYED, DOOMED, WAITING, PIECES, TWIN, SEGMENTS };
static int ids[SEGMENTS];
static struct shmid_ds before[SEGMENTS];
static pid_t other;
static int to_other[2], from_other[2];
static unsigned char common[64 * PAGE]; /* so much that a restore clones one process from the other */

static int make(key_t key, size_t size, int mode)
{
    int id = shmget(key, size, IPC_CREAT | IPC_EXCL | mode);
    CHECK(id >= 0);
    return id;
}

static unsigned char *attach(int id, int flags)
{
    unsigned char *at = shmat(id, NULL, flags);
    CHECK(at != (void *)-1);
    return at;
}

static int mapped(void *at)
{
    return msync(at, PAGE, MS_ASYNC) == 0;
}

/* Exactly what it was, but for times and who attached it last. */
static void same(int which)
{
    struct shmid_ds now, *old = &before[which];

    CHECK(shmctl(ids[which], IPC_STAT, &now) == 0);
    CHECK(now.shm_perm.__key == old->shm_perm.__key && now.shm_perm.mode == old->shm_perm.mode);
    CHECK(now.shm_perm.uid == old->shm_perm.uid && now.shm_perm.gid == old->shm_perm.gid);
    CHECK(now.shm_perm.cuid == old->shm_perm.cuid && now.shm_perm.cgid == old->shm_perm.cgid);
    CHECK(now.shm_segsz == old->shm_segsz && now.shm_cpid == old->shm_cpid);
    if (now.shm_nattch != old->shm_nattch)
        FAIL("segment %d is attached %lu times instead of %lu", which, now.shm_nattch, old->shm_nattch);
}

/* The other process: reads the keyed segment, writes the doomed one. */
static void work(unsigned char *read_only, unsigned char *doomed)
{
    char go;

    CHECK(write(from_other[1], "r", 1) == 1);
    CHECK(read(to_other[0], &go, 1) == 1);
    CHECK(read_only[5] == 0xaa && read_only[ODD + 17] == 0xbb);
    errno = 0;
    CHECK(mprotect(read_only, PAGE, PROT_READ | PROT_WRITE) < 0 && errno == EACCES);
    check_bytes(common, sizeof common, 8);
    doomed[9] = 0xcc;
    CHECK(write(from_other[1], "w", 1) == 1);
    CHECK(read(to_other[0], &go, 1) == 1);
    _exit(0);
}

int main(int argc, char **argv)
{
    unsigned char *first, *second, *doomed, *pieces, *hole, *twin, *twin_file, *waiting;
    int memory = memfd_create("twin", 0), next, status;
    struct shmid_ds changed, now;
    struct stat twin_stat;
    char number[32], answer;

    if (argc == 3 && !strcmp(argv[1], "attach")) {
        attach(atoi(argv[2]), SHM_RDONLY);
        ready();
        return pass();
    }
    CHECK(pipe(to_other) == 0 && pipe(from_other) == 0);
    ids[KEYED] = make(0x5e000000 | getpid(), ODD, 0640);
    first = attach(ids[KEYED], 0);
    second = attach(ids[KEYED], 0);
    fill_bytes(first, 4 * PAGE, 1); /* its tail, too */
    CHECK(shmctl(ids[KEYED], IPC_STAT, &changed) == 0);
    changed.shm_perm.uid = 7;
    changed.shm_perm.gid = 8;
    changed.shm_perm.mode = 0604;
    CHECK(shmctl(ids[KEYED], IPC_SET, &changed) == 0);
    CHECK(shmctl(ids[KEYED], SHM_LOCK, NULL) == 0);

    ids[DOOMED] = make(IPC_PRIVATE, 300 * PAGE, 0600);
    doomed = attach(ids[DOOMED], 0);
    fill_bytes(doomed, 300 * PAGE, 2);

    /* Three pieces of one attach, one of them read-only, and something else in the gap. */
    ids[PIECES] = make(IPC_PRIVATE, 8 * PAGE, 0600);
    pieces = attach(ids[PIECES], 0);
    fill_bytes(pieces, 8 * PAGE, 3);
    CHECK(mprotect(pieces + PAGE, PAGE, PROT_READ) == 0);
    CHECK(munmap(pieces + 3 * PAGE, 2 * PAGE) == 0);
    hole = mmap(pieces + 3 * PAGE, PAGE, PROT_READ | PROT_WRITE,
                MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    CHECK(hole == pieces + 3 * PAGE);
    fill_bytes(hole, PAGE, 4);

    /* A memfd and a segment with the same device and inode number. */
    CHECK(ftruncate(memory, 2 * PAGE) == 0 && fstat(memory, &twin_stat) == 0);
    twin_file = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, memory, 0);
    CHECK(twin_file != MAP_FAILED);
    fill_bytes(twin_file, 2 * PAGE, 5);
    next = open("/proc/sys/kernel/shm_next_id", O_WRONLY | O_CLOEXEC);
    snprintf(number, sizeof number, "%d", (int)twin_stat.st_ino);
    /* The next segment of the whole node gets the id: one that another process makes may come between. */
    for (int tries = 0; tries < 100 && ids[TWIN] != (int)twin_stat.st_ino; tries++) {
        CHECK(tries == 0 || shmctl(ids[TWIN], IPC_RMID, NULL) == 0);
        CHECK(pwrite(next, number, strlen(number), 0) == (ssize_t)strlen(number));
        ids[TWIN] = make(IPC_PRIVATE, 2 * PAGE, 0600);
    }
    close(next);
    twin = attach(ids[TWIN], 0);
    fill_bytes(twin, 2 * PAGE, 6);
    printf("twins: %d %lu\n", ids[TWIN], (unsigned long)twin_stat.st_ino);

    fill_bytes(common, sizeof common, 8);
    other = fork();
    CHECK(other >= 0);
    if (other == 0) {
        /* Another user makes one that nobody has attached. */
        int id;
        close(to_other[1]); /* so that it ends with the first one */
        CHECK(setegid(3) == 0 && seteuid(2) == 0);
        id = make(0x5f000000 | getpid(), 5 * PAGE, 0600);
        CHECK(seteuid(0) == 0 && setegid(0) == 0);
        unsigned char *at = attach(id, 0);
        fill_bytes(at, 5 * PAGE, 7);
        CHECK(shmdt(at) == 0 && shmdt(first) == 0 && shmdt(second) == 0 && shmdt(pieces) == 0);
        CHECK(write(from_other[1], &id, sizeof id) == sizeof id);
        at = attach(ids[KEYED], SHM_RDONLY);
        work(at, doomed);
    }
    CHECK(read(from_other[0], &ids[WAITING], sizeof(int)) == sizeof(int));
    CHECK(read(from_other[0], &answer, 1) == 1 && answer == 'r');
    CHECK(shmctl(ids[DOOMED], IPC_RMID, NULL) == 0);
    printf("segments:");
    for (int i = 0; i < SEGMENTS; i++) {
        CHECK(shmctl(ids[i], IPC_STAT, &before[i]) == 0);
        printf(" %d", ids[i]);
    }
    printf("\n");
    ready();

    for (int i = 0; i < SEGMENTS; i++)
        same(i);
    CHECK(shmget(0x5e000000 | getpid(), 0, 0) == ids[KEYED]);
    CHECK(shmget(0x5f000000 | other, 0, 0) == ids[WAITING]);
    check_bytes(common, sizeof common, 8);
    check_bytes(first, 4 * PAGE, 1);
    check_bytes(second, 4 * PAGE, 1);
    check_bytes(doomed, 300 * PAGE, 2);
    for (size_t i = 0; i < 8 * PAGE; i++)
        if (i / PAGE != 3 && i / PAGE != 4)
            CHECK(pieces[i] == byte_at(i, 3));
    check_bytes(hole, PAGE, 4);
    CHECK(!mapped(hole + PAGE));
    check_bytes(twin_file, 2 * PAGE, 5);
    check_bytes(twin, 2 * PAGE, 6);
    waiting = attach(ids[WAITING], 0);
    check_bytes(waiting, 5 * PAGE, 7);

    first[5] = 0xaa;
    second[ODD + 17] = 0xbb;
    CHECK(write(to_other[1], "g", 1) == 1);
    CHECK(read(from_other[0], &answer, 1) == 1 && answer == 'w');
    CHECK(doomed[9] == 0xcc && second[5] == 0xaa);
    twin[0] = 1;
    twin_file[0] = 2;
    CHECK(twin[0] == 1);
    errno = 0;
    CHECK(read(memory, pieces + PAGE, 1) < 0 && errno == EFAULT); /* read-only still */
    CHECK(mprotect(pieces + PAGE, PAGE, PROT_READ | PROT_WRITE) == 0); /* but it may be written */
    CHECK(shmdt(pieces) == 0);
    CHECK(!mapped(pieces) && !mapped(pieces + PAGE) && !mapped(pieces + 7 * PAGE) && mapped(hole));
    CHECK(shmdt(first) == 0 && !mapped(first) && mapped(second));
    CHECK(write(to_other[1], "e", 1) == 1);
    CHECK(waitpid(other, &status, 0) == other && status == 0);
    CHECK(shmctl(ids[KEYED], IPC_STAT, &now) == 0 && now.shm_nattch == 1);
    CHECK(shmdt(doomed) == 0);
    errno = 0;
    CHECK(shmctl(ids[DOOMED], IPC_STAT, &now) < 0 && errno == EINVAL); /* gone with its last attach */
    for (int i = 0; i < SEGMENTS; i++)
        CHECK(i == DOOMED || shmctl(ids[i], IPC_RMID, NULL) == 0);
    return pass();
}
