//! Ways into the cluster from outside.

use super::{NODE_PATH, only_standard_streams};
use anyhow::{Context, Result};
use nix::sched::{CloneFlags, setns};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use std::ffi::OsString;
use std::fs::File;
use std::io::{Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitCode};

/// Runs a command in a node and passes its exit code on (128 and more: killed by a signal).
///
/// # Errors
/// The node is gone, or the command cannot be started.
pub fn enter(init: i32, words: &[OsString]) -> Result<ExitCode> {
    let spaces = [
        ("net", CloneFlags::CLONE_NEWNET),
        ("uts", CloneFlags::CLONE_NEWUTS),
        ("ipc", CloneFlags::CLONE_NEWIPC),
        ("pid", CloneFlags::CLONE_NEWPID),
        ("mnt", CloneFlags::CLONE_NEWNS),
    ];
    let open =
        |name| File::open(format!("/proc/{init}/ns/{name}")).with_context(|| format!("no node at {init}"));
    let files = spaces.map(|(name, flag)| open(name).map(|file| (file, flag)));
    for entry in files {
        let (file, flag) = entry?;
        setns(file, flag).context("enter the node")?;
    }
    let (program, arguments) = words.split_first().context("no command")?;
    let mut command = Command::new(program);
    command.args(arguments).current_dir("/").env("PATH", NODE_PATH).env("HOME", "/root").env_remove("TMPDIR");
    // SAFETY: between fork and exec only prctl(2) is called, which is async-signal-safe.
    unsafe {
        command.pre_exec(|| Ok(set_pdeathsig(Signal::SIGKILL)?));
    }
    only_standard_streams(&mut command);
    let status = command.spawn().with_context(|| format!("cannot start {}", program.display()))?.wait()?;
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(1)))
}

/// Joins the network of the keeper and passes standard input and output to and from an address
/// there (ssh's `ProxyCommand`).
///
/// # Errors
/// The cluster is gone, or nobody listens.
pub fn relay(keeper: i32, address: IpAddr, port: u16) -> Result<()> {
    let network = File::open(format!("/proc/{keeper}/ns/net")).context("the cluster is gone")?;
    setns(network, CloneFlags::CLONE_NEWNET).context("join the cluster's network")?;
    let address = SocketAddr::from((address, port));
    let stream = TcpStream::connect(address).with_context(|| format!("connect to {address}"))?;
    stream.set_nodelay(true)?;
    let mut writer = stream.try_clone()?;
    std::thread::spawn(move || {
        let _ = pass(&mut std::io::stdin().lock(), &mut writer);
        let _ = writer.shutdown(Shutdown::Write);
    });
    pass(&mut &stream, &mut std::io::stdout().lock())
}

/// Copies until the end, without waiting for a buffer to fill.
fn pass(from: &mut impl Read, to: &mut impl Write) -> Result<()> {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let length = from.read(&mut buffer)?;
        if length == 0 {
            return Ok(());
        }
        to.write_all(&buffer[..length])?;
        to.flush()?;
    }
}
