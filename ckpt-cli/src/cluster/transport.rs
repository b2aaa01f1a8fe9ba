//! How an agent is started: a child of ours on this node, by ssh elsewhere.

use std::{
    ffi::OsString,
    os::unix::process::CommandExt,
    process::{Command, Stdio},
};

/// Starts agents.
#[derive(Clone, Debug)]
pub struct Launcher {
    /// Command and arguments that stand for ssh.
    pub ssh: Vec<OsString>,
    /// Command on other nodes.
    pub remote: OsString,
    /// Command and arguments on this node.
    pub local: Vec<OsString>,
    /// Names of this node.
    pub local_names: Vec<String>,
}

impl Launcher {
    /// From the environment: `CKPT_SSH` replaces `ssh -o BatchMode=yes -o ConnectTimeout=10`
    /// (separated at blanks), `CKPT_REMOTE` the path of ckpt on other nodes.
    pub fn from_environment() -> std::io::Result<Self> {
        let ssh = std::env::var("CKPT_SSH").ok().filter(|ssh| !ssh.trim().is_empty());
        let ssh = ssh.as_deref().unwrap_or("ssh -T -o BatchMode=yes -o ConnectTimeout=10");
        let host = nix::unistd::gethostname().map_err(std::io::Error::from)?.to_string_lossy().into_owned();
        let short = host.split('.').next().unwrap_or_default().to_owned();
        Ok(Self {
            ssh: ssh.split_whitespace().map(OsString::from).collect(),
            remote: std::env::var_os("CKPT_REMOTE").unwrap_or("ckpt".into()),
            local: vec![std::env::current_exe()?.into(), "serve".into()],
            local_names: vec!["localhost".into(), host, short],
        })
    }

    /// Name of this node: its short host name.
    pub fn this_node(&self) -> String {
        self.local_names.last().filter(|name| !name.is_empty()).map_or("localhost".into(), Clone::clone)
    }

    /// Is it this node?
    pub fn is_local(&self, node: &str) -> bool {
        self.local_names.iter().any(|name| name == node)
    }

    /// The command that runs an agent on a node. It is in a process group of its own: a Ctrl-C at
    /// the terminal reaches only the coordinator, which then aborts in good order.
    pub fn command(&self, node: &str) -> Command {
        let words: Vec<OsString> = match self.is_local(node) {
            true => self.local.clone(),
            false => {
                let remote = [node.into(), self.remote.clone(), "serve".into()];
                self.ssh.iter().cloned().chain(remote).collect()
            }
        };
        let mut words = words.into_iter();
        let mut command = Command::new(words.next().unwrap_or_default());
        command.args(words).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.process_group(0);
        command
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_node_needs_no_ssh() {
        let launcher = Launcher {
            ssh: vec!["ssh".into(), "-T".into()],
            remote: "/opt/ckpt".into(),
            local: vec!["/bin/ckpt".into(), "serve".into()],
            local_names: vec!["localhost".into(), "n1.site".into(), "n1".into()],
        };
        let words = |node: &str| format!("{:?}", launcher.command(node));
        assert_eq!(words("n1"), r#""/bin/ckpt" "serve""#);
        assert_eq!(words("n2"), r#""ssh" "-T" "n2" "/opt/ckpt" "serve""#);
        assert_eq!(launcher.this_node(), "n1");
    }
}
