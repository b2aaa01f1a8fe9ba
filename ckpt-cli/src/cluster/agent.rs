//! One node's side: `ckpt serve`.
//!
//! The calling thread does the work, since ptrace(2) knows its tracer by thread. A thread reads
//! requests, one sends signs of life, one watches whether the coordinator still gives any. When it
//! does not (end of input, or silence), the session is dropped, which lets the job run on; when the
//! working thread is stuck and cannot do even that, the process kills itself, and the kernel and
//! the self-healing of stopped threads do the rest.

use super::{
    awake::Awake,
    engine::{DumpSession, Engine, Outcome, RestoreSession},
    error::{Classified, failure_of},
    fault::Faults,
    frames::{FrameReader, FrameWriter},
    requests::Requests,
};
use crate::{
    job::selector,
    store::{Compress, PartOptions, PartWriter, Store, StoreError, Watch},
};
use anyhow::{Context, Result, anyhow, bail};
use ckpt_common::{
    image::manifest::{NodeAddress, PartRef},
    wire::{
        DumpTask, FailureClass, Hello, Phase, PlanReport, Request, Response, RestoreReport, RestoreTask,
        SaveReport, Selector,
    },
};
use crossbeam_channel::{Receiver, RecvTimeoutError};
use std::{
    io::{Read, Write},
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

/// How long an agent waits for requests before it says that there are none.
const AWAIT: Duration = Duration::from_millis(200);
const TICK: Duration = Duration::from_millis(50);
/// Silence after which the coordinator is given up, until it says how patient we should be.
const FIRST_PATIENCE: Duration = Duration::from_secs(60);
/// Time to clean up after the coordinator is gone, before the process kills itself.
const GRACE: Duration = Duration::from_secs(10);

/// What the threads share.
struct Shared {
    heard: Mutex<Instant>,
    patience: Mutex<Duration>,
    /// The coordinator is gone.
    lost: AtomicBool,
    /// The working thread has ended.
    done: AtomicBool,
    /// Follows and stops the writing of parts.
    watch: Mutex<Arc<Watch>>,
    /// Steps done, besides bytes written.
    steps: AtomicU64,
}

impl Shared {
    fn lose(&self, why: &str) {
        if !self.lost.swap(true, Ordering::Relaxed) {
            tracing::warn!(why, "the coordinator is gone");
            lock(&self.watch).cancel();
        }
    }

    fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Relaxed)
    }
}

