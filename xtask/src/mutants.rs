//! `mutants`: are the tests worth something? For each kind of state its code is broken on purpose, and the test that
//! sets this state up must fail.

use crate::command::{as_root, cargo, repository, run, shown};
use anyhow::{Context, Result, bail, ensure};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

/// One way to break the code.
struct Mutant {
    /// What is broken.
    name: &'static str,
    /// File below `ckpt-cli/src`.
    file: &'static str,
    /// Text that is there exactly once.
    text: &'static str,
    /// What takes its place.
    instead: &'static str,
    /// File and name of the test that must fail.
    test: (&'static str, &'static str),
}

const fn mutant(
    name: &'static str,
    file: &'static str,
    text: &'static str,
    instead: &'static str,
    test: (&'static str, &'static str),
) -> Mutant {
    Mutant { name, file, text, instead, test }
}

const THREADS: (&str, &str) = ("objects", "threads_with_registers_tls_fpu_and_signals");
const MAPPINGS: (&str, &str) = ("objects", "mappings_of_every_kind");
const SIGNALS: (&str, &str) = ("objects", "signals_and_timers");
const TREES: (&str, &str) = ("objects", "trees_sessions_groups_and_zombies");
const PIPES: (&str, &str) = ("objects", "pipes_and_fifos");
const EVENTS: (&str, &str) = ("objects", "event_descriptors");
const FILES: (&str, &str) = ("objects", "open_files_and_locks");
const CREDENTIALS: (&str, &str) = ("objects", "credentials_and_capabilities");
const UNIX: (&str, &str) = ("objects", "unix_sockets");
const FAMILY: (&str, &str) = ("objects", "forked_children_share_memory");
const HUGE: (&str, &str) = ("objects", "huge_pages_that_nobody_asked_for");
const LATE: (&str, &str) = ("lazy", "every_page_comes_when_it_is_needed");
const FILLER_KILLED: (&str, &str) = ("lazy", "a_job_whose_memory_cannot_come_any_more_is_killed");
const CALLS: (&str, &str) = ("objects", "waiting_calls_do_not_see_the_freeze");
const SOCKETS: (&str, &str) = ("sockets", "sockets_of_every_state_come_back");
const SEGMENTS: (&str, &str) = ("sysv", "segments_come_back_with_the_same_ids");
const CLOSED: (&str, &str) = ("closed", "a_closed_end_on_another_node_is_closed_again");
const GUARDED: (&str, &str) = ("closed", "a_killed_agent_leaves_no_socket_in_repair_mode");
const RINGS: (&str, &str) = ("objects", "io_uring_with_registered_buffers");
const UNDER_WAY: (&str, &str) = ("memory", "reads_by_io_uring_that_are_under_way");
const REGISTERED: (&str, &str) = ("memory", "reads_by_io_uring_into_registered_buffers");

