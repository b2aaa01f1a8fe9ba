//! What fails, and what must hold then: with the real `ckpt`, real processes, and two nodes.
//!
//! The job is a Python server on node1 and a client on node2 that checks every reply, so a byte
//! lost or doubled ends it.

use anyhow::{Context, Result, ensure};
use ckpt_tests::cluster::{Cluster, Node};
use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

const PEER: &str = r#"
import socket, sys
if sys.argv[1] == "server":
    s = socket.create_server(("0.0.0.0", 4712))
    f = s.accept()[0].makefile("rwb")
    for line in f:
        f.write(b"%d\n" % (int(line) + 1)); f.flush()
else:
    f = socket.create_connection((sys.argv[2], 4712)).makefile("rwb")
    n = 0
    while True:
        f.write(b"%d\n" % n); f.flush()
        line = f.readline()
        assert int(line) == n + 1, (line, n)
        n += 1
        if n % 50 == 0:
            with open("/shared/count", "w") as out: out.write("%d\n" % n)
"#;

/// Two nodes, and the job on them.
struct Scene {
    cluster: Cluster,
}

impl Scene {
    fn start() -> Result<Self> {
        let scene = Self { cluster: Cluster::start(2)? };
        fs::write(scene.cluster.shared().join("peer.py"), PEER)?;
        scene.job(1, "server", "")?;
        scene.wait_for("the server", |scene| {
            let listening =
                scene.cluster.node(1).run(&["sh", "-c", "grep -q :1268 /proc/net/tcp && echo yes"]);
            listening.is_ok_and(|text| text == "yes")
        })?;
        scene.job(2, "client", "node1")?;
        scene.assert_running()?;
        Ok(scene)
    }

    /// Starts one side of the job, with no descriptor that leads out of it.
    fn job(&self, node: usize, role: &str, peer: &str) -> Result<()> {
        let python = format!("exec python3 /shared/peer.py {role} {peer} </dev/null >>/shared/log 2>&1");
        let close = "import os; os.closerange(3, 4096); os.environ['CKPT_JOB'] = 'pair'; os.setsid()";
        let start = format!("{close}; os.execvp('bash', ['bash', '-c', '{python}'])");
        let script = format!("python3 -c \"import os\nif os.fork() == 0:\n    {start}\"");
        self.cluster.node(node).run(&["bash", "-c", &script]).map(drop)
    }

    fn count(&self) -> u64 {
        let text = fs::read_to_string(self.cluster.shared().join("count")).unwrap_or_default();
        text.trim().parse().unwrap_or_default()
    }

