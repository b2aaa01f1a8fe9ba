//! `demo`: a distributed job lives through a dump that it does not notice, and through its end and
//! a restore with one of its parts on another node.

use crate::cluster::target;
use crate::command::{as_root, cargo, repository, run as show_and_run, shown};
use crate::setup;
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Stdio};
use std::time::{Duration, Instant};

/// How long the demo waits for something that should happen soon.
const PATIENCE: Duration = Duration::from_secs(60);
/// As seen in the nodes.
const STORE: &str = "/shared/store";
/// INCRs that the client makes between two steps.
const PROGRESS: u64 = 5_000;
/// Options of both servers. No persistence: what survives, survives in memory.
const REDIS: &str = "--bind '*' '-::*' --protected-mode no --save '' --repl-diskless-sync-delay 0";

/// Sets up, builds, and shows the whole path once.
///
/// # Errors
/// Something cannot be built or started, or a check fails.
pub(crate) fn run() -> Result<()> {
    setup::packages()?;
    show_and_run(cargo().args(["build", "--release", "--package", "ckpt-cli", "--package", "ckpt-tests"]))?;
    let mut demo = Demo { nodes: Nodes::start(3)?, checks: Vec::new(), waits: 0, failed: 0 };
    let result = demo.show();
    if result.is_err() || demo.failed > 0 {
        demo.logs();
    }
    drop(demo.nodes);
    result.context("the demo failed")?;
    println!();
    for check in &demo.checks {
        println!("{check}");
    }
    ensure!(demo.failed == 0, "the demo failed: {} of {} checks", demo.failed, demo.checks.len());
    println!("VERDICT: passed, all {} checks", demo.checks.len());
    Ok(())
}

struct Demo {
    nodes: Nodes,
    checks: Vec<String>,
    failed: usize,
    /// Long waits of the client that have been looked at.
    waits: usize,
}

impl Demo {
    fn show(&mut self) -> Result<()> {
        title("A job on two nodes: redis on node1, its replica and a checking client on node2");
        self.start()?;
        let before = self.info("node1", "stats")?;
        self.progress("the client counts")?;
        self.longest_wait()?;

        title("A checkpoint of the running job");
        let taken = self.ckpt(&["dump", "--job", "shop", "--nodes", "node[1-2]"])?;
        let running = self.progress("the client goes on after the dump");
        self.check(running, "the client did not notice the first dump: no error, no gap");
        let wait = self.longest_wait()?;
        self.numbers("shop@1", &taken)?;
        println!("longest wait of the client around the dump: {wait}");

        title("A checkpoint of the running job, and its end");
        let taken = self.ckpt(&["dump", "--job", "shop", "--nodes", "node[1-2]", "--stop"])?;
        let count = self.client()?["count"].as_u64();
        self.check(self.gone(), "nothing of the job runs on any node");
        self.numbers("shop@2", &taken)?;

        title("The job again: the replica and the client on node3");
        let restored = self.ckpt(&["restore", "shop", "--place", "node2=node3"])?;
        println!("restored in {:.0} ms", restored.as_secs_f64() * 1e3);
        println!("the client had reported {} replies before the end", count.unwrap_or(0));
        let running = self.progress("the client goes on after the restore");
        self.check(running, "the client goes on after the restore: no error, no gap");
        let place = self.nodes.output("node3", "pgrep -f client.py && ! ssh node2 pgrep -f client.py");
        self.check(place.map(drop), "replica and client are on node3 now");
        println!("longest wait of the client, dump to restore: {}", self.longest_wait()?);

        self.check(self.end(), "the client ends without an error");
        self.check(self.full_syncs(&before), "the replica was not synchronized from the beginning again");
        self.check(self.agree(), "master, replica and client have the same count and offsets");
        self.check(self.verify(), "`ckpt verify` finds both checkpoints whole");
        Ok(())
    }

    /// Starts the job and waits until the replica has everything.
    fn start(&self) -> Result<()> {
        let shared = self.nodes.folder.join("shared");
        let script = shared.join("client.py");
        fs::copy(repository().join("xtask/workloads/client.py"), &script)
            .with_context(|| format!("write {}", script.display()))?;
        self.launch("node1", "master", &format!("redis-server --dir /shared/master {REDIS}"))?;
        until("redis answers on node1", || Ok(self.redis("node1", "PING")? == "PONG"))?;
        let replica = format!("redis-server --dir /shared/replica --replicaof node1 6379 {REDIS}");
        self.launch("node2", "replica", &replica)?;
        until("the replica is in sync", || {
            Ok(self.redis("node2", "INFO replication")?.contains("link_status:up"))
        })?;
        let client = "/usr/bin/python3 /shared/client.py node1 /shared/client.json /shared/stop";
        self.launch("node2", "client", client)?;
        until("the client reports", || Ok(self.client().is_ok()))
    }

