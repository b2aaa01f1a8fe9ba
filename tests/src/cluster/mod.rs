//! The test cluster: nodes on one machine that are as separate as real ones.
//!
//! Each node has its own network, PID, mount, UTS and IPC namespaces, its own `/proc`, `/tmp`,
//! `/run`, `/dev/shm` and `/var/lib/ckpt`, an IPv4 and an IPv6 address, and a real sshd. A folder
//! of the machine is `/shared` in all of them. `ssh node2 cmd` works in every node as it is, and
//! from outside with the generated configuration ([`Cluster::ssh`]).
//!
//! ```text
//! owner (a test, or nobody after `up`)
//!  └ keeper          holds the switch: a bridge in a network namespace of its own
//!     └ door         one per node; where the namespaces are made
//!        └ init      PID 1 of the node: mounts, sshd, takes in orphans
//! ```
//! A parent's death kills its child (`PR_SET_PDEATHSIG`), and the death of PID 1 everything in the
//! node; no namespace has a name. So nothing outlives the keeper, and the keeper ends when its
//! owner's end of a pipe is closed, by whatever death.

pub mod keeper;
pub mod network;
pub mod node;
pub mod reach;
pub mod root;
pub mod ssh;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Where commands in a node are looked for; the first folder holds the freshly built `ckpt`.
pub const NODE_PATH: &str = "/run/node/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Folder that is `/shared` in the nodes, below the cluster's own.
const SHARED: &str = "shared";

/// One node.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Node {
    /// Host name, `node1` and so on.
    pub name: String,
    /// Address on the cluster's network.
    pub ip4: Ipv4Addr,
    /// The other address.
    pub ip6: Ipv6Addr,
    /// PID of the node's init, as the machine sees it.
    pub init: i32,
}

/// What the keeper writes down once the cluster is up.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Description {
    keeper: i32,
    nodes: Vec<Node>,
}

impl Description {
    fn file(dir: &Path) -> PathBuf {
        dir.join("cluster.json")
    }

    fn read(dir: &Path) -> Result<Self> {
        let path = Self::file(dir);
        let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        serde_json::from_str(&text).with_context(|| format!("read {}", path.display()))
    }

    fn write(&self, dir: &Path) -> Result<()> {
        let path = Self::file(dir);
        fs::write(&path, serde_json::to_string_pretty(self)?)
            .with_context(|| format!("write {}", path.display()))
    }
}

/// A running cluster. Dropping it ends it.
#[derive(Debug)]
pub struct Cluster {
    dir: PathBuf,
    description: Description,
    /// The keeper, and the pipe that tells it that we live; nothing for a cluster of `up`.
    owned: Option<(Child, ChildStdin)>,
}

