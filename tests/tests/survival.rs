//! Whatever happens to ckpt in a dump: the job runs on unharmed, and no modified page is forgotten.

use anyhow::{Context, Result, ensure};
use ckpt_cli::tracee::Batch;
use ckpt_cli::tracee::{freeze::Frozen, healing::Finder};
use ckpt_tests::job::Job;
use ckpt_tests::proof;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

/// Names the process in which a ckpt is to die.
const VICTIM: &str = "CKPT_TEST_VICTIM";
/// Names the process that is to be frozen.
const FROZEN: &str = "CKPT_TEST_FROZEN";
/// Times that a dump is killed at a random instant.
const KILLS: u32 = 500;

fn hostname() -> Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/hostname")?.trim().to_owned())
}

/// PIDs of the children of a process.
fn children(pid: u32) -> Vec<i32> {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    text.split_whitespace().filter_map(|pid| pid.parse().ok()).collect()
}

fn kill(pid: i32) {
    // It may have ended by itself.
    let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
}

/// Letters of the states of all threads.
fn states(pid: i32) -> Result<String> {
    let mut states = String::new();
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let stat = fs::read_to_string(task?.path().join("stat")).unwrap_or_default();
        states.extend(stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next()));
    }
    Ok(states)
}

/// Mappings that are writable and executable: such as ckpt has in a process for a moment.
fn strange_mappings(pid: i32) -> Result<usize> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    Ok(maps.lines().filter(|line| line.contains(" rwxp ")).count())
}

fn descriptors(pid: i32) -> Result<usize> {
    Ok(fs::read_dir(format!("/proc/{pid}/fd"))?.count())
}

/// A few instructions, nothing more: different at each call.
fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

#[test]
fn killed_at_random_instants() -> Result<()> {
    let mut job = Job::new("threads")?;
    let program = job.build("threads")?;
    job.start(&[&program, "6"])?;
    job.until_output("ready")?;
    let pid = job.pid().to_string();
    let before = (strange_mappings(job.pid())?, descriptors(job.pid())?);
    // The first one makes the store, and is longer than those that are killed.
    job.dump(false)?;
    let start = Instant::now();
    job.dump(false)?;
    // Half as much again, so that every part of a dump is hit.
    let longest = start.elapsed().mul_f64(1.5);
    let mut seed = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_nanos() as u64 | 1;
    let first = seed;
    for number in 0..KILLS {
        let full: &[&str] = if random(&mut seed).is_multiple_of(4) { &["--full"] } else { &[] };
        let way = ["bpf", "uffd", "stop"][random(&mut seed) as usize % 3];
        let mut dump = job
            .command()?
            .args(["dump", "--pid", &pid, "--name", job.name(), "--max-pause", "0s", "--cow", way])
            .args(full)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        std::thread::sleep(longest.mul_f64((random(&mut seed) % 1000) as f64 / 1000.0));
        let agents = children(dump.id());
        let whom = random(&mut seed) % 3;
        if whom != 0 {
            agents.iter().copied().for_each(kill);
        }
        if whom != 1 {
            dump.kill()?;
        }
        dump.wait()?;
        let deadline = Instant::now() + Duration::from_secs(20);
        // Whoever takes their last word may be slow: a zombie has ended.
        let lives = |pid: &i32| ckpt_cli::tracee::proc::state(*pid).is_some_and(|state| state != 'Z');
        while agents.iter().any(lives) {
            ensure!(Instant::now() < deadline, "an agent does not end");
            std::thread::sleep(Duration::from_millis(1));
        }
        let states = states(job.pid())
            .with_context(|| format!("after {number} kills: {}, {:?}", job.status(), job.output()))?;
        ensure!(
            !states.contains(['T', 't', 'Z', 'X']),
            "after {number} kills its threads are {states}; seed {first}"
        );
    }
    // What a killed one has left in the process goes with the next dump, one such thing with each.
    let now = || anyhow::Ok((strange_mappings(job.pid())?, descriptors(job.pid())?));
    for _ in 0..20 {
        job.dump(false)?;
        if now()? == before {
            break;
        }
    }
    ensure!(job.is_running(), "it ended: {}", job.output()?);
    let after = now()?;
    ensure!(after == before, "{after:?} mappings and descriptors instead of {before:?}");
    job.passes().with_context(|| format!("seed {first}"))
}

