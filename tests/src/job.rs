//! A job on this machine, dumped, killed and restored with the real `ckpt`.

use crate::cluster::{build_folder, only_standard_streams};
use anyhow::{Context, Result, bail, ensure};
use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Output, Stdio};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// How long a test waits for something that should happen soon.
const PATIENCE: Duration = Duration::from_secs(90);

/// A directory with a store and whatever the job writes. Dropping it ends the job.
#[derive(Debug)]
pub struct Job {
    directory: TempDir,
    name: String,
    pid: i32,
    /// How the process that was started has ended.
    status: Arc<OnceLock<ExitStatus>>,
}

impl Job {
    /// An empty place for a job.
    pub fn new(name: &str) -> Result<Self> {
        Ok(Self {
            directory: TempDir::with_prefix(format!("ckpt-test-{name}-"))?,
            name: name.to_owned(),
            pid: 0,
            status: Arc::default(),
        })
    }

    /// Where the job runs.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// A path in the job's directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Its name in the store.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Builds `workloads/NAME.c` into the job's directory.
    pub fn build(&self, name: &str) -> Result<String> {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("workloads").join(format!("{name}.c"));
        let program = self.path(name);
        let mut gcc = Command::new("gcc");
        gcc.args(["-O1", "-g", "-Wall", "-Wextra", "-mavx2", "-pthread", "-o"]).arg(&program).arg(source);
        let output = gcc.output().context("running gcc")?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(program.display().to_string())
    }

    /// PID of the job's first process.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Starts the job: a session of its own, no descriptor of ours, output to the file `out`.
    pub fn start(&mut self, command: &[&str]) -> Result<()> {
        self.start_with(command, |_| {})
    }

    /// As [`Self::start`], with changes to the command.
    pub fn start_with(&mut self, command: &[&str], change: impl FnOnce(&mut Command)) -> Result<()> {
        let out = File::create(self.path("out"))?;
        let mut start = Command::new(command[0]);
        start.args(&command[1..]).current_dir(self.directory()).stdin(Stdio::null());
        start.stdout(out.try_clone()?).stderr(out).env_remove("RUST_BACKTRACE");
        change(&mut start);
        // SAFETY: between fork and exec only setsid(2) is called, which is async-signal-safe.
        unsafe { start.pre_exec(|| Ok(nix::unistd::setsid().map(drop)?)) };
        only_standard_streams(&mut start);
        let mut child = start.spawn().with_context(|| format!("starting {command:?}"))?;
        self.pid = child.id() as i32;
        // Reaped at once, whenever it ends: its PID must be free for the restored process.
        self.status = Arc::default();
        let status = Arc::clone(&self.status);
        std::thread::spawn(move || child.wait().map(|ended| status.set(ended)));
        Ok(())
    }

    /// Runs `ckpt` with the job's store.
    pub fn ckpt(&self, arguments: &[&str]) -> Result<Output> {
        self.ckpt_with(arguments, &[])
    }

    fn ckpt_with(&self, arguments: &[&str], variables: &[(&str, &str)]) -> Result<Output> {
        self.command()?.args(arguments).envs(variables.iter().copied()).output().context("running ckpt")
    }

    /// `ckpt` with the job's store, to be given its arguments.
    pub fn command(&self) -> Result<Command> {
        self.command_for("store")
    }

    /// The same with another store in the job's directory.
    pub fn command_for(&self, store: &str) -> Result<Command> {
        let mut command = Command::new(build_folder()?.join("ckpt"));
        command.arg("--store").arg(self.path(store)).stdin(Stdio::null()).env_remove("RUST_BACKTRACE");
        Ok(command)
    }

    /// Runs `ckpt`, which must succeed.
    pub fn ok(&self, arguments: &[&str]) -> Result<String> {
        self.ok_with(arguments, &[])
    }

    /// The same, with variables in its environment.
    pub fn ok_with(&self, arguments: &[&str], variables: &[(&str, &str)]) -> Result<String> {
        let output = self.ckpt_with(arguments, variables)?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        ensure!(
            output.status.success(),
            "ckpt {arguments:?}: {}{}",
            text(&output.stdout),
            text(&output.stderr)
        );
        Ok(text(&output.stdout))
    }