const MUTANTS: &[Mutant] = &[
    mutant(
        "waiting for requests to an io_uring",
        "memory/space.rs",
        "        if !self.settle(frozen, finder)? {\n            return Ok(true);\n        }\n",
        "",
        UNDER_WAY,
    ),
    mutant(
        "pages that an io_uring has pinned",
        "memory/space.rs",
        "written.union(&self.pinned.intersection(&own))",
        "written",
        REGISTERED,
    ),
    mutant(
        "guarding pages that an io_uring has pinned",
        "memory/space.rs",
        "self.lists.previous().difference(&self.pinned)",
        "self.lists.previous().clone()",
        REGISTERED,
    ),
    mutant(
        "buffers registered with an io_uring",
        "rebuild/files.rs",
        "self.rings.insert(record.id, ring.buffers);",
        "self.rings.insert(record.id, Vec::new());",
        RINGS,
    ),
    mutant(
        "registers",
        "rebuild/thread.rs",
        "stopped.set_regs(regs);",
        "let mut regs = regs;\n    regs.rbx ^= 1 << 40;\n    stopped.set_regs(regs);",
        THREADS,
    ),
    mutant(
        "xstate",
        "rebuild/thread.rs",
        "ptrace::set_xstate(stopped.tid, &thread.xstate)",
        "ptrace::xstate(stopped.tid).map(drop)",
        THREADS,
    ),
    mutant(
        "sigmask",
        "rebuild/thread.rs",
        "stopped.set_sigmask(thread.sigmask);",
        "stopped.set_sigmask(0);",
        THREADS,
    ),
    mutant(
        "rseq",
        "rebuild/thread.rs",
        "batch.call(\"rseq\", libc::SYS_rseq, &args);",
        "let _ = args;",
        THREADS,
    ),
    mutant("clear_child_tid", "rebuild/thread.rs", "&[thread.clear_child_tid]", "&[0]", THREADS),
    mutant(
        "altstack",
        "rebuild/thread.rs",
        "batch.call(\"sigaltstack\", libc::SYS_sigaltstack, &[at, 0]);",
        "let _ = at;",
        SIGNALS,
    ),
    mutant(
        "pending signals of the process",
        "rebuild/process.rs",
        "thread::queue(stub.leader()?, &process.pending, true, layout)",
        "thread::queue(stub.leader()?, &[], true, layout)",
        SIGNALS,
    ),
    mutant(
        "pending signals of a thread",
        "rebuild/process.rs",
        "thread::queue(stopped, &record.pending, false, layout)",
        "thread::queue(stopped, &record.pending[..0], false, layout)",
        THREADS,
    ),
    mutant(
        "itimer",
        "rebuild/process.rs",
        "batch.call(\"setitimer\", libc::SYS_setitimer, &[which as u64, at, 0]);",
        "let _ = (which, at);",
        SIGNALS,
    ),
    mutant(
        "posix timer",
        "rebuild/process.rs",
        "batch.call(\"timer_settime\", libc::SYS_timer_settime, &[timer.id as u64, 0, at, 0]);",
        "let _ = at;",
        SIGNALS,
    ),
    mutant(
        "sigaction",
        "rebuild/process.rs",
        "[a.handler, a.flags, a.restorer, a.mask]",
        "[a.handler, a.flags, a.restorer, 0]",
        SIGNALS,
    ),
    mutant(
        "private pages",
        "rebuild/content.rs",
        "writable.push((at, part));",
        "writable.push((at, &part[..part.len() / 4096 * 4088]));",
        MAPPINGS,
    ),
    mutant(
        "zero pages of a mapped file",
        "rebuild/content.rs",
        "if mapping.backing != Backing::Anonymous {",
        "if false {",
        MAPPINGS,
    ),
    mutant(
        "shared: at all",
        "rebuild/spaces.rs",
        "Ok(plan.filter(|plan| plan.shared >= WORTH))",
        "Ok(plan.filter(|_| false))",
        FAMILY,
    ),
    mutant(
        "shared: dropped pages",
        "rebuild/spaces.rs",
        "for range in &plan.discard {",
        "for range in plan.discard.iter().take(0) {",
        FAMILY,
    ),
    mutant(
        "shared: the parent's own pages",
        "rebuild/spaces.rs",
        "let plan = share::rewrite(own.space, &self.base(process)?, own.pages);",
        "let plan = Plan::default();",
        FAMILY,
    ),
    mutant(
        "shared: protection that differs",
        "rebuild/share.rs",
        "plan.protect.push((range.clone(), wanted.prot));",
        "",
        FAMILY,
    ),
    mutant(
        "huge pages",
        "rebuild/spaces.rs",
        "huge::prepare(leader, inheritance.layout, space, pages)?;",
        "",
        HUGE,
    ),
    mutant(
        "late: memory of a child",
        "memory/lazy/mod.rs",
        "let (todo, waiting) = (space.todo.clone(), Vec::new());",
        "let (todo, waiting) = (Todo::default(), Vec::new());",
        LATE,
    ),
    mutant(
        "late: memory that was moved",
        "memory/lazy/mod.rs",
        "space.todo.shift(pages(from..from + len), to / PAGE_SIZE as u64);",
        "let _ = (from, to, len);",
        LATE,
    ),
    mutant(
        "late: memory that was dropped",
        "memory/lazy/mod.rs",
        "Event::Gone { start, end } => drop(space.todo.remove(pages(start..end))),",
        "Event::Gone { start, end } => drop(pages(start..end)),",
        LATE,
    ),
    mutant(
        "late: the watcher",
        "memory/lazy/watch.rs",
        "let _ = pidfd::send_signal(process.as_fd(), libc::SIGKILL);",
        "let _ = process;",
        FILLER_KILLED,
    ),
    mutant(
        "shared anonymous memory",
        "objects/memory_file.rs",
        "(context.fill)(file.content, &out).context(\"restoring shared memory\")?;",
        "",
        MAPPINGS,
    ),
    mutant(
        "position in a directory",
        "objects/path_file.rs",
        "kind == SFlag::S_IFREG || kind == SFlag::S_IFDIR",
        "kind == SFlag::S_IFREG",
        FILES,
    ),
    mutant(
        "segments: content",
        "rebuild/segments.rs",
        "self.made.iter().try_for_each(fill)",
        "self.made.iter().take(0).try_for_each(fill)",
        SEGMENTS,
    ),
    mutant(
        "segments: their ids",
        "rebuild/segments.rs",
        "sysv::choose(segment.id)?;",
        "sysv::choose(segment.id ^ 1 << 20)?;",
        SEGMENTS,
    ),
    mutant(
        "segments: told from memfds",
        "capture/descriptors.rs",
        "self.mapping(pid, map, (sysv::DEVICE, id as u64))?",
        "self.mapping(pid, map, (map.device, id as u64))?",
        SEGMENTS,
    ),
    mutant(
        "segments: content not a memfd's",
        "objects/sysv.rs",
        "context.stage((DEVICE, probe.stat.st_ino), &file)?",
        "context.stage((probe.stat.st_dev, probe.stat.st_ino), &file)?",
        SEGMENTS,
    ),
    mutant(
        "segments: behind the last byte",
        "objects/sysv.rs",
        "attached.set_tail(self.segment.size, &self.segment.tail);",
        "",
        SEGMENTS,
    ),
    mutant(
        "segments: marked for destruction",
        "objects/sysv.rs",
        "        if segment.doomed {\n            sysv::remove",
        "        if false {\n            sysv::remove",
        SEGMENTS,
    ),
    mutant(
        "segments: attached by nobody",
        "capture/descriptors.rs",
        "if ours.is_none() && made.contains(&segment.id) {",
        "if false {",
        SEGMENTS,
    ),
    mutant("segments: gone with the job", "capture/mod.rs", "sysv::remove(&self.files)?;", "", SEGMENTS),
    mutant(
        "segments: read-only attaches",
        "rebuild/files.rs",
        "let read_only = flags & libc::O_ACCMODE == libc::O_RDONLY;",
        "let read_only = flags & libc::O_ACCMODE == libc::O_PATH;",
        SEGMENTS,
    ),
    mutant(
        "segments: their creator",
        "rebuild/segments.rs",
        "batch.call(\"setresuid\", libc::SYS_setresuid, &[KEEP, uid.into(), KEEP]);",
        "let _ = uid;",
        SEGMENTS,
    ),
    mutant(
        "segments: others' attaches",
        "capture/segments.rs",
        "outside.extend(ids.map(|id| (id, process.pid)));",
        "outside.extend(ids.take(0).map(|id| (id, process.pid)));",
        ("sysv", "segments_that_others_have_attached_are_named"),
    ),
    mutant(
        "segments: a namespace of their own",
        "rebuild/segments.rs",
        "if namespace && !wanted.is_empty() {",
        "if namespace && wanted.is_empty() {",
        ("sysv", "a_namespace_has_room_for_all_ids"),
    ),
    mutant(
        "memfd seals",
        "rebuild/files.rs",
        "if file.seals != 0 && file.name.is_some() {",
        "if file.seals == -1 && file.name.is_some() {",
        MAPPINGS,
    ),
    mutant(
        "advice",
        "rebuild/mappings.rs",
        "for advice in &mapping.advice {",
        "for advice in &mapping.advice[..0] {",
        MAPPINGS,
    ),
    mutant(
        "end of the heap",
        "capture/address_space.rs",
        "            brk,\n            stat.startstack,",
        "            stat.start_brk.unwrap_or(brk),\n            stat.startstack,",
        MAPPINGS,
    ),
    mutant(
        "sessions",
        "rebuild/grow.rs",
        "self.call(Origin::Stub(process.pid), \"setsid\", libc::SYS_setsid, &[])?;",
        "self.call(Origin::Stub(process.pid), \"getpid\", libc::SYS_getpid, &[])?;",
        TREES,
    ),
    mutant(
        "process groups",
        "rebuild/grow.rs",
        "libc::SYS_setpgid, &[0, number as u64])?;",
        "libc::SYS_getpgid, &[0, number as u64])?;",
        TREES,
    ),
    mutant(
        "zombies",
        "rebuild/grow.rs",
        "&[(status >> 8 & 0xff) as u64]",
        "&[(status >> 9 & 0x7f) as u64]",
        TREES,
    ),
    mutant(
        "limits",
        "rebuild/process.rs",
        "    limits(stub.leader()?, process, layout)?;",
        "    let _ = limits;",
        TREES,
    ),
    mutant(
        "affinity",
        "rebuild/thread.rs",
        "if !thread.affinity.is_empty()\n",
        "if thread.affinity.len() > 9999\n",
        TREES,
    ),
    mutant(
        "working directory",
        "rebuild/process.rs",
        "libc::SYS_chdir, &[at]);",
        "libc::SYS_access, &[at]);",
        TREES,
    ),
    mutant("umask", "rebuild/process.rs", "&[process.umask.into()]", "&[0o70]", TREES),
    mutant(
        "credentials",
        "rebuild/thread.rs",
        "libc::SYS_setresuid, &[id(real), id(effective), id(saved)]);",
        "libc::SYS_setresuid, &[id(real), id(effective), id(effective)]);",
        CREDENTIALS,
    ),
    mutant(
        "capabilities",
        "rebuild/thread.rs",
        "for set in [effective, permitted, inheritable] {",
        "for set in [effective, permitted, 0 * inheritable] {",
        CREDENTIALS,
    ),
    mutant(
        "file position",
        "objects/path_file.rs",
        "file.position as i64",
        "0 * file.position as i64",
        FILES,
    ),
    mutant(
        "content of a deleted file",
        "objects/path_file.rs",
        "(context.fill)(memory, &out).with_context(|| format!(\"restoring the deleted file {path}\"))?;",
        "let _ = memory;",
        FILES,
    ),
    mutant(
        "flock",
        "objects/path_file.rs",
        "if let Some(kind) = file.flock {",
        "if let Some(kind) = file.flock.filter(|kind| *kind == -1) {",
        FILES,
    ),
    mutant(
        "record locks",
        "rebuild/descriptors.rs",
        "in files.locks(process) {",
        "in files.locks(process).into_iter().take(0) {",
        FILES,
    ),
    mutant(
        "content of a pipe",
        "objects/pipe.rs",
        "let mut rest = pipe.data.as_deref().unwrap_or_default();",
        "let mut rest: &[u8] = &pipe.data.as_deref().unwrap_or_default()[..0];",
        PIPES,
    ),
    mutant(
        "capacity of a pipe",
        "objects/pipe.rs",
        "FcntlArg::F_SETPIPE_SZ(pipe.capacity as i32)",
        "FcntlArg::F_GETPIPE_SZ",
        PIPES,
    ),
    mutant("eventfd", "objects/anonymous.rs", "fd.write(event.count)", "fd.write(1)", EVENTS),
    mutant(
        "epoll data",
        "rebuild/descriptors.rs",
        "&target.data.to_ne_bytes()",
        "&(target.data ^ 1 << 40).to_ne_bytes()",
        EVENTS,
    ),
    mutant(
        "timerfd",
        "objects/anonymous.rs",
        "let first = spec(timer.value.max(1));",
        "let first = spec(timer.value.max(1) + 3_600_000_000_000);",
        EVENTS,
    ),
    mutant(
        "signalfd",
        "objects/anonymous.rs",
        "ioctl::signalfd(signals.mask)",
        "ioctl::signalfd(0 * signals.mask)",
        EVENTS,
    ),
    mutant(
        "queue of a Unix socket",
        "objects/unix/rebuild.rs",
        "for message in &record.messages {",
        "for message in &record.messages[..0] {",
        UNIX,
    ),
    mutant(
        "descriptors in flight",
        "objects/unix/rebuild.rs",
        "unix_socket::send(sender.as_fd(), rest, &fds, to)",
        "unix_socket::send(sender.as_fd(), rest, &fds[..0], to)",
        UNIX,
    ),
    mutant(
        "names of Unix sockets",
        "objects/unix/rebuild.rs",
        "            bind(&connecting, client)?;",
        "            let _ = client;",
        UNIX,
    ),
    mutant(
        "what a TCP socket sends",
        "objects/tcp/rebuild.rs",
        "send_all(fd, unsent)?;",
        "send_all(fd, &unsent[..0])?;",
        SOCKETS,
    ),
    mutant(
        "what a TCP socket has received",
        "objects/tcp/repair.rs",
        "let piece = &data[done..data.len().min(done + PIECE)];",
        "let piece = &vec![0; data.len().min(done + PIECE) - done][..];",
        SOCKETS,
    ),
    mutant(
        "queue of a UDP socket",
        "objects/udp/mod.rs",
        "for datagram in datagrams {",
        "for datagram in &datagrams[..0] {",
        SOCKETS,
    ),
    mutant(
        "EINTR of the freeze",
        "tracee/registers.rs",
        "if in_syscall(regs) && regs.rax as i64 == EINTR && !signal_waits {",
        "if in_syscall(regs) && regs.rax as i64 == EINTR && !signal_waits && regs.rip == 0 {",
        CALLS,
    ),
    mutant(
        "closed ends on other nodes",
        "cluster/coordinator/restore.rs",
        "tasks[place].stand_ins.push(stand_in.clone());",
        "let _ = place;",
        CLOSED,
    ),
    mutant("guard", "capture/descriptors.rs", "guard.watch(probe.file.as_fd())?;", "let _ = guard;", GUARDED),
];

