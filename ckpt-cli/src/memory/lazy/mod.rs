//! Memory that follows its processes: they run at once, and a page that is missing comes when it is needed.
//!
//! A userfaultfd in *missing* mode ([`FEATURES`]) tells which page a thread waits for; between such faults the rest is
//! filled in ([`LazyFill::run`]). What a program does meanwhile with memory that has not come yet is told by events, and
//! done to the list of pages to come ([`todo`]): a fork has a list of its own from then on, moved mappings move it,
//! dropped pages leave it. A missing page that is not on the list is zero. When nothing is left to come, the userfaultfds
//! are closed and everything is as if it had never been otherwise.
//!
//! [`server`] is the process that does this; it outlives `ckpt restore`. [`watch`] is what happens if it is killed.

pub mod server;
mod todo;
mod watch;

use crate::store::{PartReader, Piece, StoreError, Unpacking};
use crate::sys::userfaultfd::{Event, Userfaultfd, feature};
use crate::tracee::proc;
use anyhow::{Context as _, Result};
use ckpt_common::image::{MemoryId, PAGE_SIZE};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use todo::{Todo, pages};
use watch::Watcher;

/// What the userfaultfds are enabled with. Writes are not tracked yet, but could be later, by registering once more.
pub const FEATURES: u64 = feature::EVENT_FORK
    | feature::EVENT_REMAP
    | feature::EVENT_REMOVE
    | feature::EVENT_UNMAP
    | feature::PAGEFAULT_FLAG_WP
    | feature::WP_UNPOPULATED
    | feature::WP_ASYNC;

/// Pages that are filled before somebody is asked again whether he waits: a fraction of a millisecond.
const BATCH: u64 = 64;
/// Zero pages that are given for one that is missing: its neighbours will be needed next.
const ZEROS: u64 = 16;
/// How often a look is taken whether the watcher lives, in ms.
const LOOK: u16 = 200;

/// An address space that is not complete.
#[derive(Debug)]
pub struct Space {
    /// Sees its faults: non-blocking, enabled with [`FEATURES`], its ranges registered.
    pub uffd: Userfaultfd,
    /// A process that has it, as we see its PID.
    pub pid: i32,
    /// Its pages in the part.
    pub memory: MemoryId,
    /// The registered ranges of addresses.
    pub ranges: Vec<(u64, u64)>,
}

/// Fills address spaces from a part.
pub struct LazyFill {
    part: PartReader,
    unpacking: Unpacking,
    spaces: Vec<Filling>,
    /// All processes that are known to have one of them.
    pids: BTreeSet<i32>,
    background: bool,
    turn: usize,
}

struct Filling {
    uffd: Userfaultfd,
    todo: Todo,
    /// Faults that could not be answered, because mappings were being changed.
    waiting: Vec<u64>,
    gone: bool,
}

/// How far an attempt has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Put {
    Done,
    /// Mappings are being changed: events have to be read first.
    Again,
    /// There is no such address space any more.
    Gone,
}

/// A part whose memory is to come, before it is known to where.
#[derive(Debug)]
pub struct Prepared {
    part: PartReader,
    todos: BTreeMap<MemoryId, Todo>,
}

impl Prepared {
    /// Reads the page maps.
    ///
    /// # Errors
    /// A pack is missing, or the part is damaged.
    pub fn new(part: PartReader) -> Result<Self> {
        // A checkpoint may be removed from the store while memory still comes from it.
        part.open_packs()?;
        let todo = |id| Ok((id, Todo::new(part.page_map(id)?)));
        let todos = part.memories().into_iter().map(todo).collect::<Result<_>>()?;
        Ok(Self { part, todos })
    }

    /// Whom to fill. `background`: is more filled than what is asked for?
    ///
    /// # Errors
    /// The part has no such memory.
    pub fn fill(self, spaces: Vec<Space>, background: bool) -> Result<LazyFill> {
        let Self { part, mut todos } = self;
        let pids = spaces.iter().map(|space| space.pid).collect();
        let spaces = spaces.into_iter().map(|space| {
            let todo = todos.remove(&space.memory).context("the part has no such memory")?;
            let todo = todo.within(&space.ranges);
            Ok(Filling { uffd: space.uffd, todo, waiting: Vec::new(), gone: false })
        });
        let spaces = spaces.collect::<Result<_>>()?;
        Ok(LazyFill { part, unpacking: Unpacking::new()?, spaces, pids, background, turn: 0 })
    }
}

