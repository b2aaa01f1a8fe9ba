//! The keeper: makes the switch and the nodes, and ends all of it.

use super::network::{MAX_NODES, Subnet};
use super::{Description, Node, SHARED, node, report, ssh, tool};
use anyhow::{Context, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::SignalFd;
use nix::unistd::{Pid, getpid, setsid};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};

/// Makes a cluster, says `ready`, and ends it on SIGTERM or, unless `detached`, when standard
/// input is closed.
///
/// # Errors
/// A node does not come up. Then everything is ended, too.
pub fn keep(dir: &Path, count: usize, detached: bool) -> Result<()> {
    setsid()?;
    let mut end = SigSet::empty();
    end.add(Signal::SIGTERM);
    end.thread_block()?;
    let signals = SignalFd::new(&end)?;

    let mut doors = Vec::new();
    let started = start(dir, count, &mut doors);
    if started.is_ok() {
        report("ready")?;
        let stdin = std::io::stdin();
        let mut ends = vec![PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
        if !detached {
            ends.push(PollFd::new(stdin.as_fd(), PollFlags::POLLIN));
        }
        while matches!(poll(&mut ends, PollTimeout::NONE), Err(nix::errno::Errno::EINTR)) {}
    }
    for door in &mut doors {
        door.end()?;
    }
    if started.is_ok() {
        // Only after a success: otherwise the logs say why.
        fs::remove_dir_all(dir).with_context(|| format!("remove {}", dir.display()))?;
    }
    // Until here the subnet was ours.
    started.map(drop)
}

fn start(dir: &Path, count: usize, doors: &mut Vec<Door>) -> Result<Subnet> {
    if !(1..=MAX_NODES).contains(&count) {
        bail!("a cluster has 1 to {MAX_NODES} nodes, not {count}");
    }
    fs::set_permissions(dir, fs::Permissions::from_mode(0o755))?;
    let shared = dir.join(SHARED);
    fs::create_dir(&shared)?;
    fs::set_permissions(&shared, fs::Permissions::from_mode(0o1777))?;
    let subnet = Subnet::claim()?;
    subnet.make_switch()?;
    let name = |number: usize| format!("node{number}");
    let mut nodes: Vec<Node> = (1..=count)
        .map(|n| Node { name: name(n), ip4: subnet.ip4(n), ip6: subnet.ip6(n), init: 0 })
        .collect();
    ssh::prepare(dir, getpid().as_raw(), &nodes)?;
    for one in &nodes {
        node::prepare(dir, one, &nodes)?;
        doors.push(Door::open(dir, &one.name)?);
    }
    for (index, (one, door)) in nodes.iter_mut().zip(doors.iter_mut()).enumerate() {
        one.init = door.read()?.parse().with_context(|| format!("start {}", one.name))?;
        door.init = Some(Pid::from_raw(one.init));
        subnet.plug(index + 1, one.init.try_into()?)?;
        door.write(&serde_json::to_string(one)?)?;
    }
    for (one, door) in nodes.iter().zip(doors.iter_mut()) {
        let line = door.read()?;
        if line != "ready" {
            bail!("{} does not come up: {line}", one.name);
        }
    }
    Description { keeper: getpid().as_raw(), nodes }.write(dir)?;
    Ok(subnet)
}

/// A node's door, our child, and the pipes to it and to the node's init.
struct Door {
    process: Child,
    output: BufReader<ChildStdout>,
    init: Option<Pid>,
}

impl Door {
    fn open(dir: &Path, name: &str) -> Result<Self> {
        let log = fs::File::create(node::folder(dir, name).join("node.log"))?;
        let mut process = Command::new(tool()?)
            .arg("door")
            .arg(dir)
            .arg(name)
            .arg(getpid().to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .with_context(|| format!("start {name}"))?;
        let output = BufReader::new(process.stdout.take().context("no pipe from the node")?);
        Ok(Self { process, output, init: None })
    }

    fn read(&mut self) -> Result<String> {
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        Ok(line.trim().to_owned())
    }

    fn write(&mut self, line: &str) -> Result<()> {
        let input = self.process.stdin.as_mut().context("no pipe to the node")?;
        writeln!(input, "{line}")?;
        Ok(())
    }

    /// Kills the node. Its init is gone only after all its processes are, and the door after it.
    fn end(&mut self) -> Result<()> {
        match self.init {
            Some(init) => {
                let _ = kill(init, Signal::SIGKILL);
            }
            None => self.process.kill()?,
        }
        self.process.wait()?;
        Ok(())
    }
}
