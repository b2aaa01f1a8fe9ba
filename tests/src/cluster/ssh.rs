//! Keys and configuration of ssh, made for one run of one cluster.

use super::{NODE_PATH, Node, tool};
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Where a node sees [`folder`].
pub const IN_NODE: &str = "/run/node/ssh";

/// Folder of keys and configuration.
pub fn folder(dir: &Path) -> PathBuf {
    dir.join("ssh")
}

/// Configuration for clients on the machine.
pub fn outside_config(dir: &Path) -> PathBuf {
    folder(dir).join("outside_config")
}

/// Makes keys for all hosts and one user, and the configuration of daemons and clients.
///
/// # Errors
/// `ssh-keygen` is missing.
pub fn prepare(dir: &Path, keeper: i32, nodes: &[Node]) -> Result<()> {
    let ssh = folder(dir);
    fs::create_dir(&ssh)?;
    key(&ssh.join("user_key"))?;
    key(&ssh.join("host_key"))?;
    let public = fs::read_to_string(ssh.join("host_key.pub"))?;
    let known: String = nodes.iter().map(|n| format!("{},{},{} {public}", n.name, n.ip4, n.ip6)).collect();
    fs::write(ssh.join("known_hosts"), known)?;
    fs::write(
        ssh.join("sshd_config"),
        format!(
            "HostKey {IN_NODE}/host_key\n\
             AuthorizedKeysFile {IN_NODE}/user_key.pub\n\
             PidFile none\n\
             PermitRootLogin prohibit-password\n\
             PasswordAuthentication no\n\
             KbdInteractiveAuthentication no\n\
             StrictModes no\n\
             UsePAM no\n\
             UseDNS no\n\
             PrintLastLog no\n\
             MaxStartups 100\n\
             MaxSessions 100\n\
             SetEnv PATH={NODE_PATH}\n\
             Subsystem sftp internal-sftp\n"
        ),
    )?;
    let inside = fs::create_dir(ssh.join("config.d")).map(|()| ssh.join("config.d/ckpt-cluster.conf"))?;
    fs::write(inside, client(Path::new(IN_NODE), nodes, |_| String::new()))?;
    let tool = tool()?;
    let outside = client(&ssh, nodes, |node| {
        // The machine's own network knows nothing of the cluster: a relay joins the switch.
        format!("  HostName {}\n  ProxyCommand {} relay {keeper} %h %p\n", node.ip4, tool.display())
    });
    fs::write(outside_config(dir), outside)?;
    Ok(())
}

fn client(keys: &Path, nodes: &[Node], more: impl Fn(&Node) -> String) -> String {
    let one = |node: &Node| {
        format!(
            "Host {}\n{}  HostKeyAlias {}\n  User root\n  IdentityFile {keys}/user_key\n  IdentitiesOnly yes\n  \
             UserKnownHostsFile {keys}/known_hosts\n  GlobalKnownHostsFile none\n  StrictHostKeyChecking yes\n  \
             BatchMode yes\n  LogLevel ERROR\n",
            node.name,
            more(node),
            node.name,
            keys = keys.display()
        )
    };
    nodes.iter().map(one).collect()
}

fn key(path: &Path) -> Result<()> {
    let status = Command::new("ssh-keygen")
        .args(["-q", "-t", "ed25519", "-N", "", "-C", "ckpt test cluster", "-f"])
        .arg(path)
        .stdin(Stdio::null())
        .status()
        .context("cannot start ssh-keygen\nhint: apt-get install openssh-client")?;
    if !status.success() {
        bail!("ssh-keygen for {}: {status}", path.display());
    }
    Ok(())
}