    /// A checkpoint; with `stop` the job is gone afterwards.
    pub fn dump(&self, stop: bool) -> Result<String> {
        let pid = self.pid.to_string();
        let mut arguments = vec!["dump", "--pid", &pid, "--name", &self.name];
        if stop {
            arguments.push("--stop");
        }
        let text = self.ok(&arguments)?;
        if stop {
            self.until("the job is gone", || Ok(!Path::new(&format!("/proc/{}", self.pid)).exists()))?;
        }
        Ok(text)
    }

    /// Brings the newest checkpoint back under the same PIDs.
    pub fn restore(&self) -> Result<String> {
        self.ok(&["restore", &self.name, "--pids", "same"])
    }

    /// Dump, kill, restore.
    pub fn cycle(&self) -> Result<()> {
        self.dump(true)?;
        self.restore()?;
        Ok(())
    }

    /// Is the first process there, and not just a zombie?
    pub fn is_running(&self) -> bool {
        ckpt_cli::job::selector::is_alive(self.pid)
    }

    /// Ends the job.
    pub fn end(&mut self) {
        let pid = std::mem::take(&mut self.pid);
        if pid == 0 {
            return;
        }
        for pid in ckpt_cli::tracee::proc::tree(pid).into_iter().rev() {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::SIGKILL);
        }
    }

    /// Waits for the end of the first process.
    pub fn wait(&self) -> Result<()> {
        self.until("the job has ended", || Ok(!self.is_running())).with_context(|| self.doing())
    }

    /// Has a self-checking workload (`workloads/work.h`) check what it has, at the end of which it must say so.
    pub fn passes(&self) -> Result<()> {
        self.signal(libc::SIGUSR1)?;
        self.wait()?;
        let output = self.output()?;
        ensure!(output.ends_with("pass\n"), "{}: {output}", self.status());
        Ok(())
    }

    /// What each thread of the first process is doing, for a message.
    fn doing(&self) -> String {
        let mut all = String::new();
        for task in fs::read_dir(format!("/proc/{}/task", self.pid)).into_iter().flatten().flatten() {
            let read = |name| fs::read_to_string(task.path().join(name)).unwrap_or_default();
            let status = read("status");
            let lines = status.lines().filter(|line| {
                ["State", "SigPnd", "ShdPnd", "SigBlk", "TracerPid"].iter().any(|key| line.starts_with(key))
            });
            let lines: Vec<&str> = lines.collect();
            all += &format!("\n{:?}: {} {}", task.file_name(), lines.join(", "), read("syscall").trim_end());
        }
        all
    }

    /// How the process that was started has ended, if it has; nothing is known of a restored one.
    pub fn status(&self) -> String {
        self.status.get().map_or_else(|| "not ended".to_owned(), ToString::to_string)
    }

    /// Sends a signal to the first process.
    pub fn signal(&self, signal: i32) -> Result<()> {
        let signal = nix::sys::signal::Signal::try_from(signal)?;
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.pid), signal).context("signalling the job")
    }

    /// What the job has written to its standard streams.
    pub fn output(&self) -> Result<String> {
        Ok(String::from_utf8_lossy(&fs::read(self.path("out"))?).into_owned())
    }

    /// Waits until the job has written this.
    pub fn until_output(&self, text: &str) -> Result<()> {
        let done = || Ok(self.output()?.contains(text));
        self.until(&format!("the job says {text:?}"), done)
            .with_context(|| format!("it said:\n{}", self.output().unwrap_or_default()))
    }

    /// Waits for a condition.
    pub fn until(&self, what: &str, condition: impl Fn() -> Result<bool>) -> Result<()> {
        let start = Instant::now();
        while !condition()? {
            if start.elapsed() > PATIENCE {
                bail!("{what}: not within {PATIENCE:?}");
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// Lets the job run for a moment.
    pub fn pause(&self, milliseconds: u64) {
        std::thread::sleep(Duration::from_millis(milliseconds));
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        if self.pid == 0 {
            return;
        }
        if std::thread::panicking() {
            // Shown with the failed test: the directory goes.
            let mut stderr = std::io::stderr();
            let _ = std::io::Write::write_all(&mut stderr, self.output().unwrap_or_default().as_bytes());
        }
        self.end();
    }
}