/// Serves one coordinator until it closes the stream or is lost. `greeted` is called once with its
/// greeting.
pub fn serve(
    engine: &dyn Engine,
    input: impl Read + Send + 'static,
    output: impl Write + Send + 'static,
    greeted: &dyn Fn(&Hello),
) -> Result<()> {
    let shared = Arc::new(Shared {
        heard: Mutex::new(Instant::now()),
        patience: Mutex::new(FIRST_PATIENCE),
        lost: AtomicBool::new(false),
        done: AtomicBool::new(false),
        watch: Mutex::default(),
        steps: AtomicU64::new(0),
    });
    let (requests_in, requests) = crossbeam_channel::bounded(4);
    let output = Arc::new(Mutex::new(FrameWriter::new(output)));
    thread::spawn({
        let shared = shared.clone();
        move || listen(input, &shared, &requests_in)
    });
    thread::spawn({
        let shared = shared.clone();
        move || watch(&shared)
    });
    thread::spawn({
        let (shared, output) = (shared.clone(), output.clone());
        move || live(&shared, &output)
    });
    let mut agent =
        Agent { engine, shared: shared.clone(), state: State::Idle, faults: Faults::default(), greeted };
    let result = agent.run(&requests, &output);
    // The session's Drop is what the watch waits for.
    drop(agent);
    shared.done.store(true, Ordering::Relaxed);
    result
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn listen(input: impl Read, shared: &Shared, requests: &crossbeam_channel::Sender<Request>) {
    let mut reader = FrameReader::new(input);
    let why = loop {
        match reader.read::<Request>() {
            Ok(Some(request)) => {
                *lock(&shared.heard) = Instant::now();
                if request != Request::Ping && requests.send(request).is_err() {
                    return;
                }
            }
            Ok(None) => break "it closed the connection".to_owned(),
            Err(error) => break error.to_string(),
        }
    };
    shared.lose(&why);
}

/// Sends signs of life.
fn live(shared: &Shared, output: &Mutex<FrameWriter<impl Write>>) {
    let mut last = Instant::now();
    while !shared.done.load(Ordering::Relaxed) {
        thread::sleep(TICK);
        if last.elapsed() >= *lock(&shared.patience) / 10 {
            let progress = lock(&shared.watch).bytes() + shared.steps.load(Ordering::Relaxed);
            if lock(output).write(&Response::Alive(progress)).is_err() {
                return shared.lose("nobody reads our answers");
            }
            last = Instant::now();
        }
    }
}

/// Gives the coordinator up when it is silent, and the process when the working thread is stuck.
fn watch(shared: &Shared) {
    let (mut since, mut awake) = (None, Awake::new());
    while !shared.done.load(Ordering::Relaxed) {
        thread::sleep(TICK);
        *lock(&shared.heard) += awake.held_up();
        if lock(&shared.heard).elapsed() > *lock(&shared.patience) {
            shared.lose("it is silent");
        }
        if shared.is_lost() && since.get_or_insert_with(Instant::now).elapsed() > GRACE {
            tracing::error!("stuck: ending the agent by force");
            let _ = nix::sys::signal::kill(nix::unistd::Pid::this(), nix::sys::signal::Signal::SIGKILL);
        }
    }
}

enum State {
    Idle,
    Dump(Box<Dumping>),
    Restore(Box<dyn RestoreSession>),
    Released(Vec<i32>),
    Watching(Requests),
}

/// A dump under way. The writer goes before the session, which knows what has become of it.
struct Dumping {
    part: Option<PartWriter>,
    session: Box<dyn DumpSession>,
    store: Store,
    task: DumpTask,
    saved: PartRef,
}

struct Agent<'a> {
    engine: &'a dyn Engine,
    shared: Arc<Shared>,
    state: State,
    faults: Faults,
    greeted: &'a dyn Fn(&Hello),
}

