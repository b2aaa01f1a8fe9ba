/* User and group ids, supplementary groups, capabilities, flags. Runs as root and becomes somebody else. */
#include "work.h"
#include <grp.h>
#include <linux/capability.h>
#include <sys/fsuid.h>
#include <sys/prctl.h>

static void capabilities(struct __user_cap_data_struct *data, int set)
{
    struct __user_cap_header_struct header = { _LINUX_CAPABILITY_VERSION_3, 0 };
    CHECK(syscall(set ? SYS_capset : SYS_capget, &header, data) == 0);
}

int main(void)
{
    gid_t groups[3] = { 1000, 2000, 3000 }, got_groups[8];
    uid_t r, e, s;
    gid_t gr, ge, gs;
    struct __user_cap_data_struct caps[2], got[2];

    CHECK(chmod(".", 0777) == 0);
    CHECK(prctl(PR_CAPBSET_DROP, CAP_SYS_BOOT) == 0);
    CHECK(prctl(PR_SET_KEEPCAPS, 1) == 0);
    CHECK(setgroups(3, groups) == 0 && setresgid(601, 602, 603) == 0 && setresuid(501, 502, 503) == 0);
    memset(caps, 0, sizeof caps);
    caps[0].permitted = 1u << CAP_NET_BIND_SERVICE | 1u << CAP_SYS_NICE;
    caps[0].effective = 1u << CAP_NET_BIND_SERVICE;
    caps[0].inheritable = 1u << CAP_SYS_NICE;
    capabilities(caps, 1);
    CHECK(prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, CAP_SYS_NICE, 0, 0) == 0);
    CHECK(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0);
    CHECK(prctl(PR_SET_DUMPABLE, 0) == 0);
    CHECK(prctl(PR_SET_PDEATHSIG, SIGHUP) == 0);
    ready();

    CHECK(getresuid(&r, &e, &s) == 0 && r == 501 && e == 502 && s == 503);
    CHECK(getresgid(&gr, &ge, &gs) == 0 && gr == 601 && ge == 602 && gs == 603);
    CHECK(getgroups(8, got_groups) == 3 && !memcmp(groups, got_groups, sizeof groups));
    CHECK(setfsuid((uid_t)-1) == 502 && setfsgid((gid_t)-1) == 602);
    capabilities(got, 0);
    CHECK(got[0].permitted == caps[0].permitted && got[0].effective == caps[0].effective);
    CHECK(got[0].inheritable == caps[0].inheritable && got[1].permitted == 0);
    CHECK(prctl(PR_CAPBSET_READ, CAP_SYS_BOOT) == 0 && prctl(PR_CAPBSET_READ, CAP_CHOWN) == 1);
    CHECK(prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_IS_SET, CAP_SYS_NICE, 0, 0) == 1);
    CHECK(prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) == 1 && prctl(PR_GET_DUMPABLE) == 0);
    int death;
    CHECK(prctl(PR_GET_PDEATHSIG, &death) == 0 && death == SIGHUP);
    return pass();
}