    /// Starts a part of the job, in a session of its own, a child of the node's init. redis writes
    /// its title over its environment; it belongs to the job as a child of the shell with the mark.
    fn launch(&self, node: &str, name: &str, program: &str) -> Result<()> {
        let script = format!(
            "mkdir -p /shared/{name}; cd /; exec 0</dev/null 1>/shared/{name}.log 2>&1; \
             CKPT_JOB=shop exec setsid -f sh -c \"{program}; exit\""
        );
        println!("{node}$ CKPT_JOB=shop {program}");
        self.nodes.output(node, &script).map(drop)
    }

    /// Runs `ckpt` on node1, shows what a person would see, and gives the time it took.
    fn ckpt(&self, arguments: &[&str]) -> Result<Duration> {
        let command = format!("ckpt --store {STORE} {}", arguments.join(" "));
        println!("node1$ {command}");
        let start = Instant::now();
        println!("{}", self.nodes.output("node1", &command)?);
        Ok(start.elapsed())
    }

    /// Pause and sizes of a checkpoint, as its manifest has them.
    fn numbers(&self, name: &str, took: &Duration) -> Result<()> {
        let text =
            self.nodes.output("node1", &format!("ckpt --store {STORE} --json show {name} --phases"))?;
        let document: Value = serde_json::from_str(&text).context("output of ckpt show")?;
        let checkpoint = &document["checkpoint"];
        let ms = |us: &Value| us.as_f64().unwrap_or(0.0) / 1e3;
        let phases: Vec<String> = document["phases"]
            .as_array()
            .into_iter()
            .flatten()
            .map(|phase| format!("{} {:.1} ms", phase["phase"].as_str().unwrap_or("?"), ms(&phase["us"])))
            .collect();
        let stored = checkpoint["stored_bytes"].as_f64().unwrap_or(0.0) / f64::from(1 << 20);
        let pause = match checkpoint["paused_us"].as_u64() {
            Some(0) | None => String::from("not let run again"),
            Some(_) => format!("paused {:.1} ms", ms(&checkpoint["paused_us"])),
        };
        println!("{name}: {pause}, {stored:.1} MiB stored, {:.0} ms in all", took.as_secs_f64() * 1e3);
        println!("{name}: {}", phases.join(", "));
        Ok(())
    }

    /// What the client last reported, if nothing went wrong there.
    fn client(&self) -> Result<Value> {
        let path = self.nodes.folder.join("shared/client.json");
        let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        let report: Value = serde_json::from_str(&text).context("the client's report")?;
        match report["error"].as_str() {
            Some(error) => bail!("the client failed {error}"),
            None => Ok(report),
        }
    }

    /// Waits until the client has made some more INCRs.
    fn progress(&self, what: &str) -> Result<()> {
        let count = || Ok::<u64, anyhow::Error>(self.client()?["count"].as_u64().unwrap_or(0));
        let start = count()?;
        until(what, || Ok(count()? >= start + PROGRESS))
    }

    /// The longest wait since the last time this was asked.
    fn longest_wait(&mut self) -> Result<String> {
        let report = self.client()?;
        let waits = report["longest_ms"].as_array().cloned().unwrap_or_default();
        let new = waits.get(self.waits..).unwrap_or_default().iter().filter_map(|wait| wait[1].as_f64());
        let longest = new.fold(0.0, f64::max);
        self.waits = waits.len();
        Ok(if longest == 0.0 { "below 3 ms".into() } else { format!("{longest} ms") })
    }

    fn redis(&self, node: &str, command: &str) -> Result<String> {
        self.nodes.output(node, &format!("redis-cli {command}"))
    }

    /// A section of a server's INFO.
    fn info(&self, node: &str, section: &str) -> Result<String> {
        self.redis(node, &format!("INFO {section}"))
    }

    fn gone(&self) -> Result<()> {
        for node in ["node1", "node2", "node3"] {
            let left = "pgrep -a 'redis|python'; grep -lsxz CKPT_JOB=shop /proc/[0-9]*/environ; true";
            until(&format!("the job's end on {node}"), || Ok(self.nodes.output(node, left)?.is_empty()))?;
        }
        Ok(())
    }

    /// Tells the client to end, and waits for its last report.
    fn end(&self) -> Result<()> {
        fs::write(self.nodes.folder.join("shared/stop"), "").context("write the stop file")?;
        until("the client's end", || Ok(self.client()?["done"] == Value::Bool(true)))
    }

