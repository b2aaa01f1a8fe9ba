//! `ckpt fill`: the process that fills the memory of a restored job and ends when it is complete.
//!
//! The restore starts it with a socket as its standard input and says at once which part it is ([`Task`]), later which
//! address spaces ([`TaskSpace`]), and hands over, with one byte each, their userfaultfds. It answers with one byte when it
//! serves them, and only then is the job let go.
//! Who wants to know when the memory of a process is complete, such as a dump, connects to the address of the process
//! ([`wait_for`]) and reads up to the end.

use super::{FEATURES, LazyFill, Prepared, Space};
use crate::store::{PartReader, Store};
use crate::sys::{pidfd, userfaultfd::Userfaultfd};
use anyhow::{Context as _, Result, bail, ensure};
use ckpt_common::image::{MemoryId, manifest::PartRef};
use nix::cmsg_space;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// Largest task: sixty thousand mappings in each of many processes.
const MOST: u64 = 1 << 30;
/// How long the server may take to open a part.
const PATIENCE: Duration = Duration::from_secs(60);
/// For tests: only what is asked for is filled.
const ON_DEMAND: &str = "CKPT_FAULT_ON_DEMAND";

/// What it can get ready before the memory is there.
#[derive(Debug, Serialize, Deserialize)]
struct Task {
    store: PathBuf,
    part: PartRef,
}

/// What is said of a [`Space`].
#[derive(Debug, Serialize, Deserialize)]
struct TaskSpace {
    pid: i32,
    memory: MemoryId,
    ranges: Vec<(u64, u64)>,
}

/// A server that has started and reads the page maps while the restore builds its processes. Dropped, it ends.
#[derive(Debug)]
pub struct Server(UnixStream);

impl Server {
    /// Starts a server for a part. Messages of a later failure go to `log`. It is none of the `wanted` PIDs, which the
    /// job is to have.
    ///
    /// # Errors
    /// It could not be started. What goes wrong with the part, [`Self::serve`] says.
    pub fn start(part: &PartReader, wanted: &BTreeSet<i32>, log: Option<&Path>) -> Result<Self> {
        let (store, part) = part.place();
        let (ours, its) = UnixStream::pair()?;
        let messages = match log {
            Some(log) => {
                std::fs::create_dir_all(log).with_context(|| format!("creating {}", log.display()))?;
                let path = log.join("fill.log");
                let file = File::options().create(true).append(true).open(&path);
                Stdio::from(file.with_context(|| format!("opening {}", path.display()))?)
            }
            None => Stdio::null(),
        };
        let mut command = Command::new("/proc/self/exe");
        command.arg("fill").current_dir("/").stdin(Stdio::from(OwnedFd::from(its)));
        command.stdout(Stdio::null()).stderr(messages);
        let child = spawn_beside(&mut command, wanted).context("starting the process that fills memory")?;
        // Its end of the socket is its own: what is left of the command has a copy.
        drop(command);
        tracing::debug!(pid = child.id(), "memory is filled by a process of its own");
        ours.set_read_timeout(Some(PATIENCE))?;
        let mut server = Self(ours);
        server.say(&Task { store: store.to_owned(), part: part.clone() })?;
        Ok(server)
    }

    /// Hands address spaces over. The server serves them when this returns.
    ///
    /// # Errors
    /// It cannot open the part, or has ended.
    pub fn serve(mut self, spaces: &[Space]) -> Result<()> {
        let sent = self.hand_over(spaces);
        // One byte where it serves; what is wrong, where it does not.
        let (mut first, mut why) = ([0], String::new());
        if self.0.read(&mut first).context("waiting for the process that fills memory")? == 1 {
            if first == *b"+" {
                return sent;
            }
            self.0.read_to_string(&mut why)?;
        }
        if why.is_empty() {
            why = "it has ended".into();
        }
        bail!("the process that fills memory: {why}");
    }

    fn hand_over(&mut self, spaces: &[Space]) -> Result<()> {
        let tasks = spaces.iter().map(|space| {
            let (pid, memory, ranges) = (space.pid, space.memory, space.ranges.clone());
            TaskSpace { pid, memory, ranges }
        });
        self.say(&tasks.collect::<Vec<_>>())?;
        for space in spaces {
            let raw = [space.uffd.as_fd().as_raw_fd()];
            let control = [ControlMessage::ScmRights(&raw)];
            let (byte, flags) = ([0], MsgFlags::MSG_NOSIGNAL);
            sendmsg::<()>(self.0.as_raw_fd(), &[IoSlice::new(&byte)], &control, flags, None)
                .context("handing a userfaultfd over")?;
        }
        Ok(())
    }

    fn say(&mut self, what: &impl Serialize) -> Result<()> {
        let bytes = rmp_serde::to_vec_named(what)?;
        let said =
            self.0.write_all(&(bytes.len() as u64).to_le_bytes()).and_then(|()| self.0.write_all(&bytes));
        said.context("telling the process that fills memory what to do")
    }
}

/// Starts a process that has none of these PIDs.
fn spawn_beside(command: &mut Command, wanted: &BTreeSet<i32>) -> std::io::Result<Child> {
    // They hold their numbers until there is one with another.
    let mut in_the_way = Vec::new();
    let found = loop {
        match command.spawn() {
            Ok(child) if wanted.contains(&(child.id() as i32)) => in_the_way.push(child),
            other => break other,
        }
    };
    for mut child in in_the_way {
        child.kill()?;
        child.wait()?;
    }
    found
}