impl LazyFill {
    /// Serves faults, and fills in between, until everything is there or nobody needs it any more. Who connects to a
    /// listener is held until then.
    ///
    /// # Errors
    /// A page cannot be had: the processes cannot go on. That they do not is the watcher's business.
    pub fn run(mut self, listeners: &[UnixListener]) -> Result<()> {
        let mut watcher = self.watch()?;
        let mut clients: Vec<UnixStream> = Vec::new();
        loop {
            self.spaces.retain(|space| !space.gone);
            if self.spaces.iter().all(|space| space.todo.is_empty() && space.waiting.is_empty()) {
                break;
            }
            let (known, happened) = (self.spaces.len(), self.wait(listeners, &mut clients)?);
            for index in 0..known {
                self.events(index)?;
            }
            if self.spaces.len() > known || watcher.is_gone() {
                // Descendants, too: one whose parent ends is not found any more.
                self.pids = self.pids.iter().flat_map(|pid| proc::tree(*pid)).collect();
                std::mem::replace(&mut watcher, self.watch()?).dismiss();
            }
            match happened {
                false if self.background => self.fill()?,
                false => self.spaces.iter_mut().for_each(Filling::look),
                true => {}
            }
        }
        watcher.dismiss();
        // Nothing is registered any more when those go on that are held.
        drop(self);
        drop(clients);
        Ok(())
    }

    fn watch(&self) -> Result<Watcher> {
        Watcher::start(&self.pids.iter().copied().collect::<Vec<_>>())
    }

    /// Waits until something happens, or not at all if there is something to do. Has anything happened?
    fn wait(&self, listeners: &[UnixListener], clients: &mut Vec<UnixStream>) -> Result<bool> {
        let busy = self.spaces.iter().any(|space| !space.waiting.is_empty());
        let busy = busy || self.background && self.spaces.iter().any(|space| !space.todo.is_empty());
        let timeout = if busy { PollTimeout::ZERO } else { PollTimeout::from(LOOK) };
        let all =
            self.spaces.iter().map(|space| space.uffd.as_fd()).chain(listeners.iter().map(|l| l.as_fd()));
        let mut fds: Vec<PollFd<'_>> = all.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
        match poll(&mut fds, timeout) {
            Err(nix::Error::EINTR) => return Ok(false),
            result => result.context("waiting for faults")?,
        };
        let (spaces, asked) = fds.split_at(self.spaces.len());
        for (listener, _) in listeners.iter().zip(asked).filter(|(_, fd)| fd.any() == Some(true)) {
            clients.extend(listener.accept().map(|(client, _)| client));
        }
        Ok(spaces.iter().any(|fd| fd.any() == Some(true)))
    }

    /// Takes note of what has happened in an address space, in order, and then answers its faults.
    fn events(&mut self, index: usize) -> Result<()> {
        let mut children = Vec::new();
        let space = &mut self.spaces[index];
        let events = match space.uffd.events() {
            Ok(events) => events,
            // Interrupted, or nothing after all.
            Err(error) if error.raw_os_error() == Some(libc::EINTR) => Vec::new(),
            Err(error) => return Err(error).context("reading from a userfaultfd"),
        };
        for event in events {
            match event {
                Event::Fault(fault) => space.waiting.push(fault.address / PAGE_SIZE as u64),
                Event::Fork(uffd) => {
                    let (todo, waiting) = (space.todo.clone(), Vec::new());
                    children.push(Filling { uffd, todo, waiting, gone: false });
                }
                Event::Remap { from, to, len } => {
                    space.todo.shift(pages(from..from + len), to / PAGE_SIZE as u64);
                }
                Event::Gone { start, end } => drop(space.todo.remove(pages(start..end))),
            }
        }
        self.spaces.extend(children);
        for page in std::mem::take(&mut self.spaces[index].waiting) {
            match self.serve(index, page)? {
                Put::Done => {}
                Put::Again => self.spaces[index].waiting.push(page),
                Put::Gone => self.spaces[index].gone = true,
            }
        }
        Ok(())
    }

