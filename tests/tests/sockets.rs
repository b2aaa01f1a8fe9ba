//! One process with sockets in every state, through the whole product: it finds them as it left them, on the same
//! node and on another one.

use anyhow::{Result, ensure};
use ckpt_tests::cluster::Cluster;
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
