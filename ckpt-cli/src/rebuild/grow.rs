//! Growing the tree of stubs: who is cloned from whom, so that parents, sessions and groups come out right.
//!
//! A session is inherited at fork, so a child of a session leader that is in an older session must be cloned before
//! the leader calls setsid(2). A dead leader of a session or group is played by a helper until its members are there.

use super::layout::Layout;
use super::mappings;
use super::seed::{self, Inheritance};
use super::segments::Segments;
use super::spaces::Spaces;
use super::tree::{self, Helper, Stub, Tree};
use crate::sys::task;
use crate::tracee::{Batch, Stopped, TraceeError};
use anyhow::{Context as _, Result, bail};
use ckpt_common::image::process::Process;
use std::collections::BTreeMap;

const CLONE_PARENT: u64 = libc::CLONE_PARENT as u64;

/// State of the growth.
pub(super) struct Grower<'a, 's> {
    tree: Tree,
    seed: Option<Stopped>,
    inheritance: Inheritance,
    processes: BTreeMap<i32, &'a Process>,
    spaces: &'a Spaces<'s>,
}

/// From whom a process is cloned.
#[derive(Clone, Copy, Debug)]
enum Origin {
    Seed,
    Stub(i32),
    Helper(i32),
}

/// A zombie without parent in the job was left to init to reap: it does not come back.
fn wanted(process: &Process) -> bool {
    process.zombie.is_none() || process.ppid != 0
}

impl<'a, 's> Grower<'a, 's> {
    /// Makes a stub for every process.
    pub(super) fn grow(
        processes: &'a [Process],
        spaces: &'a Spaces<'s>,
        segments: &mut Segments,
        layout: Layout,
        namespace: bool,
    ) -> Result<Tree> {
        // Above every descriptor of the job, and above the files that are mapped before there are any.
        let fds = processes.iter().flat_map(|p| &p.fds).map(|d| d.fd).max().unwrap_or(0);
        let mapped = processes.iter().map(|p| mappings::mapped(&p.mm).len()).max().unwrap_or(0);
        let above = fds.max(mapped as i32);
        let seed = seed::grow(layout, namespace, above)?;
        let mut grower = Self {
            tree: Tree {
                stubs: BTreeMap::new(),
                helpers: BTreeMap::new(),
                parent: Some(seed.parent),
                layout,
            },
            seed: Some(seed.stub),
            inheritance: seed.inheritance,
            processes: processes.iter().filter(|p| wanted(p)).map(|p| (p.pid, p)).collect(),
            spaces,
        };
        let grown = segments.make(grower.stopped(Origin::Seed)?, layout).and_then(|()| grower.all());
        let Self { mut tree, seed, .. } = grower;
        if let Some(seed) = seed {
            tree::kill(seed)?;
        }
        grown?;
        for helper in std::mem::take(&mut tree.helpers).into_values() {
            let pid = helper.stopped.ns.0;
            tree::kill(helper.stopped)?;
            if let Some(parent) = helper.parent {
                let mut batch = Batch::new(layout.arena);
                batch.call("reaping a helper", libc::SYS_wait4, &[pid as u64, 0, libc::__WALL as u64, 0]);
                tree.stub(parent)?.leader()?.run(batch, false)?.all_ok()?;
            }
        }
        if let Some(launcher) = tree.parent.take_if(|_| !namespace) {
            tree::kill(launcher)?;
        }
        Ok(tree)
    }

    fn all(&mut self) -> Result<()> {
        let mut roots: Vec<&Process> = self.processes.values().copied().filter(|p| p.ppid == 0).collect();
        roots.sort_unstable_by_key(|p| (p.sid != p.pid, p.pid));
        for root in roots {
            self.root(root).with_context(|| format!("creating process {}", root.pid))?;
        }
        if let Some(left) = self.processes.keys().find(|pid| !self.tree.stubs.contains_key(pid)) {
            bail!("process {left} cannot be created: its parent is not in the image");
        }
        self.groups()?;
        for process in self.processes.values().copied().collect::<Vec<_>>() {
            if let Some(status) = process.zombie {
                self.zombie(process.pid, status).with_context(|| format!("ending zombie {}", process.pid))?;
            }
        }
        Ok(())
    }

    fn stopped(&mut self, origin: Origin) -> Result<&mut Stopped> {
        match origin {
            Origin::Seed => self.seed.as_mut().context("the first stub is gone"),
            Origin::Stub(pid) => self.tree.stub(pid)?.leader(),
            Origin::Helper(pid) => {
                Ok(&mut self.tree.helpers.get_mut(&pid).context("a helper is gone")?.stopped)
            }
        }
    }

