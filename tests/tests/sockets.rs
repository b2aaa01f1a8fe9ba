//! One process with sockets in every state, through the whole product: it finds them as it left them, on the same
//! node and on another one.

use anyhow::{Result, ensure};
use ckpt_tests::cluster::Cluster;
use ckpt_tests::job::Job;
use std::fs;
use std::io::Write as _;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::{Duration, Instant};

fn wait(what: &str, mut condition: impl FnMut() -> bool) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !condition() {
        ensure!(Instant::now() < deadline, "{what}: not within a minute");
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

#[test]
fn sockets_of_every_state_come_back() -> Result<()> {
    let cluster = Cluster::start(2)?;
    let (one, two) = (cluster.node(1), cluster.node(2));
    let file = |name: &str| cluster.shared().join(name);
    let script = format!(
        "cd /; exec 0</dev/null 1>/dev/null 2>/shared/error; CKPT_JOB=sockets exec setsid -f \
         /run/node/target/ckpt-sockets {} {} /shared/ready /shared/verify /shared/result",
        one.ip4, one.ip6
    );
    one.run(&["sh", "-c", &script])?;
    let ready = wait("set up", || file("ready").exists());
    ensure!(ready.is_ok(), "{}", fs::read_to_string(file("error"))?);
    let ckpt = ["ckpt", "--store", "/shared/store"];
    // Left running, ended and restored on its node, ended and restored on the other one.
    one.run(&[&ckpt[..], &["dump", "--job", "sockets", "--nodes", "node1"]].concat())?;
    one.run(&[&ckpt[..], &["dump", "--job", "sockets", "--nodes", "node1", "--stop"]].concat())?;
    one.run(&[&ckpt[..], &["restore", "sockets"]].concat())?;
    one.run(&[&ckpt[..], &["dump", "--job", "sockets", "--nodes", "node1", "--stop"]].concat())?;
    one.run(&[&ckpt[..], &["restore", "sockets", "--place", "node1=node2"]].concat())?;
    ensure!(!two.run(&["pgrep", "-f", "ckpt-sockets"])?.is_empty(), "not on the other node");
    fs::write(file("verify"), "")?;
    wait("the checks", || file("result").exists())?;
    let result = fs::read_to_string(file("result"))?;
    ensure!(result == "pass", "{result}");
    Ok(())
}

/// Clients that connect, say a line, read it back and close, again and again.
const CHURN: &str = r#"
import os, socket, threading
server = socket.create_server(("127.0.0.1", 0), backlog=64)
def serve():
    while True:
        c = server.accept()[0]
        with c: c.sendall(c.recv(100))
def visit():
    while not os.path.exists("enough"):
        with socket.create_connection(server.getsockname()) as c:
            c.sendall(b"hello")
            got = c.recv(100)
            if got != b"hello": print("got", got, flush=True)
for _ in range(2): threading.Thread(target=serve, daemon=True).start()
visitors = [threading.Thread(target=visit) for _ in range(3)]
for t in visitors: t.start()
for t in visitors: t.join()
print("pass", flush=True)
"#;

/// Two looks at them hardly ever agree. Only what the cut finds counts: nothing is left out (which `ckpt` would say
/// with its exit code), nothing breaks.
#[test]
fn connections_that_come_and_go_are_no_obstacle() -> Result<()> {
    let mut job = Job::new("churn")?;
    fs::write(job.path("churn.py"), CHURN)?;
    job.start(&["/usr/bin/python3", "churn.py"])?;
    for round in 0..6 {
        job.pause(150);
        match round % 3 {
            2 => job.cycle()?,
            _ => job.dump(false).map(drop)?,
        }
    }
    fs::write(job.path("enough"), "")?;
    job.wait()?;
    ensure!(job.output()? == "pass\n", "{}", job.output()?);
    Ok(())
}

/// Clients that connect to a server with a process for each connection, as a database has them, by Unix sockets; and some
/// that connect to a server outside the job, if it is told where.
const UNIX_CHURN: &str = r#"
import os, socket, sys, threading, time
path = os.path.abspath("server"); outside = sys.argv[1:]
server = socket.socket(socket.AF_UNIX); server.bind(path); server.listen(64)
if os.fork() == 0:
    import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        c = server.accept()[0]
        if os.fork() == 0:
            c.sendall(c.recv(100)); os._exit(0)
        c.close()
server.close()
def visit():
    while not os.path.exists("enough"):
        with socket.socket(socket.AF_UNIX) as c:
            c.connect(path); c.sendall(b"hello"); got = c.recv(100)
            if got != b"hello": print("got", got, flush=True)
def visit_outside():
    while not os.path.exists("enough"):
        with socket.socket(socket.AF_UNIX) as c:
            try:
                c.connect(outside[0]); c.sendall(b"hello"); c.recv(100)
            except (BrokenPipeError, ConnectionError): pass
        time.sleep(0.003)
visitors = [threading.Thread(target=visit) for _ in range(3)] + [threading.Thread(target=visit_outside) for _ in outside]
for t in visitors: t.start()
print("ready", flush=True)
for t in visitors: t.join()
print("pass", flush=True)
os.system("kill $(ps -o pid= --ppid %d)" % os.getpid())
"#;

fn unix_churn(job: &mut Job, arguments: &[&str], allow: &[&str]) -> Result<()> {
    fs::write(job.path("churn.py"), UNIX_CHURN)?;
    job.start(&[&["/usr/bin/python3", "churn.py"], arguments].concat())?;
    job.until_output("ready")?;
    let pid = job.pid().to_string();
    for round in 0..12 {
        job.pause(60);
        let stop: &[&str] = if round % 3 == 2 { &["--stop"] } else { &[] };
        let arguments = [&["dump", "--pid", &pid, "--name", job.name()], allow, stop].concat();
        let output = job.ckpt(&arguments)?;
        // 3: parts are left out, as allowed.
        let done = output.status.success() || (!allow.is_empty() && output.status.code() == Some(3));
        ensure!(done, "{}", String::from_utf8_lossy(&output.stderr));
        if !stop.is_empty() {
            job.until("the job is gone", || Ok(!Path::new(&format!("/proc/{pid}")).exists()))?;
            job.restore()?;
        }
    }
    fs::write(job.path("enough"), "")?;
    job.wait()?;
    ensure!(job.output()? == "ready\npass\n", "{}", job.output()?);
    Ok(())
}

#[test]
fn unix_connections_that_come_and_go_are_no_obstacle() -> Result<()> {
    unix_churn(&mut Job::new("unix-churn")?, &[], &[])
}

/// Such a connection is made after the plan, and is there at the cut: what is saved can be restored.
#[test]
fn unix_connections_out_of_the_job_that_come_and_go() -> Result<()> {
    let mut job = Job::new("unix-outside")?;
    let path = job.path("outside");
    let listener = UnixListener::bind(&path)?;
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let Ok(mut client) = client else { return };
            std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(2));
                let _ = client.write_all(b"hello");
            });
        }
    });
    unix_churn(&mut job, &[&path.display().to_string()], &["--allow", "outside-unix"])
}