    /// Brings a page that somebody waits for, and what is stored next to it.
    fn serve(&mut self, index: usize, page: u64) -> Result<Put> {
        match self.spaces[index].todo.find(page) {
            Some(run) => self.bring(index, &[run]),
            None => {
                let space = &self.spaces[index];
                // Up to the next page that has content, and not beyond the neighbours.
                let end = (page + 1..page + ZEROS).find(|next| space.todo.find(*next).is_some());
                let end = end.unwrap_or(page + ZEROS);
                match put(&space.uffd, page, end, |from, to| space.uffd.zero(from, to))? {
                    Put::Again if end > page + 1 => {
                        put(&space.uffd, page, page + 1, |from, to| space.uffd.zero(from, to))
                    }
                    done => Ok(done),
                }
            }
        }
    }

    /// Fills some pages that nobody waits for.
    fn fill(&mut self) -> Result<()> {
        let count = self.spaces.len();
        let next = (self.turn..self.turn + count).map(|n| n % count);
        let Some(index) = next.into_iter().find(|n| !self.spaces[*n].todo.is_empty()) else { return Ok(()) };
        let runs = self.spaces[index].todo.first(BATCH);
        match self.bring(index, &runs)? {
            Put::Gone => self.spaces[index].gone = true,
            // One address space after the other: neighbours in memory are neighbours on the disk.
            Put::Done => self.turn = index,
            Put::Again => self.turn = index + 1,
        }
        Ok(())
    }

    /// Unpacks pages and puts them in their places. What is there is not to come any more.
    fn bring(&mut self, index: usize, runs: &[ckpt_common::image::pages::PageRun]) -> Result<Put> {
        let Self { part, unpacking, spaces, .. } = self;
        let space = &mut spaces[index];
        let result = Cell::new(Put::Done);
        let todo = std::cell::RefCell::new(&mut space.todo);
        part.gather::<Failed>(runs, unpacking, |pieces| {
            for Piece { page, data, .. } in pieces.iter().copied() {
                if result.get() != Put::Done {
                    break;
                }
                let end = page + (data.len() / PAGE_SIZE) as u64;
                let first = page * PAGE_SIZE as u64;
                let content = |from: u64, to: u64| &data[(from - first) as usize..(to - first) as usize];
                result.set(put(&space.uffd, page, end, |from, to| {
                    space.uffd.copy(from, content(from, to), false)
                })?);
                if result.get() == Put::Done {
                    todo.borrow_mut().remove(page..end);
                }
            }
            Ok(())
        })
        .map_err(|Failed(error)| error)?;
        Ok(result.get())
    }
}

impl Filling {
    /// Is the address space gone? Of that there is no event.
    fn look(&mut self) {
        let page = self.todo.first(1).first().map_or(0, |run| run.page.get());
        let (start, end) = (page * PAGE_SIZE as u64, (page + 1) * PAGE_SIZE as u64);
        // Nothing is protected; only the address space is looked for.
        let tried = self.uffd.write_protect(start, end, false);
        self.gone |= tried.is_err_and(|error| error.raw_os_error() == Some(libc::ESRCH));
    }
}

/// An error of any kind, as the store's reader passes it through.
struct Failed(anyhow::Error);

impl From<StoreError> for Failed {
    fn from(error: StoreError) -> Self {
        Self(error.into())
    }
}

impl From<anyhow::Error> for Failed {
    fn from(error: anyhow::Error) -> Self {
        Self(error)
    }
}

/// Puts pages in their places, all at once if that is possible. Pages that are there already stay as they are; whoever
/// waits for one of them goes on.
fn put(uffd: &Userfaultfd, page: u64, end: u64, how: impl Fn(u64, u64) -> io::Result<()>) -> Result<Put> {
    let size = PAGE_SIZE as u64;
    // An error says nothing of how far it came, and may be about any page: then each for itself.
    if how(page * size, end * size).is_ok() {
        return Ok(Put::Done);
    }
    for page in page..end {
        let (from, to) = (page * size, (page + 1) * size);
        match how(from, to).map_err(|error| (error.raw_os_error(), error)) {
            Ok(()) => {}
            Err((Some(libc::EEXIST), _)) => {
                uffd.wake(from, to).context("waking who waits for a page")?;
            }
            // Not mapped, or not ours, any more: nobody waits.
            Err((Some(libc::ENOENT), _)) => {}
            Err((Some(libc::EAGAIN), _)) => return Ok(Put::Again),
            Err((Some(libc::ESRCH), _)) => return Ok(Put::Gone),
            Err((_, error)) => return Err(error).with_context(|| format!("filling memory at {from:#x}")),
        }
    }
    Ok(Put::Done)
}