impl Agent<'_> {
    fn run(&mut self, requests: &Receiver<Request>, output: &Mutex<FrameWriter<impl Write>>) -> Result<()> {
        loop {
            let request = match requests.recv_timeout(TICK) {
                Ok(_) if self.shared.is_lost() => return Ok(()),
                Ok(request) => request,
                Err(RecvTimeoutError::Timeout) if self.shared.is_lost() => return Ok(()),
                Err(RecvTimeoutError::Timeout) => continue,
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
            };
            let response = self.handle(request).unwrap_or_else(|error| {
                // Undone at once: a session that failed is of no use any more.
                self.abort();
                Response::Failed(failure_of(&error))
            });
            self.shared.steps.fetch_add(1, Ordering::Relaxed);
            if let Err(error) = lock(output).write(&response) {
                self.shared.lose("nobody reads our answers");
                bail!("answering the coordinator: {error}");
            }
        }
    }

    fn handle(&mut self, request: Request) -> Result<Response> {
        let phase = match &request {
            Request::PlanDump(_) | Request::PlanRestore(_) => Some(Phase::Plan),
            Request::Arm => Some(Phase::Arm),
            Request::Cut => Some(Phase::Cut),
            Request::Settle => Some(Phase::Settle),
            Request::Run => Some(Phase::Run),
            Request::Save => Some(Phase::Save),
            Request::Commit => Some(Phase::Commit),
            Request::Build(_) => Some(Phase::Build),
            Request::Connect => Some(Phase::Connect),
            Request::Release => Some(Phase::Release),
            Request::Abort => Some(Phase::Abort),
            _ => None,
        };
        phase.map_or(Ok(()), |phase| self.faults.begin(phase))?;
        let response = self.perform(request)?;
        phase.map_or(Ok(()), |phase| self.faults.end(phase))?;
        Ok(response)
    }

    fn perform(&mut self, request: Request) -> Result<Response> {
        match request {
            Request::Hello(hello) => self.hello(&hello),
            Request::Doctor { store } => Ok(Response::Doctor(crate::doctor::probe(Path::new(&store)))),
            Request::PlanDump(task) => Ok(Response::Planned(self.plan_dump(task)?)),
            Request::Sample => self.sample(),
            Request::Arm => self.arm(),
            Request::Cut => Ok(Response::Cut(self.dumping()?.session.cut()?)),
            Request::Settle => Ok(Response::Settled(self.dumping()?.session.settle()?)),
            Request::Run => self.dumping()?.session.thaw().map(|()| Response::Done),
            Request::Save => self.save(),
            Request::Commit => self.commit(),
            Request::PlanRestore(task) => Ok(Response::RestorePlanned(self.plan_restore(task)?)),
            Request::Build(task) => self.restoring(|session| session.build(&task)),
            Request::Connect => self.restoring(|session| session.connect()),
            Request::Release => self.release(),
            Request::Wait => self.wait(),
            Request::Watch(task) => {
                self.state = State::Watching(Requests::listen(&task)?);
                Ok(Response::Done)
            }
            Request::Await(answers) => match &mut self.state {
                State::Watching(requests) => Ok(Response::Awaited(requests.wait(&answers, AWAIT))),
                _ => bail!("no job is watched on this node"),
            },
            Request::Abort => {
                self.abort();
                Ok(Response::Done)
            }
            Request::Ping => Ok(Response::Done),
        }
    }

    fn hello(&mut self, hello: &Hello) -> Result<Response> {
        (self.greeted)(hello);
        self.faults = Faults::of(&hello.node, hello.fault.as_deref()).map_err(|error| anyhow!(error))?;
        *lock(&self.shared.patience) = Duration::from_secs(hello.patience.clamp(1, 3600));
        let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let ckpt = env!("CARGO_PKG_VERSION").to_owned();
        Ok(Response::Hello { ckpt, kernel: kernel.trim().to_owned() })
    }

    fn plan_dump(&mut self, task: DumpTask) -> Result<PlanReport> {
        let addresses = addresses()?;
        let store = shared_store(&task)?;
        *lock(&self.shared.watch) = Arc::default();
        let pids = selector::find(&task.selector)?;
        if pids.is_empty() {
            return Ok(PlanReport { addresses, ..Default::default() });
        }
        // The one before has to let go of the job first.
        self.state = State::Idle;
        let (session, mut report) = self.engine.plan_dump(&pids, &task, &store)?;
        report.addresses = addresses;
        let dumping = Dumping { part: None, session, store, task, saved: PartRef::default() };
        self.state = State::Dump(Box::new(dumping));
        Ok(report)
    }

    fn dumping(&mut self) -> Result<&mut Dumping> {
        match &mut self.state {
            State::Dump(dumping) => Ok(dumping),
            _ => bail!("no dump is under way on this node"),
        }
    }

    /// Without a checkpoint to build on, everything counts as modified: it is copied ahead first, once.
    fn sample(&mut self) -> Result<Response> {
        if self.dumping()?.part.is_none() && !self.make_part()? {
            self.arm()?;
        }
        Ok(Response::Sampled(self.dumping()?.session.sample()?))
    }

    fn arm(&mut self) -> Result<Response> {
        if self.dumping()?.part.is_none() {
            self.make_part()?;
        }
        let dumping = self.dumping()?;
        dumping.session.arm(dumping.part.as_mut().context("it was just made")?)?;
        Ok(Response::Done)
    }

    /// Begins the part. Does it build on an older one?
    fn make_part(&mut self) -> Result<bool> {
        let watch = lock(&self.shared.watch).clone();
        let dumping = self.dumping()?;
        let base = dumping.session.base()?;
        let builds = base.is_some();
        let part = dumping.store.part_writer(PartOptions {
            compress: dumping.task.options.compress.map_or(Compress::None, Compress::Zstd),
            dump: Some(dumping.task.dump.clone().into()),
            watch,
            base,
            ..Default::default()
        })?;
        dumping.part = Some(part);
        Ok(builds)
    }

    fn save(&mut self) -> Result<Response> {
        let dumping = self.dumping()?;
        let mut part = dumping.part.take().context("nothing is armed on this node")?;
        dumping.session.save(&mut part)?;
        dumping.saved = part.finish().context("writing the part")?;
        let memory = dumping.session.memory();
        Ok(Response::Saved(SaveReport { part: dumping.saved.clone(), memory }))
    }

    fn commit(&mut self) -> Result<Response> {
        match std::mem::replace(&mut self.state, State::Idle) {
            State::Dump(dumping) => {
                let stop = dumping.task.options.stop;
                let outcome = if stop { Outcome::Kill } else { Outcome::LeaveRunning };
                dumping.session.finish(outcome, &dumping.saved)?;
                Ok(Response::Done)
            }
            _ => bail!("no dump is under way on this node"),
        }
    }

    fn plan_restore(&mut self, task: RestoreTask) -> Result<RestoreReport> {
        let addresses = addresses()?;
        let store = Store::open(Path::new(&task.store))?;
        let part = store.open_part(&task.part)?;
        part.check_known()?;
        let (session, mut report) = self.engine.plan_restore(part, &task.options)?;
        report.addresses = addresses;
        self.state = State::Restore(session);
        Ok(report)
    }

    fn restoring(&mut self, act: impl FnOnce(&mut dyn RestoreSession) -> Result<()>) -> Result<Response> {
        match &mut self.state {
            State::Restore(session) => act(session.as_mut()).map(|()| Response::Done),
            _ => bail!("no restore is under way on this node"),
        }
    }

    fn release(&mut self) -> Result<Response> {
        match std::mem::replace(&mut self.state, State::Idle) {
            State::Restore(session) => {
                let pids = session.release()?;
                self.state = State::Released(pids.clone());
                Ok(Response::Released(pids))
            }
            _ => bail!("no restore is under way on this node"),
        }
    }

    /// Waits for the end of the restored processes and their descendants, or of the coordinator.
    fn wait(&mut self) -> Result<Response> {
        let State::Released(pids) = &self.state else { bail!("nothing was restored on this node") };
        let mut alive = tree(pids);
        while !self.shared.is_lost() && !alive.is_empty() {
            thread::sleep(TICK);
            alive.retain(|&pid| selector::is_alive(pid));
            // Those that a process leaves behind are no longer its descendants.
            alive = tree(&alive);
        }
        Ok(Response::Done)
    }

    /// Undoes everything. Processes that run again already have peers that do not: they are ended.
    fn abort(&mut self) {
        if let State::Released(pids) = std::mem::replace(&mut self.state, State::Idle) {
            for pid in tree(&pids) {
                let process = nix::unistd::Pid::from_raw(pid);
                if let Err(error) = nix::sys::signal::kill(process, nix::sys::signal::Signal::SIGKILL) {
                    tracing::warn!(pid, %error, "cannot end a restored process");
                }
            }
        }
    }
}

