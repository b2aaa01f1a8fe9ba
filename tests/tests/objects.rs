//! Self-checking workloads, one per kind of state: set up before the checkpoint, verified after two restores.

use anyhow::{Context, Result, ensure};
use ckpt_cli::tracee::mapping_flags::MappingFlags;
use ckpt_cli::tracee::proc;
use ckpt_tests::job::Job;
use ckpt_tests::sharing::{physical_memory, store_equal_pages_once};
use procfs::process::VmFlags;

/// Undisturbed, left running through three dumps, and through two cycles: it must say pass each time.
fn survives(name: &str) -> Result<()> {
    survives_with(name, &[])
}

/// The same, with arguments.
fn survives_with(name: &str, arguments: &[&str]) -> Result<()> {
    for (dumps, cycles) in [(0, 0), (3, 0), (0, 2)] {
        let mut job = Job::new(name)?;
        let program = job.build(name)?;
        job.start(&[&[program.as_str()], arguments].concat())?;
        job.until_output("ready")?;
        job.pause(100);
        for _ in 0..dumps {
            job.dump(false)?;
            job.pause(50);
        }
        for _ in 0..cycles {
            job.cycle()?;
            job.pause(100);
        }
        ensure!(job.is_running(), "it ended with {dumps} dumps and {cycles} cycles:\n{}", job.output()?);
        job.passes().with_context(|| format!("after {dumps} dumps and {cycles} cycles"))?;
    }
    Ok(())
}

#[test]
fn threads_with_registers_tls_fpu_and_signals() -> Result<()> {
    survives("threads")
}

#[test]
fn mappings_of_every_kind() -> Result<()> {
    survives("mappings")
}

/// Of so much memory that flags of mappings are read by a BPF program.
#[test]
fn mappings_of_every_kind_beside_much_memory() -> Result<()> {
    survives_with("mappings", &["600"])
}

/// It says what smaps says, of mappings of every kind and of the library's own, here and where it was kept.
#[test]
fn flags_read_by_bpf_are_those_of_smaps() -> Result<()> {
    let mut job = Job::new("mappings")?;
    let program = job.build("mappings")?;
    job.start(&[&program])?;
    job.until_output("ready")?;
    let mut python = Job::new("python")?;
    python.start(&["/usr/bin/python3", "-c", "import time\nprint('ready', flush=True)\ntime.sleep(600)"])?;
    python.until_output("ready")?;
    let loaded = MappingFlags::load()?;
    let few = loaded.maps(python.pid())?;
    ensure!(few == proc::maps_with_flags(python.pid())?, "{few:?}");
    let kept = MappingFlags::new(loaded.into_program())?;
    for pid in proc::tree(job.pid()) {
        let (by_bpf, by_smaps) = (kept.maps(pid)?, proc::maps_with_flags(pid)?);
        ensure!(by_bpf == by_smaps, "process {pid}: {by_bpf:?} instead of {by_smaps:?}");
        ensure!(by_bpf.iter().any(|map| map.flags.contains(VmFlags::DD)), "no advice at all");
    }
    ensure!(kept.maps(i32::MAX).is_err(), "a process that is not there has mappings");
    job.passes()
}

#[test]
fn signals_and_timers() -> Result<()> {
    survives("signals")
}

#[test]
fn trees_sessions_groups_and_zombies() -> Result<()> {
    survives("tree")
}

#[test]
fn pipes_and_fifos() -> Result<()> {
    survives("pipes")
}

#[test]
fn event_descriptors() -> Result<()> {
    survives("events")
}

#[test]
fn open_files_and_locks() -> Result<()> {
    survives("files")
}

#[test]
fn credentials_and_capabilities() -> Result<()> {
    survives("credentials")
}

#[test]
fn unix_sockets() -> Result<()> {
    survives("unixes")
}

#[test]
fn waiting_calls_do_not_see_the_freeze() -> Result<()> {
    survives("calls")
}

/// A parent and its children share the pages that neither has written since, before and after.
#[test]
fn forked_children_share_memory() -> Result<()> {
    let mut job = Job::new("family")?;
    let program = job.build("family")?;
    job.start(&[&program])?;
    job.until_output("ready")?;
    job.pause(100);
    let before = physical_memory(job.pid())?;
    ensure!(before < 160 << 20, "they did not share in the beginning: {before} bytes");
    for _ in 0..2 {
        job.dump(true)?;
        store_equal_pages_once(&job.path("store"), "family")?;
        job.restore()?;
        job.pause(100);
        let after = physical_memory(job.pid())?;
        ensure!(after < before + (16 << 20), "{before} bytes of physical memory have become {after}");
    }
    job.passes()
}

/// What was in huge pages comes back in huge pages, without advice that was never given.
#[test]
fn huge_pages_that_nobody_asked_for() -> Result<()> {
    let mut job = Job::new("huge")?;
    let program = job.build("huge")?;
    job.start(&[&program])?;
    job.until_output("ready")?;
    job.pause(50);
    let look = || -> Result<(u64, bool)> {
        let text = std::fs::read_to_string(format!("/proc/{}/smaps", job.pid()))?;
        let sizes = text.lines().filter_map(|line| line.strip_prefix("AnonHugePages:"));
        let sizes = sizes.filter_map(|size| size.trim().trim_end_matches(" kB").parse::<u64>().ok());
        let mut flags = text.lines().filter(|line| line.starts_with("VmFlags:"));
        Ok((sizes.sum(), flags.any(|flags| flags.contains(" hg") || flags.contains(" nh"))))
    };
    let before = look()?;
    ensure!(before == (7 * 2048, false), "it has {before:?}");
    for _ in 0..2 {
        job.cycle()?;
        // Neighbours that were whole, too, in small pages, may have become huge.
        let (size, advice) = look()?;
        ensure!((7 * 2048..12 * 2048).contains(&size) && !advice, "it has {size} kB, advice: {advice}");
    }
    job.passes()
}

/// An image that stores the pages of each process for itself restores all the same.
#[test]
fn forked_children_without_common_pages() -> Result<()> {
    survives("family")
}

/// The node of the restore has another vdso: the old code stays, its functions jump to the new ones. Forced, since all
/// tests run on one kernel.
#[test]
fn another_vdso_at_the_destination() -> Result<()> {
    let mut job = Job::new("vdso")?;
    let code = r"
import os, time, threading
def tick():
    while True:
        a = time.time(); b = time.monotonic(); c = time.perf_counter_ns()
        assert time.time() >= a and time.monotonic() >= b and time.perf_counter_ns() >= c
threading.Thread(target=tick, daemon=True).start()
print('ready', flush=True)
while not os.path.exists('stop'):
    time.sleep(0.001)
print('pass', flush=True)
";
    std::fs::write(job.path("work.py"), code)?;
    job.start(&["/usr/bin/python3", "work.py"])?;
    job.until_output("ready")?;
    for _ in 0..2 {
        job.pause(200);
        job.dump(true)?;
        job.ok_with(&["restore", "vdso", "--pids", "same"], &[("CKPT_FAULT_OTHER_VDSO", "1")])?;
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", job.pid()))?;
        ensure!(maps.contains("[vdso]"), "{maps}");
    }
    job.pause(200);
    std::fs::write(job.path("stop"), "")?;
    job.wait()?;
    ensure!(job.output()? == "ready\npass\n", "{}", job.output()?);
    Ok(())
}

#[test]
fn io_uring_with_registered_buffers() -> Result<()> {
    survives("rings")
}