/// What came of one mutant.
#[derive(PartialEq)]
enum Verdict {
    /// The test failed, as it must.
    Killed,
    /// The test did not notice.
    Survived,
    /// The test fails without the mutant, too: it says nothing.
    Red,
    /// The mutant cannot be made.
    Broken(String),
}

/// Makes every mutant whose name contains one of the words (all, without words) in a copy of the last commit, and runs
/// the test that must fail.
///
/// # Errors
/// A mutant survived, its text is not in the code any more, or its test fails anyway.
pub(crate) fn mutants(words: &[String]) -> Result<()> {
    let wanted = |m: &&Mutant| words.is_empty() || words.iter().any(|word| m.name.contains(word.as_str()));
    let chosen: Vec<_> = MUTANTS.iter().filter(wanted).collect();
    ensure!(!chosen.is_empty(), "no mutant has such a name");
    let copy = Copy::make()?;
    let programs = copy.tests()?;
    let (mut green, mut bad) = (BTreeMap::new(), 0);
    for mutant in chosen {
        let start = Instant::now();
        let verdict = copy.check(mutant, &programs, &mut green);
        let verdict = verdict.unwrap_or_else(|error| Verdict::Broken(format!("{error:#}")));
        bad += usize::from(verdict != Verdict::Killed);
        let text = match &verdict {
            Verdict::Killed => "killed",
            Verdict::Survived => "SURVIVED",
            Verdict::Red => "UNKNOWN: its test fails without it, too",
            Verdict::Broken(why) => &format!("BROKEN: {why}"),
        };
        let (file, test) = mutant.test;
        println!("{:32} {file}::{test:52} {:4} s  {text}", mutant.name, start.elapsed().as_secs());
    }
    ensure!(bad == 0, "{bad} mutants were not killed");
    Ok(())
}