impl Cluster {
    /// Starts a cluster that ends with this value, or with this process.
    ///
    /// # Errors
    /// Not root, `sshd` or `ip` is missing, or a node does not come up; the message has the
    /// node's own words.
    pub fn start(nodes: usize) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("ckpt-cluster-").tempdir()?.keep();
        Self::start_in(&dir, nodes).inspect_err(|_| {
            let _ = fs::remove_dir_all(&dir);
        })
    }

    fn start_in(dir: &Path, nodes: usize) -> Result<Self> {
        let mut keeper =
            keeper_command(dir, nodes)?.stdin(Stdio::piped()).spawn().context("start the keeper")?;
        let alive = keeper.stdin.take().context("no pipe to the keeper")?;
        wait_until_ready(dir, &mut keeper)?;
        Ok(Self { dir: dir.to_owned(), description: Description::read(dir)?, owned: Some((keeper, alive)) })
    }

    /// Starts a cluster that lives until [`Cluster::down`], whoever starts it.
    ///
    /// # Errors
    /// As [`Cluster::start`], and where a cluster of this name is up.
    pub fn up(name: &str, nodes: usize) -> Result<Self> {
        let dir = named(name)?;
        if dir.exists() {
            if Self::open(name).is_ok_and(|cluster| cluster.alive()) {
                bail!("cluster {name} is up already\nhint: cargo xtask cluster down {name}");
            }
            fs::remove_dir_all(&dir).with_context(|| format!("remove the remains {}", dir.display()))?;
        }
        fs::create_dir(&dir).with_context(|| format!("create {}", dir.display()))?;
        let mut keeper = keeper_command(&dir, nodes)?.arg("--detached").stdin(Stdio::null()).spawn()?;
        wait_until_ready(&dir, &mut keeper).inspect_err(|_| {
            let _ = fs::remove_dir_all(&dir);
        })?;
        Ok(Self { description: Description::read(&dir)?, dir, owned: None })
    }

    /// A cluster that [`Cluster::up`] has started.
    ///
    /// # Errors
    /// There is none of this name.
    pub fn open(name: &str) -> Result<Self> {
        let dir = named(name)?;
        let description = Description::read(&dir).with_context(|| format!("no cluster {name} is up"))?;
        Ok(Self { dir, description, owned: None })
    }

    /// Ends a cluster of [`Cluster::up`] and removes all of it, after a crash too.
    ///
    /// # Errors
    /// There is none of this name, or it does not end.
    pub fn down(name: &str) -> Result<()> {
        let dir = named(name)?;
        if !dir.exists() {
            bail!("no cluster {name} is up");
        }
        if let Ok(cluster) = Self::open(name)
            && cluster.alive()
        {
            let keeper = nix::unistd::Pid::from_raw(cluster.description.keeper);
            nix::sys::signal::kill(keeper, nix::sys::signal::Signal::SIGTERM)?;
            let deadline = Instant::now() + Duration::from_secs(20);
            while cluster.alive() {
                if Instant::now() > deadline {
                    bail!("the keeper of cluster {name}, process {keeper}, does not end");
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        match fs::remove_dir_all(&dir) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("remove {}", dir.display()))
            }
            _ => Ok(()),
        }
    }

    /// Is the keeper there, and is it ours (and not another process that got its PID)?
    fn alive(&self) -> bool {
        let command = fs::read(format!("/proc/{}/cmdline", self.description.keeper)).unwrap_or_default();
        command
            .windows(self.dir.as_os_str().len())
            .any(|part| part == self.dir.as_os_str().as_encoded_bytes())
    }

    /// A node, counted from one.
    ///
    /// # Panics
    /// The cluster has no such node.
    pub fn node(&self, number: usize) -> &Node {
        &self.description.nodes[number - 1]
    }

    /// All nodes.
    pub fn nodes(&self) -> &[Node] {
        &self.description.nodes
    }

    /// Folder of the cluster on the machine: keys, configuration, logs.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The machine's path of what is `/shared` in the nodes.
    pub fn shared(&self) -> PathBuf {
        self.dir.join(SHARED)
    }

    /// Configuration for `ssh -F` on the machine.
    pub fn ssh_config(&self) -> PathBuf {
        ssh::outside_config(&self.dir)
    }

    /// PID of the keeper.
    pub fn keeper(&self) -> i32 {
        self.description.keeper
    }

    /// `ssh NODE` from the machine, to be given a command.
    pub fn ssh(&self, node: &str) -> Command {
        let mut command = Command::new("ssh");
        command.arg("-F").arg(self.ssh_config()).arg(node);
        command
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let Some((mut keeper, alive)) = self.owned.take() else { return };
        drop(alive);
        // Nothing can be done here about a keeper that fails.
        let _ = keeper.wait();
        let _ = fs::remove_dir_all(&self.dir);
    }
}

impl Node {
    /// A command in the node, as root, in `/`, with [`NODE_PATH`]; more may be set as on any
    /// [`Command`]. Killing what it starts kills the program in the node; what that has left
    /// behind lives on, as a child of the node's init.
    ///
    /// # Panics
    /// The cluster's own program is gone.
    pub fn command<S: AsRef<std::ffi::OsStr>>(&self, words: &[S]) -> Command {
        let mut command = Command::new(tool().expect("the cluster was started with it"));
        command.arg("enter").arg(self.init.to_string()).arg("--").args(words);
        command
    }

    /// Runs a command in the node to its end.
    ///
    /// # Errors
    /// It cannot be started. A failure of the command is in the result.
    pub fn exec<S: AsRef<std::ffi::OsStr>>(&self, words: &[S]) -> Result<Output> {
        self.command(words)
            .stdin(Stdio::null())
            .output()
            .with_context(|| format!("start a command in {}", self.name))
    }

    /// Standard output of a command that is to succeed, trimmed.
    ///
    /// # Errors
    /// The command fails; the message has its standard error.
    pub fn run<S: AsRef<std::ffi::OsStr>>(&self, words: &[S]) -> Result<String> {
        let output = self.exec(words)?;
        if !output.status.success() {
            let text: Vec<_> = words.iter().map(|word| word.as_ref().to_string_lossy()).collect();
            let error = String::from_utf8_lossy(&output.stderr);
            bail!("{} in {}: {}\n{}", text.join(" "), self.name, output.status, error.trim_end());
        }
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }

