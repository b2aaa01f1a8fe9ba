//! The cluster's network: one bridge, and one pair of interfaces per node.

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, unshare};
use std::io::Write;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::process::{Command, Stdio};

/// Interface of a node on the cluster's network.
pub const INTERFACE: &str = "eth0";
/// Most nodes of one cluster.
pub const MAX_NODES: usize = 200;
const BRIDGE: &str = "switch";

/// A subnet that no other running cluster of the machine uses.
#[derive(Debug)]
pub struct Subnet {
    number: u8,
    /// Clusters agree by the name of an abstract socket: one can have it, and it goes with its process.
    _claim: UnixListener,
}

impl Subnet {
    /// Claims a free subnet. Call in the machine's own network namespace.
    ///
    /// # Errors
    /// All 250 are taken.
    pub fn claim() -> Result<Self> {
        for number in 0..250 {
            let name = SocketAddr::from_abstract_name(format!("ckpt-test-cluster-{number}"))?;
            match UnixListener::bind_addr(&name) {
                Ok(claim) => return Ok(Self { number, _claim: claim }),
                Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => {}
                Err(error) => return Err(error).context("claim a subnet"),
            }
        }
        bail!("250 test clusters are running on this machine")
    }

    /// IPv4 address of a node, counted from one.
    pub fn ip4(&self, node: usize) -> Ipv4Addr {
        Ipv4Addr::new(10, 77, self.number, u8::try_from(node).unwrap_or(u8::MAX))
    }

    /// IPv6 address of a node, counted from one.
    pub fn ip6(&self, node: usize) -> Ipv6Addr {
        let host = u16::try_from(node).unwrap_or(u16::MAX);
        Ipv6Addr::new(0xfd77, u16::from(self.number), 0, 0, 0, 0, 0, host)
    }

    /// Moves this process into a network namespace of its own and makes the switch there.
    ///
    /// # Errors
    /// Not root, or no `ip` command.
    pub fn make_switch(&self) -> Result<()> {
        unshare(CloneFlags::CLONE_NEWNET).context("new network namespace")?;
        ip(&format!(
            "link set lo up\n\
             link add {BRIDGE} type bridge\n\
             link set {BRIDGE} up\n\
             addr add {}/24 dev {BRIDGE}\n\
             addr add {}/64 dev {BRIDGE} nodad\n",
            self.ip4(254),
            self.ip6(254)
        ))
    }

    /// Plugs a node in: `process` is any process in the node's network namespace.
    ///
    /// # Errors
    /// The process is gone.
    pub fn plug(&self, node: usize, process: u32) -> Result<()> {
        ip(&format!(
            "link add port{node} type veth peer name {INTERFACE} netns {process}\n\
             link set port{node} master {BRIDGE} up\n"
        ))
    }
}

/// Brings up a node's interfaces. Call in the node.
///
/// # Errors
/// The interface is not there.
pub fn configure(ip4: Ipv4Addr, ip6: Ipv6Addr) -> Result<()> {
    ip(&format!(
        "link set lo up\n\
         link set {INTERFACE} up\n\
         addr add {ip4}/24 dev {INTERFACE}\n\
         addr add {ip6}/64 dev {INTERFACE} nodad\n"
    ))
}

/// Runs lines of `ip` commands.
fn ip(lines: &str) -> Result<()> {
    let mut child = Command::new("ip")
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot start `ip`\nhint: apt-get install iproute2")?;
    child.stdin.take().context("no pipe to ip")?.write_all(lines.as_bytes())?;
    let output = child.wait_with_output()?;
    if !output.status.success() {
        bail!("ip: {}\n{lines}", String::from_utf8_lossy(&output.stderr).trim_end());
    }
    Ok(())
}