    /// Clones a process. Where it shares memory with a stub that it comes from, that has its own by then.
    fn clone(&mut self, origin: Origin, pid: i32, flags: u64) -> Result<()> {
        let layout = self.tree.layout;
        let holds = self.ready(origin, pid)?;
        let stopped = seed::clone_process(self.stopped(origin)?, layout, Some(pid), flags)?;
        let inheritance = self.inheritance.clone();
        self.tree.stubs.insert(pid, Stub { inheritance, holds, threads: vec![stopped] });
        Ok(())
    }

    /// Makes the memory of the stub that process `pid` is going to be cloned from, if the two share some. Gives the
    /// process whose memory a clone has.
    fn ready(&mut self, origin: Origin, pid: i32) -> Result<Option<i32>> {
        let from = match origin {
            Origin::Seed => return Ok(None),
            Origin::Helper(helper) => return Ok(self.tree.helpers.get(&helper).and_then(|h| h.holds)),
            Origin::Stub(from) => from,
        };
        let spaces = self.spaces;
        let stub = self.tree.stub(from)?;
        if spaces.share(from, pid)? {
            stub.prepare(spaces, from)?;
        }
        Ok(stub.holds)
    }

    fn call(&mut self, origin: Origin, name: &str, number: i64, args: &[u64]) -> Result<i64> {
        let mut batch = Batch::new(self.tree.layout.arena);
        let call = batch.call(name, number, args);
        Ok(self.stopped(origin)?.run(batch, false)?.result(call)?)
    }

    /// A process without parent in the job, and everything below it.
    fn root(&mut self, root: &'a Process) -> Result<()> {
        if self.tree.stubs.contains_key(&root.pid) {
            return Ok(());
        }
        let origin = match root.sid {
            // A leader outside its PID namespace shows as 0.
            0 => Origin::Seed,
            sid if sid == root.pid => Origin::Seed,
            sid if self.processes.contains_key(&sid) => {
                if !self.tree.stubs.contains_key(&sid) {
                    let top = self.top(sid);
                    self.root(top)?;
                }
                Origin::Stub(sid)
            }
            sid => self.helper(sid)?,
        };
        // A sibling of the first stub or of its own: either way our child, or that of the namespace's init.
        let flags = match origin {
            Origin::Stub(leader) if self.processes[&leader].ppid != 0 => return self.orphan(root, leader),
            _ => CLONE_PARENT,
        };
        self.clone(origin, root.pid, flags)?;
        self.below(root, root.sid)
    }

