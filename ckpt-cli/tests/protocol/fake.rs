//! An engine whose job is a few files: `NODE.frozen` holds the PID of the agent that froze it.
//! As with ptrace, the job is frozen only as long as that process lives.

use anyhow::Result;
use ckpt_cli::{
    cluster::{
        engine::{DumpSession, Engine, Outcome, RestoreSession},
        error::Classified,
    },
    store::{PartReader, PartWriter, Store},
};
use ckpt_common::{
    image::{
        MemoryId, PAGE_SIZE,
        file::{FileId, OpenFile},
        manifest::{PartRef, ProcessSummary},
        tcp::Position,
    },
    wire::{
        Blocker, Connection, CutReport, DumpTask, FailureClass, MemoryReport, NetworkTask, PlanReport,
        RestoreOptions, RestoreReport,
    },
};
use std::{
    fs,
    net::SocketAddr,
    path::PathBuf,
    process::{Command, Stdio},
};

/// Files of one node: `DIRECTORY/NODE.NAME`.
#[derive(Clone)]
pub(crate) struct FakeEngine {
    pub(crate) directory: PathBuf,
    pub(crate) node: String,
}

impl FakeEngine {
    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(format!("{}.{name}", self.node))
    }

    fn put(&self, name: &str, text: &str) -> Result<()> {
        Ok(fs::write(self.path(name), text)?)
    }

    /// Takes one off the number in a file. False if none was left, or there is no such file.
    fn take_one(&self, name: &str) -> Result<bool> {
        let left = fs::read_to_string(self.path(name)).ok().and_then(|n| n.parse::<u32>().ok());
        let Some(left) = left.filter(|&left| left > 0) else { return Ok(false) };
        self.put(name, &(left - 1).to_string())?;
        Ok(true)
    }

    /// Lines of: local address, other address, send start, send end, next to receive.
    fn connections(&self) -> Result<Vec<Connection>> {
        let text = fs::read_to_string(self.path("connections")).unwrap_or_default();
        let connection = |line: &str| -> Result<Connection> {
            let words: Vec<_> = line.split_whitespace().collect();
            let (local, remote): (SocketAddr, SocketAddr) = (words[0].parse()?, words[1].parse()?);
            let position = Position {
                local: local.into(),
                peer: remote.into(),
                send_start: words[2].parse()?,
                send_end: words[3].parse()?,
                receive_next: words[4].parse()?,
                window_end: 0,
                finished: false,
                peer_finished: false,
            };
            Ok(Connection { pid: 1, fd: 5, local, remote, peer_closed: false, position: Some(position) })
        };
        text.lines().map(connection).collect()
    }

    fn processes(&self) -> Vec<ProcessSummary> {
        vec![ProcessSummary { pid: 1, name: "fake".into(), threads: 1, ..Default::default() }]
    }
}

impl Engine for FakeEngine {
    fn plan_dump(&self, _: &[i32], task: &DumpTask, _: &Store) -> Result<(Box<dyn DumpSession>, PlanReport)> {
        let cow = fs::read_to_string(self.path("cow")).unwrap_or_default();
        self.put("cow", &format!("{cow}{:?} ", task.options.cow))?;
        let blocker = Blocker {
            pid: 1,
            process: "fake".into(),
            item: "fd 7".into(),
            reason: "in the way".into(),
            allow: None,
        };
        let report = PlanReport {
            processes: self.processes(),
            blockers: self.path("blocked").exists().then_some(blocker).into_iter().collect(),
            connections: self.connections()?,
            ..Default::default()
        };
        Ok((Box::new(FakeDump(self.clone())), report))
    }

    fn plan_restore(
        &self,
        part: PartReader,
        _: &RestoreOptions,
    ) -> Result<(Box<dyn RestoreSession>, RestoreReport)> {
        assert_eq!(part.read::<OpenFile>()?.len(), 1);
        Ok((Box::new(FakeRestore(self.clone())), RestoreReport::default()))
    }
}

/// A failure that passes by itself.
fn passes(message: &str) -> anyhow::Error {
    Classified { message: message.into(), hint: None, class: FailureClass::Transient }.into()
}

struct FakeDump(FakeEngine);

impl DumpSession for FakeDump {
    fn base(&mut self) -> Result<Option<PartReader>> {
        Ok(None)
    }

    fn arm(&mut self, _: &mut PartWriter) -> Result<()> {
        Ok(())
    }

    fn sample(&mut self) -> Result<u64> {
        Ok(0)
    }

    fn cut(&mut self) -> Result<CutReport> {
        self.0.put("was-cut", "")?;
        self.0.put("frozen", &std::process::id().to_string())?;
        if self.0.take_one("flaky")? {
            return Err(passes("a connection is not accepted yet; in a moment it may be"));
        }
        Ok(CutReport {
            us: 1,
            processes: self.0.processes(),
            bytes: PAGE_SIZE as u64,
            ..CutReport::default()
        })
    }

    fn settle(&mut self) -> Result<Vec<Connection>> {
        self.0.connections()
    }

    fn thaw(&mut self) -> Result<()> {
        let _ = fs::remove_file(self.0.path("frozen"));
        Ok(())
    }

    fn save(&mut self, part: &mut PartWriter) -> Result<()> {
        if self.0.take_one("loses")? {
            return Err(passes("1 pages of process 1 were overwritten before they could be copied"));
        }
        let (label, kind) = ("pipe:[1]".into(), "pipe".into());
        let (owner, payload) = ((0, 0, 0), Vec::new());
        part.record(&OpenFile { id: FileId(1), flags: 0, owner, label, kind, version: 1, payload })?;
        part.memory(MemoryId(0))?;
        part.pages(MemoryId(0), 7, &[1; PAGE_SIZE])?;
        Ok(())
    }

    fn memory(&self) -> MemoryReport {
        MemoryReport::default()
    }

    fn finish(mut self: Box<Self>, outcome: Outcome, _: &PartRef) -> Result<()> {
        match outcome {
            Outcome::LeaveRunning => self.thaw(),
            Outcome::Kill => self.0.put("killed", ""),
        }
    }
}

impl Drop for FakeDump {
    fn drop(&mut self) {
        let _ = self.thaw();
    }
}

struct FakeRestore(FakeEngine);

impl RestoreSession for FakeRestore {
    fn build(&mut self, task: &NetworkTask) -> Result<()> {
        let line = |peer: &Position| format!("{} {} {}\n", peer.local, peer.peer, peer.receive_next);
        self.0.put("peers", &task.peers.iter().map(line).collect::<String>())?;
        self.0.put("built", &std::process::id().to_string())
    }

    fn connect(&mut self) -> Result<()> {
        Ok(())
    }

    fn release(self: Box<Self>) -> Result<Vec<i32>> {
        let mut sleep = Command::new("sleep");
        let null = || Stdio::null();
        let child = sleep.arg("600").stdin(null()).stdout(null()).stderr(null()).spawn()?;
        self.0.put("running", &child.id().to_string())?;
        Ok(vec![child.id() as i32])
    }
}

impl Drop for FakeRestore {
    fn drop(&mut self) {
        let _ = fs::remove_file(self.0.path("built"));
    }
}
