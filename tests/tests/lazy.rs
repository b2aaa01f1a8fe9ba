//! `restore --lazy`: the job runs before its memory is there.

use anyhow::{Context, Result, ensure};
use ckpt_tests::job::Job;
use ckpt_tests::sharing::store_equal_pages_once;
use std::fs;
use std::path::Path;
use std::process::Command;

/// The workload for this, saved and stopped while it waits.
fn saved(name: &str) -> Result<Job> {
    saved_workload(name, "late")
}

fn saved_workload(name: &str, workload: &str) -> Result<Job> {
    let mut job = Job::new(name)?;
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("workloads/{workload}.c"));
    let program = job.path(workload);
    let mut gcc = Command::new("gcc");
    gcc.args(["-O1", "-g", "-Wall", "-Wextra", "-pthread", "-o"]).arg(&program).arg(source);
    let output = gcc.output().context("running gcc")?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    job.start(&[&program.display().to_string()])?;
    job.until_output("ready")?;
    job.pause(100);
    job.dump(true)?;
    Ok(job)
}

fn restore(job: &Job, name: &str, on_demand: bool) -> Result<()> {
    let variables: &[_] = if on_demand { &[("CKPT_FAULT_ON_DEMAND", "1")] } else { &[] };
    job.ok_with(&["restore", name, "--pids", "same", "--lazy"], variables)?;
    Ok(())
}

fn resident(pid: i32) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? << 10)
}

/// Is a server filling the memory of the job?
fn server(job: &Job) -> Option<i32> {
    let all = fs::read_dir("/proc").ok()?.flatten();
    let mut pids = all.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.find(|pid| {
        let comm = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        // Its messages go to the job's store: that tells it from those of other tests.
        let log = fs::read_link(format!("/proc/{pid}/fd/2")).unwrap_or_default();
        comm == "ckpt-fill\n" && log.starts_with(job.directory())
    })
}

#[test]
fn every_page_comes_when_it_is_needed() -> Result<()> {
    let job = saved("late-demand")?;
    restore(&job, "late-demand", true)?;
    ensure!(resident(job.pid())? < 8 << 20, "{} bytes are there already", resident(job.pid())?);
    job.passes()?;
    job.until("the server has ended", || Ok(server(&job).is_none()))
}

#[test]
fn the_program_works_while_its_memory_is_filled() -> Result<()> {
    let job = saved("late-both")?;
    restore(&job, "late-both", false)?;
    job.passes()?;
    job.until("the server has ended", || Ok(server(&job).is_none()))
}

#[test]
fn memory_becomes_complete_without_the_program() -> Result<()> {
    let job = saved("late-fill")?;
    restore(&job, "late-fill", false)?;
    job.until("the server has ended", || Ok(server(&job).is_none()))?;
    let smaps = fs::read_to_string(format!("/proc/{}/smaps", job.pid()))?;
    ensure!(!smaps.contains(" um"), "something is registered still");
    ensure!(resident(job.pid())? > 20 << 20, "{} bytes are there", resident(job.pid())?);
    job.passes()
}

/// Each of many processes has a memory that follows; where they share it, that is there at once.
#[test]
fn families_too() -> Result<()> {
    for once in [false, true] {
        let job = saved_workload("late-family", "family")?;
        if once {
            store_equal_pages_once(&job.path("store"), "late-family")?;
        }
        restore(&job, "late-family", false)?;
        job.passes()?;
    }
    Ok(())
}

/// A dump waits for what has not come yet.
#[test]
fn a_job_that_is_being_filled_can_be_saved() -> Result<()> {
    let job = saved("late-dump")?;
    for _ in 0..2 {
        restore(&job, "late-dump", false)?;
        job.dump(true)?;
    }
    job.restore()?;
    job.passes()
}

/// Whoever kills the server does not make the job compute with zeros.
#[test]
fn a_job_whose_memory_cannot_come_any_more_is_killed() -> Result<()> {
    let job = saved("late-kill")?;
    restore(&job, "late-kill", true)?;
    let server = server(&job).context("there is no server")?;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(server), nix::sys::signal::SIGKILL)?;
    job.wait()?;
    ensure!(job.output()?.ends_with("ready\n"), "{}", job.output()?);
    // From the checkpoint it comes back once more.
    restore(&job, "late-kill", false)?;
    job.passes()
}

/// Nor does one who kills what watches the server.
#[test]
fn the_watcher_is_watched() -> Result<()> {
    let job = saved("late-watch")?;
    restore(&job, "late-watch", true)?;
    let server = server(&job).context("there is no server")?;
    let watcher = || {
        ckpt_cli::tracee::proc::children(server).into_iter().find(|pid| {
            fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm == "ckpt-watch\n")
        })
    };
    let first = watcher().context("there is no watcher")?;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(first), nix::sys::signal::SIGKILL)?;
    job.until("there is another watcher", || Ok(watcher().is_some_and(|pid| pid != first)))?;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(server), nix::sys::signal::SIGKILL)?;
    job.wait()?;
    ensure!(job.output()?.ends_with("ready\n"), "{}", job.output()?);
    Ok(())
}

/// A file that is damaged is noticed late; then nobody computes on.
#[test]
fn a_damaged_pack_ends_the_job() -> Result<()> {
    let job = saved("late-damage")?;
    restore(&job, "late-damage", true)?;
    for pack in fs::read_dir(job.path("store/packs"))?.flatten() {
        let size = pack.metadata()?.len();
        let file = fs::File::options().write(true).open(pack.path())?;
        std::os::unix::fs::FileExt::write_all_at(&file, &vec![0x55; (size / 2) as usize], 4096)?;
    }
    job.signal(libc::SIGUSR1)?;
    job.wait()?;
    ensure!(job.output()?.ends_with("ready\n"), "{}", job.output()?);
    Ok(())
}