/// A copy of the last commit, which goes with this value.
struct Copy {
    tree: PathBuf,
}

impl Copy {
    fn make() -> Result<Self> {
        let copy = Self { tree: repository().join("target/mutants/tree") };
        copy.remove();
        fs::create_dir_all(repository().join("target/mutants"))?;
        run(git().args(["worktree", "add", "--quiet", "--detach"]).arg(&copy.tree).arg("HEAD"))?;
        Ok(copy)
    }

    /// What an earlier run may have left is no error, and neither is nothing.
    fn remove(&self) {
        let _ = fs::remove_dir_all(&self.tree);
        let _ = git().args(["worktree", "prune"]).status();
    }

    fn cargo(&self) -> Command {
        let mut command = cargo();
        command.current_dir(&self.tree).env("CARGO_TARGET_DIR", repository().join("target/mutants/build"));
        command
    }

    /// Builds all test programs, once: they use the mutants as separate programs. Their paths by name.
    fn tests(&self) -> Result<BTreeMap<String, PathBuf>> {
        let mut command = self.cargo();
        command.args(["test", "--package", "ckpt-tests", "--no-run", "--message-format=json"]);
        let output = command.stderr(Stdio::inherit()).output().context("building the tests")?;
        ensure!(output.status.success(), "{}: {}", shown(&command), output.status);
        let mut programs = BTreeMap::new();
        for line in String::from_utf8_lossy(&output.stdout).lines() {
            let message: serde_json::Value = serde_json::from_str(line).context("a message of cargo")?;
            if let (Some(path), Some(name)) =
                (message["executable"].as_str(), message["target"]["name"].as_str())
            {
                programs.insert(name.to_owned(), path.into());
            }
        }
        Ok(programs)
    }

