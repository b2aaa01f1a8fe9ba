//! The proof that an image holds the memory at the cut, page by page, for each way of saving, kind of memory and writer.

use anyhow::{Result, ensure};
use ckpt_tests::job::Job;
use ckpt_tests::proof;
use std::fs;

/// One writer: a full checkpoint and two increments, each compared.
fn holds(way: &str, kind: &str, threads: &str, size: &str) -> Result<()> {
    let what = format!("--cow {way}, {kind}, {threads} threads, {size} pages");
    let mut job = Job::new("writers")?;
    let program = job.build("writers")?;
    fs::create_dir(job.path("references"))?;
    job.start(&[&program, kind, threads, "24", size])?;
    job.until_output("ready")?;
    for number in 1..=3 {
        job.pause(40);
        // No time for copying in the cut: whatever can be guarded is.
        let pause = if number == 2 { "10ms" } else { "0s" };
        proof::dump_and_compare(&job, way, pause, &format!("{what}, checkpoint {number}"))?;
    }
    ensure!(job.is_running(), "{what}: {}", job.output()?);
    Ok(())
}

const KINDS: [&str; 6] = ["random", "sequential", "file", "direct", "shared", "churn"];

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
