//! `dump --when-below`: the freeze comes when little memory is modified.

use anyhow::{Context, Result, ensure};
use ckpt_tests::job::Job;
use serde_json::Value;
use std::path::Path;
use std::process::{Command, Stdio};

fn phases(name: &str) -> Result<Job> {
    let mut job = Job::new(name)?;
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("workloads/phases.c");
    let program = job.path("phases");
    let mut gcc = Command::new("gcc");
    gcc.args(["-O1", "-g", "-Wall", "-Wextra", "-pthread", "-o"]).arg(&program).arg(source);
    let output = gcc.output().context("running gcc")?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    job.start(&[&program.display().to_string()])?;
    job.until_output("quiet\n")?;
    Ok(job)
}

fn document(output: &[u8]) -> Result<Value> {
    serde_json::from_slice(output).with_context(|| String::from_utf8_lossy(output).into_owned())
}

/// The busy program is not frozen until it is quiet; a deadline freezes it anyway. With and without a checkpoint before.
#[test]
fn the_cut_falls_into_the_quiet_phase() -> Result<()> {
    for before in [true, false] {
        let name = if before { "low-later" } else { "low-first" };
        let job = phases(name)?;
        if before {
            job.dump(false)?;
        }
        job.signal(libc::SIGUSR1)?;
        job.until_output("busy\n")?;
        let pid = job.pid().to_string();
        let arguments =
            ["dump", "--json", "--pid", &pid, "--name", name, "--when-below", "16M", "--deadline"];
        let dump = job.command()?.args(arguments).arg("1h").stdout(Stdio::piped()).spawn()?;
        job.pause(1500);
        // It ends no earlier than this, since it is busy until then.
        job.signal(libc::SIGUSR2)?;
        let output = dump.wait_with_output()?;
        let saved = document(&output.stdout)?;
        ensure!(saved["below"] == true && saved["modified_bytes"].as_u64() < Some(16 << 20), "{saved}");
        job.until_output("busy\nquiet\n")?;
        job.signal(libc::SIGKILL)?;
        job.wait()?;
        job.restore()?;
        job.signal(libc::SIGTERM)?;
        job.wait()?;
        ensure!(job.output()?.ends_with("was quiet\n"), "{}", job.output()?);
    }
    Ok(())
}

#[test]
fn the_deadline_is_kept() -> Result<()> {
    let job = phases("low-never")?;
    job.dump(false)?;
    job.signal(libc::SIGUSR1)?;
    job.until_output("busy\n")?;
    let pid = job.pid().to_string();
    let mut arguments = vec!["dump", "--json", "--pid", &pid, "--name", "low-never", "--when-below", "1M"];
    arguments.extend(["--deadline", "300ms"]);
    let saved = document(job.ok(&arguments)?.as_bytes())?;
    ensure!(saved["below"] == false && saved["waited_us"].as_u64() >= Some(300_000), "{saved}");
    ensure!(saved["modified_bytes"].as_u64() >= Some(64 << 20), "{saved}");
    job.signal(libc::SIGKILL)?;
    job.wait()?;
    job.restore()?;
    job.signal(libc::SIGTERM)?;
    job.wait()?;
    ensure!(job.output()?.ends_with("was busy\n"), "{}", job.output()?);
    Ok(())
}