/// Not a test: what is run and killed by the one below.
#[test]
fn a_ckpt_that_dies_between_batches() -> Result<()> {
    let Ok(pid) = std::env::var(VICTIM) else { return Ok(()) };
    let pid: i32 = pid.parse()?;
    let mut frozen = Frozen::freeze(&[pid])?;
    let maps = ckpt_cli::tracee::proc::maps(pid)?;
    let process = frozen.processes.get_mut(&pid).context("it is not frozen")?;
    process.with_arena(&mut Finder::default(), &maps, |threads, arena| {
        for thread in threads {
            let mut batch = Batch::new(arena);
            batch.call("getpid", libc::SYS_getpid, &[]);
            thread.run(batch, true)?.all_ok()?;
        }
        kill(std::process::id() as i32);
        Ok(())
    })
}

/// Each thread goes on as itself, although all have used the same memory.
#[test]
fn killed_between_batches() -> Result<()> {
    let mut job = Job::new("threads")?;
    let program = job.build("threads")?;
    job.start(&[&program, "6"])?;
    job.until_output("ready")?;
    for _ in 0..10 {
        let mut dying = Command::new(std::env::current_exe()?);
        dying.args(["--exact", "a_ckpt_that_dies_between_batches"]).env(VICTIM, job.pid().to_string());
        let status = dying.stdout(Stdio::null()).stderr(Stdio::null()).status()?;
        ensure!(status.signal() == Some(libc::SIGKILL), "{status}");
        job.pause(30);
    }
    job.passes()
}

/// What a killed one has left goes with the next dump, but not before every thread has come out of it.
#[test]
fn memory_left_behind_is_removed() -> Result<()> {
    let mut job = Job::new("leftover")?;
    let program = job.build("leftover")?;
    job.start(&[&program])?;
    job.until_output("inside")?;
    ensure!(strange_mappings(job.pid())? == 1, "the workload has no such memory");
    job.dump(false)?;
    ensure!(job.output()?.contains("outside"), "it was dumped while it was inside: {}", job.output()?);
    ensure!(strange_mappings(job.pid())? == 0, "the memory is still there");
    job.cycle()?;
    job.passes()
}

/// After each way to fail, the next checkpoint is the memory at its cut.
#[test]
fn no_modified_page_is_lost() -> Result<()> {
    let (job, node) = (proof::writers(&["random", "2", "16", "small"])?, hostname()?);
    proof::dump_and_compare(&job, "auto", "10ms", "the first checkpoint")?;
    for who in ["coordinator", &node] {
        for point in [
            "arm",
            "arm-end",
            "cut",
            "cut-end",
            "settle-end",
            "run-end",
            "save",
            "save-end",
            "commit",
            "commit-end",
        ] {
            // What an error undoes is more than what a death leaves, and the same at the ends of phases.
            let actions: &[&str] = if point.ends_with("-end") { &["kill"] } else { &["kill", "error"] };
            for action in actions {
                let fault = format!("{who}:{point}:{action}");
                job.pause(10);
                let pid = job.pid().to_string();
                let output = job
                    .command()?
                    .env("CKPT_FAULT", &fault)
                    .args(["dump", "--pid", &pid, "--name", job.name()])
                    .output()?;
                // After the commit there is a checkpoint, whatever becomes of ckpt.
                ensure!(!output.status.success() || point.starts_with("commit"), "{fault} had no effect");
                job.pause(10);
                proof::dump_and_compare(&job, "auto", "0s", &format!("after {fault}"))?;
            }
        }
    }
    ensure!(job.is_running(), "{}", job.output()?);
    Ok(())
}

#[test]
fn no_modified_page_is_lost_with_the_keeper() -> Result<()> {
    let job = proof::writers(&["random", "2", "16", "small"])?;
    for number in 0..4 {
        proof::dump_and_compare(&job, "auto", "10ms", &format!("after the death of {number} keepers"))?;
        let keepers = keepers()?;
        ensure!(keepers.iter().any(|(_, job_of)| *job_of == job.pid()), "nobody keeps anything: {keepers:?}");
        keepers.iter().filter(|(_, job_of)| *job_of == job.pid()).for_each(|(keeper, _)| kill(*keeper));
        job.pause(10);
    }
    Ok(())
}

