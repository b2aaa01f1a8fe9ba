//! `ckpt watch` and requests for a checkpoint, from outside and from inside.

use anyhow::{Context, Result, ensure};
use ckpt_tests::job::Job;
use serde_json::Value;
use std::fs::{self, File};
use std::process::{Child, Command};

/// A watch that runs; its events go to the file `events`.
struct Watch(Child);

impl Watch {
    fn start(job: &Job, name: &str, options: &[&str], variables: &[(&str, &str)]) -> Result<Self> {
        let pid = job.pid().to_string();
        let mut command = job.command()?;
        command
            .args(["watch", "--json", "--pid", &pid, "--name", name])
            .args(options)
            .envs(variables.iter().copied());
        command.stdout(File::create(job.path("events"))?).stderr(File::create(job.path("words"))?);
        Ok(Self(command.spawn().context("starting ckpt watch")?))
    }

    fn signal(&self, signal: nix::sys::signal::Signal) -> Result<()> {
        Ok(nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.0.id() as i32), signal)?)
    }

    /// Its exit code.
    fn end(&mut self) -> Result<Option<i32>> {
        Ok(self.0.wait()?.code())
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Events of a kind so far. The last line may be half written.
fn events(job: &Job, kind: &str) -> Result<Vec<Value>> {
    let text = fs::read_to_string(job.path("events"))?;
    let all = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    Ok(all.filter(|event| event["type"] == kind).collect())
}

fn until_events(job: &Job, kind: &str, condition: impl Fn(&[Value]) -> bool) -> Result<Vec<Value>> {
    job.until(&format!("events of type {kind}"), || Ok(condition(&events(job, kind)?))).with_context(
        || {
            let read = |name| fs::read_to_string(job.path(name)).unwrap_or_default();
            format!("{}{}", read("events"), read("words"))
        },
    )?;
    events(job, kind)
}

fn sleeper(name: &str) -> Result<Job> {
    let mut job = Job::new(name)?;
    job.start(&["sleep", "600"])?;
    Ok(job)
}

fn has_reason(event: &Value, word: &str) -> bool {
    event["reason"].as_str().is_some_and(|reason| reason.contains(word))
}

#[test]
fn checkpoints_at_intervals_until_the_job_ends() -> Result<()> {
    let job = sleeper("interval")?;
    let mut watch = Watch::start(&job, "interval", &["--every", "300ms", "--keep", "2"], &[])?;
    until_events(&job, "dump", |dumps| {
        dumps.len() >= 4 && dumps.iter().all(|dump| has_reason(dump, "time"))
    })?;
    job.signal(libc::SIGKILL)?;
    ensure!(watch.end()? == Some(0), "{}", fs::read_to_string(job.path("words"))?);
    ensure!(events(&job, "end")?.len() == 1, "{}", fs::read_to_string(job.path("events"))?);
    let dumps = events(&job, "dump")?;
    let names: Vec<_> = dumps.iter().filter_map(|dump| dump["checkpoint"].as_str()).collect();
    let kept: Value = serde_json::from_str(&job.ok(&["ls", "interval", "--json"])?)?;
    let kept = kept.to_string();
    for (index, name) in names.iter().enumerate() {
        let stays = index + 2 >= names.len();
        ensure!(kept.contains(&format!("\"{name}\"")) == stays, "{name} of {names:?}: {kept}");
    }
    job.ok(&["verify", "interval"])?;
    Ok(())
}

#[test]
fn requests_from_outside() -> Result<()> {
    let job = sleeper("outside")?;
    let mut watch = Watch::start(&job, "outside", &[], &[])?;
    let socket = "/run/ckpt-request/outside.sock";
    job.until("the watch listens", || Ok(fs::exists(socket)?))?;
    let saved = job.ok(&["request", "--job", "outside"])?;
    ensure!(saved.starts_with("Saved outside@1 ("), "{saved}");
    watch.signal(nix::sys::signal::SIGUSR1)?;
    let dumps = until_events(&job, "dump", |dumps| dumps.len() == 2)?;
    ensure!(has_reason(&dumps[0], "request") && has_reason(&dumps[1], "signal"), "{dumps:?}");
    // Somebody who is neither root nor of the job.
    let ask = "import os, socket\nos.setuid(65534)\ns = socket.socket(socket.AF_UNIX)\n\
               s.connect('/run/ckpt-request/outside.sock')\ns.sendall(b'checkpoint\\n')\nprint(s.recv(99).decode())";
    let answer = Command::new("/usr/bin/python3").args(["-c", ask]).output()?;
    let answer = String::from_utf8_lossy(&answer.stdout).into_owned();
    ensure!(answer.starts_with("failed process ") && answer.contains("is not in the job"), "{answer}");
    // Two watches would not know whose turn it is.
    let mut second = Watch::start(&job, "outside", &[], &[])?;
    ensure!(second.end()? == Some(1), "{}", fs::read_to_string(job.path("events"))?);
    watch.signal(nix::sys::signal::SIGINT)?;
    ensure!(watch.end()? == Some(130) && job.is_running());
    job.until("the socket is gone", || Ok(!fs::exists(socket)?))?;
    let refused = job.ckpt(&["request", "--job", "outside"])?;
    ensure!(refused.status.code() == Some(1), "{refused:?}");
    Ok(())
}

#[test]
fn failures_do_not_end_the_watch() -> Result<()> {
    let job = sleeper("failing")?;
    let fault = [("CKPT_FAULT", "coordinator:save:error")];
    let watch = Watch::start(&job, "failing", &["--every", "1h"], &fault)?;
    job.until("the watch listens", || Ok(fs::exists("/run/ckpt-request/failing.sock")?))?;
    let refused = job.ckpt(&["request", "--job", "failing"])?;
    ensure!(refused.status.code() == Some(1), "{refused:?}");
    let failed = until_events(&job, "failed", |failed| failed.len() >= 3)?;
    let pauses: Vec<_> = failed.iter().filter_map(|event| event["again_us"].as_u64()).collect();
    ensure!(pauses[..3] == [1_000_000, 2_000_000, 4_000_000], "{pauses:?}");
    ensure!(job.is_running() && events(&job, "dump")?.is_empty());
    drop(watch);
    Ok(())
}

/// A program asks and is told that it was saved; the copy of it that is restored learns that it is one.
#[test]
fn a_program_asks_and_returns_twice() -> Result<()> {
    let code = r#"
import os, socket, time
os.setgid(65534)
os.setuid(65534)
s = socket.socket(socket.AF_UNIX)
while True:
    try:
        s.connect("/run/ckpt-request/asks.sock")
        break
    except OSError:
        time.sleep(0.02)
s.sendall(b"checkpoint\n")
answer = s.makefile().readline()
print(answer.strip() if answer else "restored", flush=True)
while True:
    time.sleep(0.1)
"#;
    let mut job = Job::new("asks")?;
    fs::write(job.path("asks.py"), code)?;
    job.start(&["/usr/bin/python3", "asks.py"])?;
    let mut watch = Watch::start(&job, "asks", &[], &[])?;
    job.until_output("saved asks@1 ")?;
    let dumps = until_events(&job, "dump", |dumps| dumps.len() == 1)?;
    ensure!(dumps[0]["left_out"] == serde_json::json!([]), "{dumps:?}");
    ensure!(job.output()?.trim().ends_with(dumps[0]["id"].as_str().context("no id")?), "{}", job.output()?);
    job.signal(libc::SIGKILL)?;
    job.wait()?;
    ensure!(watch.end()? == Some(0));
    job.restore()?;
    job.until_output("restored")?;
    ensure!(job.output()? == "restored\n", "{}", job.output()?);
    Ok(())
}
