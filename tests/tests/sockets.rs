//! One process with sockets in every state, through the whole product: it finds them as it left them, on the same
//! node and on another one.

use anyhow::{Result, ensure};
use ckpt_tests::cluster::Cluster;
use ckpt_tests::job::Job;
use std::fs;
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
