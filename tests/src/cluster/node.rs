//! The two processes that make a node: its door and its init.

use super::{NODE_PATH, Node, network, report, root, tool};
use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{Pid, getppid, pause, sethostname, setsid};
use std::fs;
use std::io::{BufRead, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Folder of a node, below the cluster's.
pub fn folder(dir: &Path, name: &str) -> PathBuf {
    dir.join(name)
}

/// The door: makes the namespaces, starts the node's init in them, and ends with it.
///
/// # Errors
/// Not root.
pub fn door(dir: &Path, name: &str, keeper: i32) -> Result<()> {
    set_pdeathsig(Signal::SIGKILL)?;
    if getppid().as_raw() != keeper {
        bail!("the keeper is gone");
    }
    let all = CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWPID;
    unshare(all).context("new namespaces")?;
    let mut init = Command::new(tool()?).arg("init").arg(dir).arg(name).spawn().context("start init")?;
    report(&format!("{}", init.id()))?;
    init.wait()?;
    Ok(())
}

/// The init: PID 1 of the node. Returns only with an error.
///
/// # Errors
/// The node cannot be set up.
pub fn init(dir: &Path, name: &str) -> Result<()> {
    set_pdeathsig(Signal::SIGKILL)?;
    setsid()?;
    // The keeper says where we live once it has plugged us in; no line: it is gone.
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line)?;
    if line.is_empty() {
        bail!("the keeper is gone");
    }
    let node: Node = serde_json::from_str(&line)?;
    sethostname(name)?;
    network::configure(node.ip4, node.ip6)?;
    root::enter(dir, &folder(dir, name))?;
    let sshd = start_sshd(&node)?;
    report("ready")?;
    reap(sshd)
}

fn start_sshd(node: &Node) -> Result<Pid> {
    let mut sshd = Command::new("/usr/sbin/sshd")
        .args(["-D", "-e", "-f"])
        .arg(Path::new(super::ssh::IN_NODE).join("sshd_config"))
        .env_clear()
        .env("PATH", NODE_PATH)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .context("cannot start sshd\nhint: apt-get install openssh-server")?;
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        if TcpStream::connect(SocketAddr::from((node.ip4, 22))).is_ok() {
            return Ok(Pid::from_raw(sshd.id().try_into()?));
        }
        if let Some(status) = sshd.try_wait()? {
            bail!("sshd has ended: {status}");
        }
        if Instant::now() > deadline {
            bail!("sshd does not listen");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Takes in the node's orphans until the node is killed.
fn reap(sshd: Pid) -> Result<()> {
    loop {
        match waitpid(None, None) {
            Ok(WaitStatus::Exited(pid, _) | WaitStatus::Signaled(pid, ..)) if pid == sshd => {
                // Standard error is the node's log.
                writeln!(std::io::stderr(), "init: sshd has ended")?;
            }
            Err(Errno::ECHILD) => pause(),
            _ => {}
        }
    }
}

/// Writes the node's own versions of files in `/etc` and root's home.
///
/// # Errors
/// The folder cannot be written.
pub fn prepare(dir: &Path, node: &Node, all: &[Node]) -> Result<()> {
    let home = folder(dir, &node.name).join("root");
    fs::create_dir_all(&home)?;
    // A shell that sshd starts reads it: the machine's own would change the path.
    fs::write(home.join(".bashrc"), "")?;
    let etc = folder(dir, &node.name).join("etc");
    fs::create_dir(&etc)?;
    let names: String = all.iter().map(|n| format!("{} {}\n{} {}\n", n.ip4, n.name, n.ip6, n.name)).collect();
    fs::write(etc.join("hosts"), format!("127.0.0.1 localhost\n::1 localhost ip6-localhost\n{names}"))?;
    fs::write(etc.join("hostname"), format!("{}\n", node.name))?;
    // Without PAM, sshd refuses accounts that are locked with `!`, as root often is.
    let shadow = fs::read_to_string("/etc/shadow").unwrap_or_default();
    let unlocked = shadow.lines().map(|line| match line.strip_prefix("root:") {
        Some(rest) => format!("root:*:{}\n", rest.split_once(':').map_or("", |(_, rest)| rest)),
        None => format!("{line}\n"),
    });
    let path = etc.join("shadow");
    fs::write(&path, unlocked.collect::<String>())?;
    fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    Ok(())
}
