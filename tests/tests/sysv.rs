//! System V shared memory: dumped, removed with the job, and back under the same ids; in the way of others, and others in
//! its way.

use anyhow::{Context, Result, ensure};
use ckpt_tests::job::Job;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs;
use std::process::Command;

/// A job with segments, which go with this value.
struct Segments {
    job: Job,
    ids: Vec<String>,
}

impl Segments {
    fn start() -> Result<Self> {
        let mut job = Job::new("sysv")?;
        let program = job.build("sysv")?;
        job.start(&[&program])?;
        job.until_output("ready")?;
        let output = job.output()?;
        let line = output.lines().find_map(|line| line.strip_prefix("segments: ")).context("no segments")?;
        let ids = line.split(' ').map(str::to_owned).collect();
        let segments = Self { job, ids };
        // An inode number and an id that are the same, or the test is none.
        let twins = output.lines().find_map(|line| line.strip_prefix("twins: ")).context("no twins")?;
        let (id, inode) = twins.split_once(' ').context("no pair")?;
        ensure!(id == inode, "{twins}");
        Ok(segments)
    }

    /// How many of them the node has.
    fn there(&self) -> Result<usize> {
        let list = fs::read_to_string("/proc/sysvipc/shm")?;
        let ids: Vec<_> = list.lines().filter_map(|line| line.split_ascii_whitespace().nth(1)).collect();
        Ok(self.ids.iter().filter(|id| ids.contains(&id.as_str())).count())
    }

    fn passes(&self) -> Result<()> {
        ensure!(self.job.is_running(), "{}", self.job.output()?);
        self.job.passes()?;
        ensure!(self.there()? == 0, "segments are left");
        Ok(())
    }
}

impl Drop for Segments {
    fn drop(&mut self) {
        self.job.end();
        for id in &self.ids {
            let _ = Command::new("ipcrm").args(["-m", id]).output();
        }
    }
}

#[test]
fn a_job_that_is_dumped_keeps_its_segments() -> Result<()> {
    let segments = Segments::start()?;
    for _ in 0..3 {
        segments.job.dump(false)?;
        segments.job.pause(30);
    }
    segments.passes()
}

#[test]
fn segments_come_back_with_the_same_ids() -> Result<()> {
    let segments = Segments::start()?;
    for _ in 0..2 {
        segments.job.dump(false)?;
        segments.job.dump(true)?;
        ensure!(segments.there()? == 0, "segments outlive the job that was ended");
        let fault = [("CKPT_FAULT", "coordinator:release:error")];
        ensure!(segments.job.ok_with(&["restore", "sysv", "--pids", "same"], &fault).is_err(), "no fault");
        ensure!(segments.there()? == 0, "a restore that failed has left segments");
        segments.job.restore()?;
        segments.job.pause(30);
    }
    segments.job.dump(true)?;
    segments.job.ok(&["restore", "sysv", "--pids", "auto", "--lazy"])?;
    segments.passes()
}

/// Where PIDs are taken, ids may be, too.
#[test]
fn a_namespace_has_room_for_all_ids() -> Result<()> {
    let mut segments = Segments::start()?;
    let pid = segments.job.pid().to_string();
    segments.job.dump(false)?;
    segments.job.dump(false)?;
    for last in [false, true] {
        let file = segments.job.path("pid").display().to_string();
        segments.job.ok(&["restore", "sysv", "--pids", "auto", "--pidfile", &file])?;
        let inside = fs::read_to_string(&file)?.trim().to_owned();
        ensure!(inside != pid, "it is not in a namespace");
        if last {
            Command::new("kill").args(["-USR1", &inside]).status()?;
            segments.job.until_output("pass")?;
            break;
        }
        let dump = segments.job.command()?;
        let mut enter = Command::new("nsenter");
        enter.args(["--target", &inside, "--mount", "--pid", "--ipc"]).arg(dump.get_program());
        enter.args(dump.get_args()).args(["dump", "--name", "sysv", "--pid", &pid]);
        for _ in 0..2 {
            let output = enter.output()?;
            ensure!(output.status.success(), "{output:?}");
        }
        // The namespace goes with the last process in it, and with that the segments.
        for process in ckpt_cli::tracee::proc::tree(inside.parse()?) {
            // The first one may have taken the others with it.
            let _ = kill(Pid::from_raw(process), Signal::SIGKILL);
        }
    }
    // The first job has noticed nothing.
    fs::write(segments.job.path("out"), "")?;
    segments.passes()?;
    segments.job.end();
    Ok(())
}

#[test]
fn segments_that_others_have_attached_are_named() -> Result<()> {
    let segments = Segments::start()?;
    // One that is attached, and one that is not.
    for id in [&segments.ids[0], &segments.ids[2]] {
        let mut other = Job::new("attacher")?;
        let program = other.build("sysv")?;
        other.start(&[&program, "attach", id])?;
        other.until_output("ready")?;
        let refused =
            segments.job.ckpt(&["dump", "--pid", &segments.job.pid().to_string(), "--name", "sysv"])?;
        let text = String::from_utf8_lossy(&refused.stderr);
        ensure!(refused.status.code() == Some(4), "{text}");
        let reason = format!("it leads out of the job: process {} (sysv) has it attached, too", other.pid());
        ensure!(text.contains(&format!("System V segment {id} (key 0x")) && text.contains(&reason), "{text}");
        other.signal(libc::SIGUSR1)?;
        other.wait()?;
    }
    segments.job.dump(false)?;
    segments.passes()
}

#[test]
fn ids_that_are_taken_are_named() -> Result<()> {
    let mut segments = Segments::start()?;
    segments.job.dump(false)?;
    let pid = segments.job.pid();
    for process in ckpt_cli::tracee::proc::tree(pid) {
        kill(Pid::from_raw(process), Signal::SIGKILL)?;
    }
    segments.job.until("it is gone", || Ok(!fs::exists(format!("/proc/{pid}"))?))?;
    segments.job.until("what is not marked is left", || Ok(segments.there()? == 4))?;
    let refused = segments.job.ckpt(&["restore", "sysv", "--pids", "same"])?;
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(refused.status.code() == Some(4), "{text}");
    let id = &segments.ids[0];
    ensure!(text.contains(&format!("System V segment {id} (key 0x")), "{text}");
    ensure!(text.contains(&format!("`ipcrm -m {id}`")), "{text}");
    for id in segments.ids.clone() {
        let _ = Command::new("ipcrm").args(["-m", &id]).output()?;
    }
    segments.job.restore()?;
    segments.passes()?;
    segments.job.end();
    Ok(())
}
