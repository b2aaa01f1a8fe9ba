//! An image becomes a live process tree.
//!
//! [`Session`] goes through the phases of a restore on one node: *plan* (everything that stands in the way is listed,
//! nothing is made), *build* (stub processes with their PIDs, kernel objects, memory), *connect* (sockets), *release*.
//! Dropping a session before the release kills what was built.

mod content;
mod descriptors;
mod files;
mod grow;
mod huge;
mod layout;
mod lazy;
mod mappings;
mod plan;
mod process;
mod rings;
mod seed;
mod segments;
mod share;
mod spaces;
mod thread;
mod tree;
mod vdso;

use crate::memory::lazy::server;
use crate::network::addresses::AddressMap;
use crate::objects;
use crate::store::PartReader;
use anyhow::{Context as _, Result};
use ckpt_common::image::Kind;
use ckpt_common::image::file::OpenFile;
use ckpt_common::image::process::Process;
use ckpt_common::image::tcp::{Position, TcpSocket};
use ckpt_common::wire::StandIn;
use std::path::PathBuf;

pub use plan::Obstacle;

/// What the operator asked for.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Same PIDs as before, in the namespace of the node or in one of their own.
    pub pids: Pids,
    /// Where standard streams go that led outside the job.
    pub stdio: Stdio,
    /// Directory for the log files of `Stdio::Log`.
    pub log_directory: PathBuf,
    /// Let the processes run before all of their memory is there.
    pub lazy: bool,
}

/// `--pids`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Pids {
    /// In the node's PID namespace; taken numbers are an obstacle.
    Same,
    /// In a PID namespace of the job's own.
    Namespace,
    /// `Same` where the numbers are free, else `Namespace`.
    #[default]
    Auto,
}

/// `--stdio`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Stdio {
    /// Input from /dev/null, output appended to a log file per job and stream.
    #[default]
    Log,
    /// The streams of the command that restores.
    Inherit,
    /// /dev/null.
    Null,
}

/// What the other nodes have to do with this one's connections.
#[derive(Clone, Debug, Default)]
pub struct Network {
    /// Where addresses of the checkpoint are now.
    pub addresses: AddressMap,
    /// Where the other ends of this node's connections stand.
    pub peers: Vec<Position>,
    /// Ends that no process has any more: made here to say once more that they are closed.
    pub stand_ins: Vec<StandIn>,
}

impl Network {
    /// Where the other end of a connection stands.
    fn peer(&self, own: &Position) -> Option<&Position> {
        self.peers.iter().find(|p| p.local == own.peer && p.peer == own.local)
    }
}

/// One restore on one node. All calls must come from one thread: ptrace(2) knows its tracer by thread.
pub struct Session {
    part: PartReader,
    options: Options,
    processes: Vec<Process>,
    files: Vec<OpenFile>,
    obstacles: Vec<Obstacle>,
    namespace: bool,
    /// Reads page maps already, where memory may follow.
    server: Option<server::Server>,
    tree: Option<tree::Tree>,
    segments: Option<segments::Segments>,
    built: Option<files::Files>,
}

impl Session {
    /// Reads the part's records and lists what stands in the way.
    pub fn plan(part: PartReader, options: Options) -> Result<Self> {
        crate::sys::task::raise_descriptor_limit().context("raising the limit on open files")?;
        let processes: Vec<Process> = part.read().context("reading the processes")?;
        let files: Vec<OpenFile> = part.read().context("reading the open files")?;
        let (obstacles, namespace) = plan::plan(&processes, &files, &options)?;
        let log = (options.stdio == Stdio::Log).then_some(options.log_directory.as_path());
        let mut wanted = plan::numbers(&processes);
        // A leader that has ended needs its number for a moment, too.
        wanted.extend(processes.iter().flat_map(|process| [process.pgid, process.sid]));
        let server =
            (options.lazy && obstacles.is_empty()).then(|| server::Server::start(&part, &wanted, log));
        Ok(Self {
            server: server.transpose()?,
            part,
            options,
            processes,
            files,
            obstacles,
            namespace,
            tree: None,
            segments: None,
            built: None,
        })
    }

    /// What [`Self::plan`] found in the way.
    pub fn obstacles(&self) -> &[Obstacle] {
        &self.obstacles
    }

    /// The processes to come.
    pub fn processes(&self) -> &[Process] {
        &self.processes
    }

    /// Connections of this part whose other end is finished, with what can stand in for that end.
    pub fn finished(&self) -> Result<Vec<StandIn>> {
        let mut all = Vec::new();
        for file in self.files.iter().filter(|f| f.kind == TcpSocket::KIND) {
            let socket: TcpSocket = objects::decode(file.version, &file.payload)?;
            all.extend(
                socket.position().zip(socket.closed_peer()).map(|(peer, socket)| StandIn { socket, peer }),
            );
        }
        Ok(all)
    }

    /// Makes everything. Nothing of the job runs yet, and its connections do not speak.
    pub fn build(&mut self, network: &Network) -> Result<()> {
        let files = files::Files::rebuild(&self.part, &self.files, &self.processes, &self.options, network)?;
        let layout = layout::Layout::choose(&self.processes)?;
        // Kept from here on: what exists is killed when this session is dropped.
        let spaces = spaces::Spaces::new(&self.processes, &self.files, &files, &self.part, self.options.lazy);
        let segments = self.segments.insert(segments::Segments::new(&self.files, self.namespace)?);
        let tree = tree::Tree::grow(&self.processes, &spaces, segments, layout, self.namespace)?;
        let tree = self.tree.insert(tree);
        segments.fill(&self.part)?;
        let mut incomplete = Vec::new();
        for process in self.processes.iter().filter(|p| p.zombie.is_none()) {
            let stub = tree.stub(process.pid)?;
            let rest = process::rebuild(stub, process, &files, &spaces, layout)
                .with_context(|| format!("rebuilding process {} ({})", process.pid, process.exe))?;
            incomplete.extend(rest);
        }
        files.seal()?;
        segments.complete()?;
        if let Some(server) = self.server.take().filter(|_| !incomplete.is_empty()) {
            server.serve(&incomplete)?;
        }
        self.built = Some(files);
        Ok(())
    }

    /// Lets the connections speak: every end exists, on all nodes.
    pub fn connect(&mut self) -> Result<()> {
        self.built.as_mut().context("nothing was built")?.connect().context("reconnecting")
    }

    /// Lets the job run. Returns the PIDs of the job's root processes as this node sees them.
    pub fn release(mut self) -> Result<Vec<i32>> {
        let tree = self.tree.take().context("nothing was built")?;
        let roots = tree.release(&self.processes)?;
        self.segments.take().into_iter().for_each(segments::Segments::keep);
        Ok(roots)
    }
}