/// What cannot be saved, opened for a moment again and again: as by getaddrinfo(3), which asks the kernel by netlink.
const UNSUPPORTED: &str = r#"
import ctypes, os, socket, threading, time
libc = ctypes.CDLL(None)
def netlink(): return [socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0).detach()]
def watch(): return [libc.inotify_init1(0)]
def terminal(): return list(os.openpty())
def again(make):
    while not os.path.exists("enough"):
        fds = make()
        time.sleep(0.001)
        for fd in fds: os.close(fd)
        time.sleep(0.02)
threads = [threading.Thread(target=again, args=[make]) for make in (netlink, watch, terminal)]
for t in threads: t.start()
for t in threads: t.join()
print("pass", flush=True)
"#;

#[test]
fn what_is_open_for_a_moment_is_no_obstacle() -> Result<()> {
    let mut job = Job::new("moments")?;
    fs::write(job.path("moments.py"), UNSUPPORTED)?;
    job.start(&["/usr/bin/python3", "moments.py"])?;
    for round in 0..12 {
        job.pause(60);
        match round % 4 {
            3 => job.cycle()?,
            _ => job.dump(false).map(drop)?,
        }
    }
    fs::write(job.path("enough"), "")?;
    job.wait()?;
    ensure!(job.output()? == "pass\n", "{}", job.output()?);
    Ok(())
}
