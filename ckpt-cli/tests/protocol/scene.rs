//! A store and a few fake nodes in a directory of their own.

use ckpt_cli::{cluster::fault, store::Store};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{
    fs,
    os::unix::process::ExitStatusExt,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};
use tempfile::TempDir;

const NODES: [&str; 3] = ["n1", "n2", "n3"];

pub(crate) struct Scene {
    directory: TempDir,
}

/// A coordinator to be started.
pub(crate) struct Coordinator(Command, [String; 3]);

/// A coordinator that runs.
pub(crate) struct Running(Child);

impl Coordinator {
    pub(crate) fn stop(mut self) -> Self {
        self.1[1] = "stop".into();
        self
    }

    pub(crate) fn allow(mut self, kind: &str) -> Self {
        self.1[2] = kind.into();
        self
    }

    pub(crate) fn fault(mut self, fault: &str) -> Self {
        self.0.env(fault::VARIABLE, fault);
        self
    }

    pub(crate) fn spawn(mut self) -> Running {
        Running(self.0.args(self.1).stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn().unwrap())
    }

    /// Exit code, or 128 and the signal, and what it wrote.
    pub(crate) fn run(self) -> (i32, String) {
        let output = self.spawn().0.wait_with_output().unwrap();
        let code = output.status.code().or(output.status.signal().map(|signal| signal + 128));
        (code.unwrap(), String::from_utf8(output.stdout).unwrap())
    }
}

impl Running {
    pub(crate) fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.0.id() as i32), signal).unwrap();
    }

    pub(crate) fn wait(&mut self) {
        self.0.wait().unwrap();
    }
}

impl Scene {
    pub(crate) fn new() -> Self {
        Self { directory: TempDir::new().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn put(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
    }

    pub(crate) fn get(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap()
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.path(name).exists()
    }

    fn coordinator(&self, role: &str, nodes: &[&str]) -> Coordinator {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.arg(role).env("FAKE_DIRECTORY", self.directory.path()).env_remove(fault::VARIABLE);
        Coordinator(command, [nodes.join(","), String::new(), String::new()])
    }

    pub(crate) fn dump(&self, nodes: &[&str]) -> Coordinator {
        self.coordinator("dump", nodes)
    }

    pub(crate) fn restore(&self, nodes: &[&str]) -> Coordinator {
        self.coordinator("restore", nodes)
    }

    pub(crate) fn store(&self) -> Store {
        Store::open(&self.path("store")).unwrap()
    }

    pub(crate) fn checkpoints(&self) -> usize {
        self.store().checkpoints(&"job".parse().unwrap()).unwrap().len()
    }

    /// Does the process named in this file live?
    fn lives(&self, name: &str) -> bool {
        let pid = fs::read_to_string(self.path(name)).ok().and_then(|pid| pid.parse::<i32>().ok());
        let stat = pid.and_then(|pid| procfs::process::Process::new(pid).and_then(|p| p.stat()).ok());
        stat.is_some_and(|stat| stat.state != 'Z')
    }

    pub(crate) fn is_frozen(&self, node: &str) -> bool {
        self.lives(&format!("{node}.frozen"))
    }

    pub(crate) fn is_built(&self, node: &str) -> bool {
        self.lives(&format!("{node}.built"))
    }

    /// Nodes on which a restored process runs.
    pub(crate) fn running(&self) -> Vec<&'static str> {
        NODES.into_iter().filter(|node| self.lives(&format!("{node}.running"))).collect()
    }

    pub(crate) fn stop_running(&self) {
        for node in self.running() {
            let pid = self.get(&format!("{node}.running")).parse().unwrap();
            kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
        }
        self.wait_for("the end of restored processes", || self.running().is_empty());
    }

    pub(crate) fn wait_for(&self, what: &str, condition: impl Fn() -> bool) {
        let start = Instant::now();
        while !condition() {
            assert!(start.elapsed() < Duration::from_secs(60), "waited in vain for: {what}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// No node stays frozen.
    pub(crate) fn assert_unharmed(&self) {
        self.wait_for("no node is frozen", || NODES.iter().all(|node| !self.is_frozen(node)));
    }

    /// The store has so many checkpoints, all whole, and nothing else.
    pub(crate) fn assert_whole(&self, count: usize) {
        let store = self.store();
        let all = store.checkpoints(&"job".parse().unwrap()).unwrap();
        assert_eq!(all.len(), count);
        for checkpoint in &all {
            assert_eq!(store.verify(checkpoint, 100).problems, []);
        }
        let parts: usize = all.iter().map(|checkpoint| checkpoint.manifest.nodes.len()).sum();
        let files = |directory: &str| fs::read_dir(self.path("store").join(directory)).unwrap().count();
        assert_eq!((files("parts"), files("packs"), files("tmp")), (parts, parts, 0));
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        for node in self.running() {
            let pid = self.get(&format!("{node}.running")).parse().unwrap();
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}
