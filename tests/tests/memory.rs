//! The proof that an image holds the memory at the cut, page by page, for each way of saving, kind of memory and writer.

use anyhow::{Result, ensure};
use ckpt_tests::{job::Job, proof};

/// One writer: a full checkpoint and two increments, each compared.
fn holds(way: &str, kind: &str, threads: &str, size: &str) -> Result<()> {
    let what = format!("--cow {way}, {kind}, {threads} threads, {size} pages");
    let job = proof::writers(&[kind, threads, "24", size])?;
    for number in 1..=3 {
        job.pause(40);
        // No time for copying in the cut: whatever can be guarded is.
        let pause = if number == 2 { "10ms" } else { "0s" };
        proof::dump_and_compare(&job, way, pause, &format!("{what}, checkpoint {number}"))?;
    }
    ensure!(job.is_running(), "{what}: {}", job.output()?);
    Ok(())
}

const KINDS: [&str; 7] = ["random", "sequential", "file", "direct", "shared", "sysv", "churn"];

fn way(way: &str) -> Result<()> {
    for kind in KINDS {
        for threads in ["1", "4"] {
            holds(way, kind, threads, "small")?;
        }
    }
    holds(way, "random", "4", "huge")?;
    holds(way, "sequential", "1", "huge")
}

#[test]
fn old_content_kept_by_bpf() -> Result<()> {
    way("bpf")
}

/// More is written after the cut than there is room for: the job waits, and nothing is lost.
#[test]
fn a_job_that_overruns_its_guard_waits() -> Result<()> {
    let job = proof::writers(&["sequential", "4", "256", "small"])?;
    for number in 1..=8 {
        let few = [("CKPT_FAULT_FEW_SLOTS", "1")];
        proof::dump_with(&job, "bpf", "0s", &format!("checkpoint {number}"), &few)?;
        let phases = job.ok(&["show", job.name(), "--phases"])?;
        // So few slots are gone in some milliseconds if others have the processors. Then it was made in another way.
        if phases.contains("held back") {
            ensure!(job.is_running(), "{}", job.output()?);
            return Ok(());
        }
    }
    anyhow::bail!("it did not overrun its guard in any checkpoint")
}

/// Much memory of which little is written goes to the store while it is copied, whether the job runs or stays frozen.
#[test]
fn what_is_copied_is_saved_at_once() -> Result<()> {
    let job = proof::writers(&["slow", "2", "200", "small"])?;
    let (pid, references) = (job.pid().to_string(), job.path("references"));
    let reference = ("CKPT_REFERENCE", &*references.display().to_string());
    for stop in [&[][..], &["--stop"]] {
        let arguments = [&["dump", "--pid", &pid, "--name", job.name(), "--full"], stop].concat();
        // On a busy machine it would be made in another way.
        job.ok_with(&arguments, &[reference, ("CKPT_FAULT_AT_ONCE", "1")])?;
        proof::compare(&job, &references, &format!("{stop:?}"))?;
        let phases = job.ok(&["show", job.name(), "--phases"])?;
        ensure!(phases.contains("copy and save ahead"), "it was not saved while it was copied: {phases}");
    }
    Ok(())
}

#[test]
fn old_content_kept_by_userfaultfd() -> Result<()> {
    way("uffd")
}

#[test]
fn everything_copied_in_the_cut() -> Result<()> {
    way("stop")
}

fn by_io_uring(kind: &str) -> Result<()> {
    for way in ["bpf", "uffd", "stop"] {
        for threads in ["1", "4"] {
            holds(way, kind, threads, "small")?;
        }
    }
    Ok(())
}

#[test]
fn reads_by_io_uring_that_are_under_way() -> Result<()> {
    by_io_uring("uring")
}

#[test]
fn reads_by_io_uring_into_registered_buffers() -> Result<()> {
    by_io_uring("uring-fixed")
}

/// Pages that were dropped from a private file mapping, and made again by a write that a signal has interrupted: the kernel
/// shows them as protected and not written.
#[test]
fn pages_that_are_dropped_and_written_half_way() -> Result<()> {
    let mut job = Job::new("halfway")?;
    let program = job.build("halfway")?;
    std::fs::create_dir(job.path("references"))?;
    job.start(&[&program])?;
    job.until_output("ready")?;
    for (number, said) in ["half way 1", "dropped", "half way 2"].iter().enumerate() {
        for way in ["stop", "bpf", "uffd"] {
            proof::dump_and_compare(&job, way, "0s", &format!("--cow {way}, before {said}"))?;
        }
        std::fs::write(job.path(&format!("go{}", number + 1)), "")?;
        job.until_output(said)?;
    }
    proof::dump_and_compare(&job, "auto", "10ms", "at the end")?;
    job.cycle()?;
    std::fs::write(job.path("go4"), "")?;
    job.wait()?;
    ensure!(job.output()?.ends_with("pass\n"), "{}", job.output()?);
    Ok(())
}

/// Processes that are there at the cut and end before they were saved: the dump is tried again, with a freeze until all
/// memory is copied.
#[test]
fn processes_that_end_while_they_are_guarded() -> Result<()> {
    let mut job = Job::new("mortal")?;
    let program = job.build("writers")?;
    std::fs::create_dir(job.path("references"))?;
    let script = format!("(while :; do sleep 0.02; done) & exec {program} random 1 64 small");
    job.start(&["bash", "-c", &script])?;
    job.until_output("ready")?;
    for (number, way) in ["bpf", "uffd", "bpf", "uffd", "auto", "auto"].iter().enumerate() {
        let pause = if *way == "auto" { "10ms" } else { "0s" };
        proof::dump_and_compare(&job, way, pause, &format!("--cow {way}, checkpoint {number}"))?;
        ensure!(job.is_running(), "{}", job.output()?);
    }
    Ok(())
}