    fn wait_for(&self, what: &str, condition: impl Fn(&Self) -> bool) -> Result<()> {
        let start = Instant::now();
        while !condition(self) {
            let log = fs::read_to_string(self.cluster.shared().join("log")).unwrap_or_default();
            ensure!(
                start.elapsed() < Duration::from_secs(60),
                "waited in vain for {what}; the job says: {log}"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// The client gets replies, and all of them were right.
    fn assert_running(&self) -> Result<()> {
        let before = self.count();
        self.wait_for("the client to go on", |scene| scene.count() > before)
    }

    fn ckpt(&self, words: &str, fault: &str) -> Command {
        let script = format!("CKPT_STORE=/shared/store CKPT_FAULT={fault} exec ckpt {words}");
        self.cluster.node(1).command(&["bash", "-c", &script])
    }

    fn run(&self, words: &str, fault: &str) -> Result<(i32, String)> {
        let output = self.ckpt(words, fault).output()?;
        Ok((code(&output), String::from_utf8_lossy(&output.stderr).into_owned()))
    }

    /// The store has so many checkpoints, all whole, and nothing else.
    fn assert_store(&self, checkpoints: u64) -> Result<()> {
        for number in 1..=checkpoints {
            let (code, text) = self.run(&format!("verify pair@{number}"), "")?;
            ensure!(code == 0, "verify pair@{number}: {text}");
        }
        let files = |directory: &str| -> Result<usize> {
            Ok(fs::read_dir(self.cluster.shared().join("store").join(directory))?.count())
        };
        let parts = 2 * checkpoints as usize;
        ensure!((files("parts")?, files("tmp")?) == (parts, 0), "parts or temporary files are left over");
        Ok(())
    }
}

fn code(output: &Output) -> i32 {
    use std::os::unix::process::ExitStatusExt;
    output.status.code().or(output.status.signal().map(|signal| 128 + signal)).unwrap_or_default()
}

const DUMP: &str = "dump --job pair --nodes node1,node2";

/// `kill -9` of either side, at the beginning and the end of every phase: the job runs on, the store
/// has only what was committed, the next dump works and clears up.
#[test]
fn every_kill_leaves_the_job_running() -> Result<()> {
    let scene = Scene::start()?;
    let mut committed = 0;
    for phase in ["plan", "arm", "cut", "settle", "run", "save", "commit"] {
        for point in [phase.to_owned(), format!("{phase}-end")] {
            for who in ["coordinator", "node1", "node2"] {
                let fault = format!("{who}:{point}:kill");
                let (code, text) = scene.run(DUMP, &fault)?;
                let exists = if who == "coordinator" { point == "commit-end" } else { phase == "commit" };
                // After the commit a lost agent is a warning.
                let fine = match (who, exists) {
                    ("coordinator", _) => code == 137,
                    (_, true) => code == 0,
                    (_, false) => code == 1,
                };
                ensure!(fine, "{fault}: exit code {code}: {text}");
                committed += u64::from(exists);
                scene.assert_running().with_context(|| format!("after {fault}"))?;
            }
        }
    }
    let (code, text) = scene.run(DUMP, "")?;
    ensure!(code == 0, "{text}");
    scene.assert_running()?;
    scene.assert_store(committed + 1)
}

/// `kill -9` of either side, at the beginning and the end of every phase of a restore: nothing half
/// built stays behind, and the next restore works.
#[test]
fn a_killed_restore_leaves_nothing_behind() -> Result<()> {
    let scene = Scene::start()?;
    let left = |scene: &Scene| -> String {
        let list = "for p in /proc/[0-9]*; do echo $(hostname) ${p#/proc/} $(cat $p/comm); done | \
                    grep -vE ' (1 |bash|sshd|cat|grep|hostname|ckpt-cluster)'; true";
        let nodes = scene.cluster.nodes().iter();
        nodes.map(|node| node.run(&["bash", "-c", list]).unwrap_or_default()).collect::<Vec<_>>().join(" ")
    };
    ensure!(left(&scene).matches("python3").count() == 2, "the look at the nodes does not see the job");
    let (code, text) = scene.run(&format!("{DUMP} --stop"), "")?;
    ensure!(code == 0, "{text}");
    scene.wait_for("the end of the job", |scene| left(scene).trim().is_empty())?;
    for phase in ["plan", "build", "connect", "release"] {
        for point in [phase.to_owned(), format!("{phase}-end")] {
            for who in ["coordinator", "node1", "node2"] {
                let fault = format!("{who}:{point}:kill");
                let (code, text) = scene.run("restore pair", &fault)?;
                ensure!(
                    code == if who == "coordinator" { 137 } else { 1 },
                    "{fault}: exit code {code}: {text}"
                );
                if point == "release-end" {
                    // What was released runs; nobody is left who knows more. Only then.
                    for node in scene.cluster.nodes() {
                        node.run(&["bash", "-c", "kill -9 $(pgrep -x python3) 2>/dev/null; true"])?;
                    }
                }
                let empty = scene.wait_for("an empty node", |scene| left(scene).trim().is_empty());
                empty.with_context(|| format!("after {fault}: {}", left(&scene)))?;
            }
        }
    }
    let (code, text) = scene.run("restore pair", "")?;
    ensure!(code == 0, "{text}");
    scene.assert_running()
}

/// Ctrl-C while the job is frozen: it is let go, and the exit code says what happened.
#[test]
fn an_interrupted_dump_lets_the_job_go() -> Result<()> {
    let scene = Scene::start()?;
    // The node hangs with the job frozen; the coordinator waits for it.
    let script = format!(
        "CKPT_STORE=/shared/store CKPT_FAULT=node2:settle:hang ckpt {DUMP} & \
         sleep 3; before=$(cat /shared/count); sleep 0.5; cmp -s /shared/count - <<< $before && echo frozen; \
         kill -INT $!; wait $!; echo code $?"
    );
    let output = scene.cluster.node(1).command(&["bash", "-c", &script]).output()?;
    let (text, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(text == "frozen\ncode 130\n", "{text}{errors}");
    ensure!(errors.contains("error: interrupted\nnote: the job runs on, the store is unchanged"), "{errors}");
    scene.assert_running()?;
    let (code, text) = scene.run(DUMP, "")?;
    ensure!(code == 0, "{text}");
    scene.assert_store(1)
}

/// Errors that a script must tell apart.
#[test]
fn exit_codes() -> Result<()> {
    let scene = Scene::start()?;
    let expect = |words: &str, fault: &str, expected: i32, says: &str| -> Result<()> {
        let (code, text) = scene.run(words, fault)?;
        ensure!(
            code == expected && text.contains(says),
            "{words}: exit code {code}, expected {expected}: {text}"
        );
        Ok(())
    };
    expect("ls", "", 10, "there is no checkpoint store at /shared/store")?;
    expect("dump --job nobody --nodes node1,node2", "", 1, "no process of job nobody was found on 2 nodes")?;
    expect("dump --job pair --nodes node1,nowhere", "", 1, "nowhere")?;
    expect("dump --job pair", "", 4, "TCP connection")?;
    expect("dump --job pair --allow outside-tcp --name half", "", 3, "note: left out: node1")?;
    expect(DUMP, "", 0, "")?;
    expect("restore pair@7", "", 1, "job pair has no checkpoint 7, the latest is 1")?;
    expect("restore pair --place node9=node1", "", 2, "node9 is not part of the checkpoint")?;
    expect("dump --job pair --nodes n[1-", "", 2, "brackets do not match")?;
    // A dump that hangs holds the lock; when it is gone, the lock is, too.
    let mut holder = scene.ckpt(DUMP, "coordinator:save:hang").stdout(Stdio::null()).spawn()?;
    let tmp = scene.cluster.shared().join("store/tmp");
    scene.wait_for("the lock", |_| fs::read_dir(&tmp).is_ok_and(|entries| entries.count() > 0))?;
    expect(DUMP, "", 11, "another dump of job pair is under way")?;
    holder.kill()?;
    holder.wait()?;
    scene.cluster.node(1).run(&["bash", "-c", "kill -9 $(pgrep -f '^ckpt dump') || true"])?;
    scene.assert_running()?;
    // An unprivileged user can dump nothing, and nothing happens to the job.
    let unprivileged = "CKPT_STORE=/tmp/own exec setpriv --reuid=65534 --regid=65534 --clear-groups \
                        ckpt dump --pid $(pgrep -x python3) --allow outside-tcp";
    let output = scene.cluster.node(1).command(&["bash", "-c", unprivileged]).output()?;
    let text = String::from_utf8_lossy(&output.stderr);
    ensure!(code(&output) == 5, "exit code {} without privileges: {text}", code(&output));
    let in_roots_store = unprivileged.replace("CKPT_STORE=/tmp/own ", "");
    let output = scene.cluster.node(1).command(&["bash", "-c", &in_roots_store]).output()?;
    let text = String::from_utf8_lossy(&output.stderr);
    ensure!(code(&output) == 5 && text.contains("run ckpt as root"), "exit code {}: {text}", code(&output));
    scene.assert_running()?;
    // Damage: a flipped byte in the middle of every pack; there are those of two checkpoints.
    for pack in fs::read_dir(scene.cluster.shared().join("store/packs"))? {
        let pack: PathBuf = pack?.path();
        let mut bytes = fs::read(&pack)?;
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(&pack, bytes)?;
    }
    expect("verify pair@1", "", 12, "has a wrong checksum")
}

/// A store on a file system that is full: the dump fails, the job runs on, nothing is left over,
/// and with room again the next dump works.
#[test]
fn a_full_disk_costs_nothing_but_the_checkpoint() -> Result<()> {
    let cluster = Cluster::start(1)?;
    let node: &Node = cluster.node(1);
    let script = r#"
        set -e
        mkdir -p /tmp/small; mount -t tmpfs -o size=2m tmpfs /tmp/small
        export CKPT_STORE=/tmp/small/store
        cat > /tmp/busy.py <<'END'
import os, time
os.closerange(3, 4096)
data = os.urandom(16 << 20); n = 0
while True:
    n += 1
    with open("/tmp/count", "w") as out: out.write(str(n))
    time.sleep(0.01)
END
        setsid python3 /tmp/busy.py </dev/null >/dev/null 2>&1 & pid=$!
        sleep 1
        set +e
        ckpt dump --pid $pid --name busy; echo "code $?"
        echo "left $(ls /tmp/small/store/packs /tmp/small/store/parts /tmp/small/store/tmp | grep -c '\.')"
        before=$(cat /tmp/count); sleep 0.3; [ "$(cat /tmp/count)" != "$before" ] && echo runs
        mount -o remount,size=100m /tmp/small
        ckpt dump --pid $pid --name busy && ckpt verify busy; echo "code $?"
        before=$(cat /tmp/count); sleep 0.3; [ "$(cat /tmp/count)" != "$before" ] && echo runs
        kill $pid
    "#;
    let output = node.command(&["bash", "-c", script]).output()?;
    let (text, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let lines: Vec<_> =
        text.lines().filter(|line| !line.starts_with("Saved") && !line.contains(" is whole")).collect();
    ensure!(lines == ["code 1", "left 0", "runs", "code 0", "runs"], "{text}{errors}");
    ensure!(
        errors.contains("No space left on device") && errors.contains("hint: the storage is full"),
        "{errors}"
    );
    Ok(())
}