/// Two stores, each with a keeper of its own that wants to know what was written: neither takes it from the other.
#[test]
fn no_modified_page_is_lost_between_two_stores() -> Result<()> {
    let job = proof::writers(&["random", "2", "16", "small"])?;
    let pid = job.pid().to_string();
    for number in 0..4 {
        proof::dump_and_compare(&job, "auto", "10ms", &format!("beside {number} dumps into another store"))?;
        job.pause(30);
        let output = job.command_for("other")?.args(["dump", "--pid", &pid]).output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        job.pause(30);
    }
    Ok(())
}

/// Keepers, each with a process whose memory it holds.
fn keepers() -> Result<Vec<(i32, i32)>> {
    let mut keepers = Vec::new();
    for process in fs::read_dir("/proc")?.flatten() {
        let Ok(pid) = process.file_name().to_string_lossy().parse::<i32>() else { continue };
        let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
        if name.trim() != "ckpt-keep" {
            continue;
        }
        for info in fs::read_dir(process.path().join("fdinfo"))?.flatten() {
            let text = fs::read_to_string(info.path()).unwrap_or_default();
            let held = text.lines().find_map(|line| line.strip_prefix("Pid:")?.trim().parse().ok());
            keepers.extend(held.map(|held| (pid, held)));
        }
    }
    Ok(keepers)
}

/// A store that fills up: the dump fails, and the next one, into a store with room, is right.
#[test]
fn no_modified_page_is_lost_on_a_full_disk() -> Result<()> {
    let mut job = Job::new("writers")?;
    let program = job.build("writers")?;
    fs::create_dir(job.path("references"))?;
    let store = job.path("store");
    fs::create_dir(&store)?;
    let mount = |size: &str| -> Result<()> {
        let options = format!("size={size},mode=0700");
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(&store);
        ensure!(mount.status()?.success(), "mounting {}", store.display());
        Ok(())
    };
    mount("40m")?;
    let result = (|| {
        // Incompressible, so that it takes as much room as it is large.
        job.start(&[&program, "noise", "2", "16", "small"])?;
        job.until_output("ready")?;
        proof::dump_and_compare(&job, "auto", "10ms", "the first checkpoint")?;
        let pid = job.pid().to_string();
        let mut failed = 0;
        for _ in 0..4 {
            job.pause(300);
            failed += u32::from(
                !job.command()?
                    .args(["dump", "--pid", &pid, "--name", job.name()])
                    .output()?
                    .status
                    .success(),
            );
        }
        ensure!(failed > 0, "the store never filled up");
        let options = Command::new("mount").args(["-o", "remount,size=400m"]).arg(&store).status()?;
        ensure!(options.success(), "giving the store more room");
        job.pause(50);
        proof::dump_and_compare(&job, "auto", "0s", "after the store was full")
    })();
    job.end();
    let unmounted = Command::new("umount").arg("-l").arg(&store).status()?;
    ensure!(unmounted.success(), "unmounting {}", store.display());
    result
}

/// Not a test: what freezes the job of the one below. The job's parent takes its stops for its own.
#[test]
fn a_ckpt_that_freezes_again_and_again() -> Result<()> {
    let Ok(pid) = std::env::var(FROZEN) else { return Ok(()) };
    for number in 0..5000 {
        let frozen = Frozen::freeze(&[pid.parse()?]).with_context(|| format!("freeze {number}"))?;
        frozen.thaw()?;
    }
    Ok(())
}

/// A thread that makes another one at the moment when it is asked to stop forgets that it was asked.
#[test]
fn frozen_while_threads_are_born() -> Result<()> {
    let mut job = Job::new("births")?;
    let program = job.build("births")?;
    job.start(&[&program])?;
    job.until_output("ready")?;
    let mut freezing = Command::new(std::env::current_exe()?);
    freezing.args(["--exact", "a_ckpt_that_freezes_again_and_again", "--nocapture"]);
    let output = freezing.env(FROZEN, job.pid().to_string()).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    ensure!(job.is_running() && job.output()? == "ready\n", "{}", job.output()?);
    Ok(())
}