    fn top(&self, pid: i32) -> &'a Process {
        let mut process = self.processes[&pid];
        while let Some(parent) = self.processes.get(&process.ppid) {
            process = parent;
        }
        process
    }

    /// A process whose parent died, in the session of a leader that has a parent: cloned from a child of the leader
    /// that ends.
    fn orphan(&mut self, root: &'a Process, leader: i32) -> Result<()> {
        let layout = self.tree.layout;
        let holds = self.ready(Origin::Stub(leader), root.pid)?;
        let between = seed::clone_process(self.stopped(Origin::Stub(leader))?, layout, None, 0)?;
        let key = between.pid;
        self.tree.helpers.insert(key, Helper { stopped: between, parent: Some(leader), holds });
        self.clone(Origin::Helper(key), root.pid, 0)?;
        // Its end makes the process an orphan; the leader reaps it when its signals are reset.
        self.below(root, root.sid)
    }

    /// A helper that leads a session in the place of a process that is not in the job.
    fn helper(&mut self, sid: i32) -> Result<Origin> {
        if !self.tree.helpers.contains_key(&sid) {
            let layout = self.tree.layout;
            let seed = self.stopped(Origin::Seed)?;
            let helper = match seed::clone_process(seed, layout, Some(sid), CLONE_PARENT) {
                Ok(helper) => helper,
                // The number is in use: the session gets another one.
                Err(e) if taken(&e) => seed::clone_process(seed, layout, None, CLONE_PARENT)?,
                Err(e) => return Err(e),
            };
            self.tree.helpers.insert(sid, Helper { stopped: helper, parent: None, holds: None });
            self.call(Origin::Helper(sid), "setsid", libc::SYS_setsid, &[])?;
        }
        Ok(Origin::Helper(sid))
    }

    /// The children of a process that is in session `inherited`, and the process's own setsid(2) in between.
    fn below(&mut self, process: &'a Process, inherited: i32) -> Result<()> {
        let leads = process.sid == process.pid;
        let children: Vec<&'a Process> =
            self.processes.values().copied().filter(|p| p.ppid == process.pid).collect();
        // Those that share nothing are cloned before there is memory that they would have to drop.
        let mut children = children
            .into_iter()
            .map(|child| Ok((self.spaces.share(process.pid, child.pid)?, child)))
            .collect::<Result<Vec<_>>>()?;
        children.sort_by_key(|(share, _)| *share);
        let children = children.into_iter().map(|(_, child)| child);
        let (older, newer): (Vec<_>, Vec<_>) =
            children.partition(|c| leads && c.sid != c.pid && c.sid != process.sid);
        for child in older {
            self.child(process, child, child.sid)?;
        }
        if leads {
            self.call(Origin::Stub(process.pid), "setsid", libc::SYS_setsid, &[])?;
        }
        let session = if leads { process.sid } else { inherited };
        for child in newer {
            if child.sid != child.pid && child.sid != session {
                bail!(
                    "process {} is in session {}, which its parent {} is not",
                    child.pid,
                    child.sid,
                    process.pid
                );
            }
            self.child(process, child, session)?;
        }
        Ok(())
    }

    fn child(&mut self, parent: &'a Process, child: &'a Process, session: i32) -> Result<()> {
        self.clone(Origin::Stub(parent.pid), child.pid, 0)
            .with_context(|| format!("creating process {}", child.pid))?;
        self.below(child, session)
    }

    /// Process groups: leaders first, then those that join.
    fn groups(&mut self) -> Result<()> {
        let all: Vec<&Process> =
            self.processes.values().copied().filter(|p| p.sid != p.pid && p.pgid != 0).collect();
        for process in all.iter().filter(|p| p.pgid == p.pid) {
            self.call(Origin::Stub(process.pid), "setpgid", libc::SYS_setpgid, &[0, 0])?;
        }
        for process in all.iter().filter(|p| p.pgid != p.pid) {
            let group = process.pgid;
            let known = self.processes.contains_key(&group) || self.tree.helpers.contains_key(&group);
            if !known {
                let layout = self.tree.layout;
                let member = self.stopped(Origin::Stub(process.pid))?;
                match seed::clone_process(member, layout, Some(group), 0) {
                    Ok(stopped) => {
                        let parent = Some(process.pid);
                        self.tree.helpers.insert(group, Helper { stopped, parent, holds: None });
                        self.call(Origin::Helper(group), "setpgid", libc::SYS_setpgid, &[0, 0])?;
                    }
                    Err(e) if taken(&e) => {
                        tracing::warn!(
                            "process group {group} is in use on this node; {} gets another",
                            process.pid
                        );
                        self.call(Origin::Stub(process.pid), "setpgid", libc::SYS_setpgid, &[0, 0])?;
                        continue;
                    }
                    Err(e) => return Err(e),
                }
            }
            // A helper whose number was in use leads a group with another number.
            let number = self.tree.helpers.get(&group).map_or(group, |h| h.stopped.ns.0);
            self.call(Origin::Stub(process.pid), "setpgid", libc::SYS_setpgid, &[0, number as u64])?;
        }
        Ok(())
    }

    /// Ends a stub the way the zombie ended.
    fn zombie(&mut self, pid: i32, status: i32) -> Result<()> {
        let mut stub = self.tree.stubs.remove(&pid).context("it has no stub")?;
        let stopped = stub.threads.pop().context("it has no thread")?;
        let mut batch = Batch::new(self.tree.layout.arena);
        let signal = status & 0x7f;
        if signal == 0 {
            batch.call("exit_group", libc::SYS_exit_group, &[(status >> 8 & 0xff) as u64]);
        } else {
            // No core dump of a stub.
            task::set_limit(stopped.pid, libc::RLIMIT_CORE, 0, 0).context("forbidding core dumps")?;
            // A stub ignores what the ckpt does that it was made from, such as SIGPIPE.
            if ![libc::SIGKILL, libc::SIGSTOP].contains(&signal) {
                let default = batch.bytes(&[0; 32]);
                batch.call("rt_sigaction", libc::SYS_rt_sigaction, &[signal as u64, default, 0, 8]);
            }
            let (tgid, tid) = stopped.ns;
            batch.call("tgkill", libc::SYS_tgkill, &[tgid as u64, tid as u64, signal as u64]);
        }
        stopped.run_to_end(batch, signal)?;
        Ok(())
    }
}

pub(super) fn taken(error: &anyhow::Error) -> bool {
    matches!(
        error.downcast_ref::<TraceeError>(),
        Some(TraceeError::Call { source, .. }) if source.raw_os_error() == Some(libc::EEXIST)
    )
}