/// Those of the processes that live, and their descendants.
fn tree(pids: &[i32]) -> Vec<i32> {
    let alive: Vec<_> = pids.iter().copied().filter(|&pid| selector::is_alive(pid)).collect();
    // One may end between the two looks; then it has no descendants any more.
    let found = selector::find(&Selector::Pids(alive.clone())).unwrap_or(alive);
    found.into_iter().filter(|&pid| selector::is_alive(pid)).collect()
}

/// Opens the store and makes sure that it is the coordinator's.
fn shared_store(task: &DumpTask) -> Result<Store> {
    let store = Store::open(Path::new(&task.store))?;
    match store.dump_directory(&task.dump.clone().into()) {
        Ok(_) => Ok(store),
        Err(StoreError::NotFound { .. }) => {
            let message = format!("{} is not the coordinator's store but another one", task.store);
            let hint = Some("all nodes need the same directory: `--store` on shared storage".to_owned());
            Err(Classified { message, hint, class: FailureClass::NoStore }.into())
        }
        Err(error) => Err(error.into()),
    }
}

/// The node's addresses, without those of loopback interfaces.
fn addresses() -> Result<Vec<NodeAddress>> {
    use nix::net::if_::InterfaceFlags;
    let interfaces = nix::ifaddrs::getifaddrs().context("listing the node's addresses")?;
    let mut addresses = Vec::new();
    for interface in interfaces.filter(|entry| !entry.flags.contains(InterfaceFlags::IFF_LOOPBACK)) {
        let Some(address) = interface.address else { continue };
        let v4 = address.as_sockaddr_in().map(|address| address.ip().into());
        let v6 = address.as_sockaddr_in6().map(|address| address.ip().into());
        let Some(address) = v4.or(v6) else { continue };
        addresses.push(NodeAddress { interface: interface.interface_name, address });
    }
    Ok(addresses)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::PartReader;
    use ckpt_common::wire::{DumpOptions, RestoreOptions};

    struct NoEngine;

    impl Engine for NoEngine {
        fn plan_dump(
            &self,
            _: &[i32],
            _: &DumpTask,
            _: &Store,
        ) -> Result<(Box<dyn DumpSession>, PlanReport)> {
            bail!("not here")
        }
        fn plan_restore(
            &self,
            _: PartReader,
            _: &RestoreOptions,
        ) -> Result<(Box<dyn RestoreSession>, RestoreReport)> {
            bail!("not here")
        }
    }

    /// Sends requests to an agent and gives its answers, up to its end.
    fn converse(requests: &[Request]) -> Vec<Response> {
        let (input, ours) = std::io::pipe().unwrap();
        let (theirs, output) = std::io::pipe().unwrap();
        let mut writer = FrameWriter::new(ours);
        let requests = requests.to_vec();
        thread::scope(|scope| {
            scope.spawn(move || serve(&NoEngine, input, output, &|_| {}).unwrap());
            let mut reader = FrameReader::new(theirs);
            let mut answers = Vec::new();
            for request in requests {
                writer.write(&request).unwrap();
                answers.push(loop {
                    match reader.read::<Response>().unwrap().unwrap() {
                        Response::Alive(_) => {}
                        answer => break answer,
                    }
                });
            }
            drop(writer);
            answers
        })
    }

    fn failure(response: &Response) -> (FailureClass, &str) {
        match response {
            Response::Failed(failure) => (failure.class, &failure.message),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn requests_out_of_order_are_refused() {
        let requests = [Request::Cut, Request::Save, Request::Commit, Request::Connect, Request::Release];
        for response in converse(&requests) {
            let (class, message) = failure(&response);
            assert_eq!(class, FailureClass::Other);
            assert!(message.ends_with("is under way on this node"), "{message}");
        }
    }

    #[test]
    fn another_store_than_the_coordinators_is_refused() {
        let directory = tempfile::TempDir::new().unwrap();
        let path = directory.path().join("store");
        let task = |store: &Path| {
            Request::PlanDump(DumpTask {
                store: store.to_str().unwrap().to_owned(),
                job: "job".into(),
                dump: "0".repeat(32),
                selector: Selector::Pids(vec![1]),
                options: DumpOptions::default(),
            })
        };
        let missing = converse(&[task(&path)]).remove(0);
        assert_eq!(failure(&missing).0, FailureClass::NoStore);
        Store::create(&path).unwrap();
        let other = converse(&[task(&path)]).remove(0);
        let (class, message) = failure(&other);
        assert_eq!(class, FailureClass::NoStore);
        assert!(message.ends_with("is not the coordinator's store but another one"), "{message}");
    }

    #[test]
    fn loopback_is_no_address_of_a_node() {
        assert!(addresses().unwrap().iter().all(|entry| !entry.address.is_loopback()));
    }
}