/// What the restore says next; nothing where it has ended.
fn hear<T: DeserializeOwned>(client: &mut UnixStream) -> Result<Option<T>> {
    let mut length = [0; 8];
    match client.read_exact(&mut length) {
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(None),
        read => read?,
    }
    let length = u64::from_le_bytes(length);
    ensure!(length <= MOST, "a task of {length} bytes");
    let mut bytes = vec![0; length as usize];
    client.read_exact(&mut bytes)?;
    Ok(Some(rmp_serde::from_slice(&bytes)?))
}

/// The server itself; `client` is who has started it. Returns when everything is filled.
///
/// # Errors
/// A page cannot be had. The processes are killed then.
pub fn run(mut client: UnixStream) -> Result<()> {
    // It outlives the session that the restore was started from.
    let _ = nix::unistd::setsid();
    nix::sys::prctl::set_name(c"ckpt-fill")?;
    // The last that memory is taken from where there is none left: ckpt may lack the right, and then it is not so.
    let _ = std::fs::write("/proc/self/oom_score_adj", "-1000");
    match begin(&mut client) {
        // The restore has failed, or nothing is to follow.
        Ok(None) => Ok(()),
        Ok(Some((fill, listeners))) => {
            client.write_all(b"+").context("answering the restore")?;
            drop(client);
            fill.run(&listeners)
        }
        Err(error) => {
            // Who reads it fails with it.
            let _ = client.write_all(format!("-{error:#}").as_bytes());
            Err(error)
        }
    }
}

fn begin(client: &mut UnixStream) -> Result<Option<(LazyFill, Vec<UnixListener>)>> {
    let Some(task) = hear::<Task>(client)? else { return Ok(None) };
    let prepared = Prepared::new(Store::open(&task.store)?.open_part(&task.part)?)?;
    let Some(tasks) = hear::<Vec<TaskSpace>>(client)? else { return Ok(None) };
    let (mut spaces, mut listeners) = (Vec::new(), Vec::new());
    for TaskSpace { pid, memory, ranges } in tasks {
        spaces.push(Space { uffd: receive(client)?, pid, memory, ranges });
        let listener = UnixListener::bind_addr(&address(pid)?);
        listeners.push(listener.with_context(|| format!("listening for who waits for process {pid}"))?);
    }
    Ok(Some((prepared.fill(spaces, std::env::var_os(ON_DEMAND).is_none())?, listeners)))
}

fn receive(client: &UnixStream) -> Result<Userfaultfd> {
    let mut byte = [0];
    let mut pieces = [IoSliceMut::new(&mut byte)];
    let mut space = cmsg_space!([RawFd; 1]);
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(client.as_raw_fd(), &mut pieces, Some(&mut space), flags)?;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(raw) = control
            && let Some(fd) = raw.first()
        {
            return Ok(pidfd::adopt(*fd).into());
        }
    }
    bail!("a userfaultfd is missing")
}

fn address(pid: i32) -> Result<SocketAddr> {
    Ok(SocketAddr::from_abstract_name(format!("ckpt-fill-{pid}"))?)
}

/// Waits until the memory of these processes is complete: at once where it is, or never was otherwise.
///
/// # Errors
/// A server cannot be asked.
pub fn wait_for(pids: &[i32]) -> Result<()> {
    for pid in pids {
        // Nobody listens: nothing is to come.
        let Ok(mut server) = UnixStream::connect_addr(&address(*pid)?) else { continue };
        match server.read_to_end(&mut Vec::new()) {
            // It was complete before we were taken notice of.
            Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
            read => drop(read.context("waiting for memory to be complete")?),
        }
    }
    Ok(())
}

/// Makes a new userfaultfd fit for [`LazyFill`] and registers ranges of addresses.
///
/// # Errors
/// The kernel lacks a feature, or memory cannot be registered.
pub fn register(uffd: &Userfaultfd, ranges: &[(u64, u64)]) -> Result<()> {
    use crate::sys::userfaultfd::mode;
    uffd.enable(FEATURES).context("enabling a userfaultfd (Linux 6.7)")?;
    for &(start, end) in ranges {
        let registered = uffd.register(start, end, mode::MISSING);
        registered.with_context(|| format!("registering memory {start:x}-{end:x}"))?;
    }
    Ok(())
}

/// The stream that a server is started with: its standard input.
///
/// # Errors
/// There is none.
pub fn first_client() -> Result<UnixStream> {
    let stream = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    nix::unistd::dup2_stdin(File::open("/dev/null")?)?;
    Ok(stream)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    /// A server that ends before it has accepted who waits for it.
    #[test]
    fn the_end_of_a_server_is_what_is_waited_for() {
        // No process has this number.
        let pid = i32::MAX - std::process::id() as i32;
        let listener = UnixListener::bind_addr(&address(pid).unwrap()).unwrap();
        let waiting = std::thread::spawn(move || wait_for(&[pid]));
        poll(&mut [PollFd::new(listener.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE).unwrap();
        drop(listener);
        waiting.join().unwrap().unwrap();
    }

    #[test]
    fn no_number_of_the_job_is_taken() {
        let mut sleep = Command::new("sleep");
        sleep.arg("60");
        let mut first = sleep.spawn().unwrap();
        let next = first.id() as i32 + 1;
        let wanted: BTreeSet<i32> = (next..next + 20).collect();
        let mut found = spawn_beside(&mut sleep, &wanted).unwrap();
        assert!(!wanted.contains(&(found.id() as i32)), "{}", found.id());
        // Whoever was in the way is gone, or has the number by chance and is another's.
        let ours = |pid: &&i32| {
            let stat = procfs::process::Process::new(**pid).and_then(|process| process.stat());
            stat.is_ok_and(|stat| stat.ppid == std::process::id() as i32 && stat.comm == "sleep")
        };
        assert_eq!(wanted.iter().find(ours), None);
        for child in [&mut first, &mut found] {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }
}
