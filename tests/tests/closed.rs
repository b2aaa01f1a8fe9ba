//! Ends of TCP connections that no process has any more: the other end, on another node, still gets what was sent
//! before, and then the end of the stream. And: what watches over sockets while they are captured.

use anyhow::{Result, ensure};
use ckpt_tests::cluster::Cluster;
use std::fs;
use std::time::{Duration, Instant};

/// `server` sends and closes; `client` has everything in its queue, reads it only when it is told to, and then writes.
const PEER: &str = r#"
import os, socket, sys, time
def say(name, text):
    with open("/shared/" + name + ".new", "w") as out: out.write(text)
    os.rename("/shared/" + name + ".new", "/shared/" + name)
if sys.argv[1] == "server":
    s = socket.create_server(("0.0.0.0", 4713))
    say("listening", "yes")
    c = s.accept()[0]
    c.sendall(b"last words" * 1000); c.close()
    say("closed", "yes")
    while True: time.sleep(0.1)
s = socket.create_connection((sys.argv[2], 4713))
while not os.path.exists("/shared/closed"): time.sleep(0.01)
time.sleep(0.2); say("ready", "yes")
while not os.path.exists("/shared/go"): time.sleep(0.01)
data = b""
s.settimeout(20)
while piece := s.recv(999): data += piece
say("result", "complete" if data == b"last words" * 1000 else repr(data))
"#;

struct Scene(Cluster);

impl Scene {
    fn job(&self, node: usize, role: &str, peer: &str) -> Result<()> {
        let script = format!(
            "cd /; exec 0</dev/null 1>/dev/null 2>>/shared/log; \
             CKPT_JOB=closed exec setsid -f python3 /shared/peer.py {role} {peer}"
        );
        self.0.node(node).run(&["sh", "-c", &script]).map(drop)
    }

    fn wait(&self, name: &str) -> Result<String> {
        let start = Instant::now();
        loop {
            if let Ok(text) = fs::read_to_string(self.0.shared().join(name)) {
                return Ok(text);
            }
            let log = fs::read_to_string(self.0.shared().join("log")).unwrap_or_default();
            ensure!(
                start.elapsed() < Duration::from_secs(40),
                "waited in vain for {name}; the job says: {log}"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn start() -> Result<Self> {
        let scene = Self(Cluster::start(2)?);
        fs::write(scene.0.shared().join("peer.py"), PEER)?;
        scene.job(1, "server", "")?;
        scene.wait("listening")?;
        scene.job(2, "client", "node1")?;
        scene.wait("ready")?;
        Ok(scene)
    }

    fn ckpt(&self, arguments: &[&str]) -> Result<()> {
        self.0.node(1).run(&[&["ckpt", "--store", "/shared/store"], arguments].concat()).map(drop)
    }
}

#[test]
fn a_closed_end_on_another_node_is_closed_again() -> Result<()> {
    let scene = Scene::start()?;
    scene.ckpt(&["dump", "--job", "closed", "--nodes", "node[1-2]", "--stop"])?;
    scene.ckpt(&["restore", "closed", "--place", "node1=node2", "--place", "node2=node1"])?;
    fs::write(scene.0.shared().join("go"), "")?;
    let result = scene.wait("result")?;
    ensure!(result == "complete", "the client got {result}");
    // The closed end is in TIME_WAIT now, where the server listens: that must not be in its way.
    scene.ckpt(&["dump", "--job", "closed", "--nodes", "node[1-2]", "--stop"])?;
    scene.ckpt(&["restore", "closed"])?;
    Ok(())
}

/// On the node of a hanging agent: as if it were in the middle of a capture, the client's socket goes into repair
/// mode; then the agent is killed.
const KILL: &str = r#"
import ctypes, os, re, socket, time
def read(path):
    try:
        with open(path) as file: return file.read()
    except OSError: return ""
def comm(pid): return read("/proc/%d/comm" % pid).strip()
def parent(pid): return int((re.findall(r"PPid:\t(\d+)", read("/proc/%d/status" % pid)) or ["0"])[0])
pids = lambda: [int(p) for p in os.listdir("/proc") if p.isdigit()]
agents = lambda: [p for p in pids() if comm(p) == "ckpt"]
client = [p for p in pids() if comm(p) == "python3" and p != os.getpid()][0]
stopped = lambda: "tracing stop" in read("/proc/%d/status" % client)
end = time.time() + 30
# The agent, and the guard that it has forked. Before the cut the job is stopped for short looks.
since = time.time()
while time.time() < end and time.time() - since < 1:
    if not (stopped() and len(agents()) == 2): since = time.time()
    time.sleep(0.02)
fd = [f for f in os.listdir("/proc/%d/fd" % client) if os.readlink("/proc/%d/fd/%s" % (client, f)).startswith("socket")][0]
own = ctypes.CDLL(None).syscall(438, os.pidfd_open(client), int(fd), 0)
s = socket.socket(fileno=own)
s.setsockopt(6, 19, 1)
assert s.getsockopt(6, 19) == 1 and stopped()
agent = [p for p in agents() if parent(p) not in agents()][0]
os.kill(agent, 9)
while (s.getsockopt(6, 19) == 1 or agents()) and time.time() < end: time.sleep(0.01)
print("repair mode", s.getsockopt(6, 19), "guards", len(agents()), "stopped", stopped())
"#;

#[test]
fn a_killed_agent_leaves_no_socket_in_repair_mode() -> Result<()> {
    let scene = Scene::start()?;
    fs::write(scene.0.shared().join("kill.py"), KILL)?;
    let script =
        "CKPT_FAULT=node2:cut-end:hang ckpt --store /shared/store dump --job closed --nodes node[1-2]";
    let mut dump = scene.0.node(1).command(&["sh", "-c", script]).spawn()?;
    let text = scene.0.node(2).run(&["python3", "/shared/kill.py"]);
    let status = dump.wait()?;
    let text = text?;
    ensure!(text.trim() == "repair mode 0 guards 0 stopped False", "{text}");
    ensure!(!status.success(), "the dump goes on without its agent");
    fs::write(scene.0.shared().join("go"), "")?;
    let result = scene.wait("result")?;
    ensure!(result == "complete", "the client got {result}");
    Ok(())
}