    fn full_syncs(&self, before: &str) -> Result<()> {
        let after = self.info("node1", "stats")?;
        for name in ["sync_full", "sync_partial_ok", "sync_partial_err"] {
            let (before, after) = (field(before, name)?, field(&after, name)?);
            println!("{name} of the master: {before} before, {after} after");
            // A connection that was never lost needs no partial synchronization either.
            ensure!(before == after, "{name} was {before} and is {after}");
        }
        let link = field(&self.info("node3", "replication")?, "master_link_status")?;
        ensure!(link == "up", "the replica's link is {link}");
        Ok(())
    }

    fn agree(&self) -> Result<()> {
        let count = self.client()?["count"].to_string();
        // The last writes, or a ping of the master, may be on their way.
        let mut seen = String::new();
        let agree = until("master and replica agree", || {
            let value = |node| self.redis(node, "GET counter");
            let (master, replica) = (self.info("node1", "replication")?, self.info("node3", "replication")?);
            let offsets = (field(&master, "master_repl_offset")?, field(&replica, "slave_repl_offset")?);
            let values = (value("node1")?, value("node3")?);
            seen = format!(
                "counter: {} on node1, {} on node3, {count} at the client; offsets: {} and {}",
                values.0, values.1, offsets.0, offsets.1
            );
            Ok(values == (count.clone(), count.clone()) && offsets.0 == offsets.1)
        });
        println!("{seen}");
        agree
    }

    fn verify(&self) -> Result<()> {
        for name in ["shop@1", "shop@2"] {
            self.ckpt(&["verify", name])?;
        }
        Ok(())
    }

    /// Notes a check. A failed one does not end the demo here: the rest may tell why.
    fn check(&mut self, result: Result<()>, what: &str) {
        match result {
            Ok(()) => self.checks.push(format!("ok      {what}")),
            Err(error) => {
                self.failed += 1;
                self.checks.push(format!("FAILED  {what}: {error:#}"));
            }
        }
        println!("{}", self.checks[self.checks.len() - 1]);
    }

    /// What the parts of the job have said, after a failure.
    fn logs(&self) {
        for name in ["master.log", "replica.log", "client.log"] {
            let text = fs::read_to_string(self.nodes.folder.join("shared").join(name)).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            eprintln!("--- {name}\n{}", lines[lines.len().saturating_sub(15)..].join("\n"));
        }
    }
}

/// The value of a line `name:value`.
fn field(info: &str, name: &str) -> Result<String> {
    let line = info.lines().find_map(|line| line.trim().strip_prefix(name)?.strip_prefix(':'));
    Ok(line.with_context(|| format!("redis does not tell {name}"))?.to_owned())
}

fn title(text: &str) {
    println!("\n== {text}");
}

/// Waits for a condition. An error of its own is one more reason to wait.
fn until(what: &str, mut condition: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match condition() {
            Ok(true) => return Ok(()),
            Err(error) if Instant::now() > deadline => {
                return Err(error.context(format!("{what}: not within {PATIENCE:?}")));
            }
            Ok(false) if Instant::now() > deadline => bail!("{what}: not within {PATIENCE:?}"),
            _ => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

/// The test nodes. They end with this value, and with this process.
struct Nodes {
    tool: PathBuf,
    folder: PathBuf,
    owner: Child,
    alive: Option<ChildStdin>,
}

impl Nodes {
    fn start(count: usize) -> Result<Self> {
        let tool = target().join("release/ckpt-cluster");
        let mut command = as_root(tool.to_str().context("path of the build folder")?);
        command.args(["own", "--attached", &count.to_string()]);
        eprintln!("+ {}", shown(&command));
        let mut owner = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start the test nodes")?;
        let mut line = String::new();
        BufReader::new(owner.stdout.take().context("no standard output")?).read_line(&mut line)?;
        ensure!(!line.is_empty(), "the test nodes do not come up");
        let alive = owner.stdin.take();
        Ok(Self { tool, folder: Path::new(line.trim()).to_owned(), owner, alive })
    }

    /// Standard output of a shell script that runs in a node and is to succeed, trimmed.
    fn output(&self, node: &str, script: &str) -> Result<String> {
        let name = self.folder.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let name = name.strip_prefix("ckpt-cluster-").context("name of the cluster")?;
        let mut command = as_root(self.tool.to_str().context("path of the build folder")?);
        command.args(["exec", name, node, "sh", "-c", script]).stdin(Stdio::null());
        let output = command.output().with_context(|| format!("cannot run a command on {node}"))?;
        let error = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{node}$ {script}: {}\n{}", output.status, error.trim_end());
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }
}

impl Drop for Nodes {
    fn drop(&mut self) {
        drop(self.alive.take());
        // Nothing can be done here about nodes that do not end.
        let _ = self.owner.wait();
    }
}