    fn build(&self) -> Result<()> {
        let mut command = self.cargo();
        command.args(["build", "--quiet", "--package", "ckpt-cli", "--bin", "ckpt"]);
        let output = command.output().context("building ckpt")?;
        if !output.status.success() {
            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            bail!(
                "it does not build: {}",
                text.lines().find(|line| line.starts_with("error")).unwrap_or(&text)
            );
        }
        Ok(())
    }

    fn check(
        &self,
        mutant: &Mutant,
        programs: &BTreeMap<String, PathBuf>,
        green: &mut BTreeMap<&'static str, bool>,
    ) -> Result<Verdict> {
        let (file, test) = mutant.test;
        let program = programs.get(file).with_context(|| format!("there is no test file {file}"))?;
        let path = self.tree.join("ckpt-cli/src").join(mutant.file);
        let source = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let count = source.matches(mutant.text).count();
        ensure!(count == 1, "its text is {count} times in {}", mutant.file);
        if !green.contains_key(test) {
            self.build()?;
            green.insert(test, passes(program, test, &self.tree)?);
        }
        if !green[test] {
            return Ok(Verdict::Red);
        }
        fs::write(&path, source.replacen(mutant.text, mutant.instead, 1))?;
        let passed = self.build().and_then(|()| passes(program, test, &self.tree));
        fs::write(&path, source)?;
        Ok(if passed? { Verdict::Survived } else { Verdict::Killed })
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        self.remove();
    }
}

fn git() -> Command {
    let mut command = Command::new("git");
    command.current_dir(repository());
    command
}

/// Runs one test; its output is of interest only to those who look at a survivor more closely.
fn passes(program: &Path, test: &str, tree: &Path) -> Result<bool> {
    let mut command = as_root(&program.display().to_string());
    command.args(["--exact", test]).current_dir(tree.join("tests")).stdin(Stdio::null());
    let output = command.output().with_context(|| shown(&command))?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(text.contains("running 1 test"), "there is no test {test}");
    Ok(output.status.success())
}