    /// Starts a command in the node.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn spawn<S: AsRef<std::ffi::OsStr>>(&self, words: &[S]) -> Result<Child> {
        self.command(words)
            .stdin(Stdio::null())
            .spawn()
            .with_context(|| format!("start a command in {}", self.name))
    }

    /// Does some work in the network of the node, on a thread of its own: sockets made there belong
    /// to the node's network wherever they are used.
    ///
    /// # Errors
    /// The node is gone.
    ///
    /// # Panics
    /// The work panics.
    pub fn in_network<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        let path = self.network_path();
        let network = fs::File::open(&path).with_context(|| format!("open {}", path.display()))?;
        let enter = move || -> Result<T> {
            nix::sched::setns(network, nix::sched::CloneFlags::CLONE_NEWNET).context("enter the network")?;
            Ok(work())
        };
        std::thread::scope(|scope| scope.spawn(enter).join().expect("the work panicked"))
    }

    fn network_path(&self) -> PathBuf {
        Path::new("/proc").join(self.init.to_string()).join("ns/net")
    }

    /// The machine's path to a file in the node.
    pub fn path(&self, path: impl AsRef<Path>) -> PathBuf {
        let path = path.as_ref();
        let inside = path.strip_prefix("/").unwrap_or(path);
        Path::new("/proc").join(self.init.to_string()).join("root").join(inside)
    }
}

/// The program `ckpt-cluster`, next to whoever asks.
pub(crate) fn tool() -> Result<PathBuf> {
    let path = build_folder()?.join("ckpt-cluster");
    if !path.exists() {
        bail!("{} is missing\nhint: cargo build -p ckpt-tests -p ckpt-cli", path.display());
    }
    Ok(path)
}

/// Folder of the built programs, such as `target/debug`.
pub(crate) fn build_folder() -> Result<PathBuf> {
    let me = std::env::current_exe().context("path of this program")?;
    let mut folder = me.parent().context("path of this program")?;
    if folder.ends_with("deps") {
        folder = folder.parent().context("path of this program")?;
    }
    Ok(folder.to_owned())
}

fn named(name: &str) -> Result<PathBuf> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if name.is_empty() || !name.chars().all(allowed) {
        bail!("{name:?} is no name for a cluster: letters, digits, - and _ only");
    }
    Ok(std::env::temp_dir().join(format!("ckpt-cluster-{name}")))
}

fn keeper_command(dir: &Path, nodes: usize) -> Result<Command> {
    if !nix::unistd::geteuid().is_root() {
        bail!("the test cluster needs root");
    }
    let log = fs::File::create(dir.join("keeper.log"))?;
    let mut command = Command::new(tool()?);
    command.arg("keep").arg(dir).arg(nodes.to_string()).stdout(Stdio::piped()).stderr(log);
    only_standard_streams(&mut command);
    Ok(command)
}

/// Waits for the keeper's `ready`. On failure the keeper has ended, and the error has the logs.
fn wait_until_ready(dir: &Path, keeper: &mut Child) -> Result<()> {
    let mut line = String::new();
    let output = keeper.stdout.take().context("no pipe from the keeper")?;
    BufReader::new(output).read_line(&mut line)?;
    if line.trim() == "ready" {
        return Ok(());
    }
    keeper.kill()?;
    keeper.wait()?;
    let mut logs = fs::read_to_string(dir.join("keeper.log")).unwrap_or_default();
    for entry in fs::read_dir(dir)?.flatten() {
        let text = fs::read_to_string(entry.path().join("node.log")).unwrap_or_default();
        logs.push_str(&text);
    }
    bail!("the test cluster does not start:\n{}", logs.trim_end())
}

/// What a command starts has nothing of ours but the standard streams, whatever we have inherited open.
pub(crate) fn only_standard_streams(command: &mut Command) {
    let close = || {
        // SAFETY: plain numbers; the descriptors are closed only when the new program starts.
        match unsafe { libc::syscall(libc::SYS_close_range, 3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        }
    };
    // SAFETY: between fork and exec only close_range(2) is called.
    unsafe {
        command.pre_exec(close);
    }
}

/// Tells a waiting parent process something, on standard output.
pub(crate) fn report(line: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}")?;
    out.flush()?;
    Ok(())
}
