//! Programs that nobody here wrote, with a checkpoint every second: dumped while they run, several times, each time
//! only what was modified, then dumped, killed and restored; all of that twice. They check themselves, or their
//! result is that of an uninterrupted run.
//!
//! The programs run until they find a file `end`: so none is over before it could be disturbed.

use anyhow::{Context, Result, bail, ensure};
use ckpt_tests::job::Job;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Dumps of the running job before each kill.
const DUMPS: usize = 2;

fn workload(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("workloads").join(name)
}

/// Runs a shell command in the job's directory, undisturbed.
fn shell(job: &Job, script: &str) -> Result<String> {
    let output = Command::new("bash").args(["-c", script]).current_dir(job.directory()).output()?;
    ensure!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// How the second restore brings memory back.
#[derive(Clone, Copy, PartialEq)]
enum Second {
    Whole,
    Lazily,
}

/// Two cycles, with checkpoints every second before each.
fn cycles(job: &Job, name: &str, second: Second) -> Result<()> {
    let mut number = 0;
    for cycle in 0..2 {
        for dump in 0..=DUMPS {
            job.pause(if dump == 0 { 300 } else { 1000 });
            ensure!(job.is_running(), "it ended by itself:\n{}", job.output()?);
            job.dump(dump == DUMPS)
                .with_context(|| format!("it said:\n{}", job.output().unwrap_or_default()))?;
            number += 1;
            // The first dump of a new process saves everything.
            ensure!(is_incremental(job, &format!("{name}@{number}"))? == (dump > 0), "{name}@{number}");
        }
        let mut arguments = vec!["restore", name, "--pids", "same"];
        if cycle == 1 && second == Second::Lazily {
            arguments.push("--lazy");
        }
        job.ok(&arguments)?;
    }
    job.pause(500);
    ensure!(job.is_running(), "it ended after the last restore:\n{}", job.output()?);
    job.ok(&["verify", name])?;
    Ok(())
}

fn is_incremental(job: &Job, checkpoint: &str) -> Result<bool> {
    let text = job.ok(&["show", checkpoint, "--json"])?;
    let document: serde_json::Value = serde_json::from_str(&text)?;
    Ok(document["checkpoint"]["nodes"][0]["base"].is_object())
}

fn end(job: &Job) -> Result<String> {
    fs::write(job.path("end"), "")?;
    job.wait()?;
    job.output()
}

/// A program that says `ready` when it is, and `pass` at its end if everything was right.
fn passes(job: &mut Job, name: &str, command: &[&str], second: Second) -> Result<()> {
    job.start(command)?;
    job.until_output("ready")?;
    cycles(job, name, second)?;
    let output = end(job)?;
    ensure!(output == "ready\npass\n", "{name}: {output}");
    Ok(())
}

#[test]
fn java_with_24_threads() -> Result<()> {
    let mut job = Job::new("java")?;
    let source = workload("Threads.java");
    shell(&job, &format!("javac -d . {}", source.display()))?;
    passes(&mut job, "java", &["java", "-Xmx256m", "-cp", ".", "Threads"], Second::Lazily)
}

#[test]
fn node_js() -> Result<()> {
    let script = workload("loop.js").display().to_string();
    passes(&mut Job::new("node")?, "node", &["node", &script], Second::Whole)
}

#[test]
fn go_with_goroutines() -> Result<()> {
    let mut job = Job::new("go")?;
    let source = workload("goroutines.go");
    shell(&job, &format!("GOCACHE=$PWD/cache GOFLAGS=-mod=mod go build -o goroutines {}", source.display()))?;
    let program = job.path("goroutines").display().to_string();
    passes(&mut job, "go", &[&program], Second::Lazily)
}

#[test]
fn numpy_with_threads() -> Result<()> {
    let mut job = Job::new("numpy")?;
    let script = workload("matrix.py").display().to_string();
    job.start(&["/usr/bin/python3", &script])?;
    job.until_output("ready")?;
    cycles(&job, "numpy", Second::Whole)?;
    let output = end(&job)?;
    let rounds = output.lines().last().and_then(|line| line.split(' ').next()).context("no result")?;
    let expected = shell(&job, &format!("/usr/bin/python3 {script} {rounds}"))?;
    ensure!(output == expected, "{output} instead of {expected}");
    Ok(())
}

#[test]
fn redis_under_load() -> Result<()> {
    let mut job = Job::new("redis")?;
    let script = r#"
redis-server --port 17380 --bind 127.0.0.1 --save "" --logfile redis.log --dir . &
until redis-cli -p 17380 ping >/dev/null 2>&1; do sleep 0.05; done
echo ready
n=0
while [ ! -e end ]; do
    redis-benchmark -p 17380 -n 20000 -c 20 -r 5000 -d 200 -t incr,set -q >bench 2>&1 || echo failed
    n=$((n + 20000))
done
echo $n
redis-cli -p 17380 eval "local s = 0; for _, k in ipairs(redis.call('keys', 'counter:*')) do s = s + redis.call('get', k) end; return s" 0
redis-cli -p 17380 eval "local n = 0; for _, k in ipairs(redis.call('keys', 'key:*')) do if #redis.call('get', k) ~= 200 then n = n + 1 end end; return n" 0
redis-cli -p 17380 shutdown nosave
wait
"#;
    job.start(&["bash", "-c", script])?;
    job.until_output("ready")?;
    cycles(&job, "redis", Second::Whole)?;
    let output = end(&job)?;
    let lines: Vec<&str> = output.lines().collect();
    ensure!(lines.len() == 4 && lines[0] == "ready" && lines[1] == lines[2] && lines[3] == "0", "{output}");
    Ok(())
}

#[test]
fn stress_ng_that_verifies_memory() -> Result<()> {
    let mut job = Job::new("stress")?;
    let script = "echo ready; (while [ ! -e end ]; do sleep 0.1; done; kill -INT $$) & \
                  exec stress-ng --vm 2 --vm-bytes 64M --verify --temp-path .";
    job.start(&["bash", "-c", script])?;
    job.until_output("dispatching hogs")?;
    cycles(&job, "stress", Second::Whole)?;
    let output = end(&job)?;
    ensure!(output.contains("successful run completed") && !output.contains("fail"), "{output}");
    Ok(())
}

#[test]
fn ffmpeg_with_x264() -> Result<()> {
    let mut job = Job::new("ffmpeg")?;
    let encode = |frames: &str, to: &str| {
        format!(
            "/usr/bin/python3 {} {frames} | ffmpeg -nostdin -v error -f rawvideo -pix_fmt gray -s 320x240 -r 50 \
             -i - -c:v libx264 -preset fast -threads 4 -pix_fmt yuv420p -bitexact -y {to}; echo $?",
            workload("frames.py").display()
        )
    };
    job.start(&["bash", "-c", &encode("", "disturbed.mkv")])?;
    job.until("frames are encoded", || {
        Ok(fs::metadata(job.path("disturbed.mkv")).is_ok_and(|f| f.len() > 0))
    })?;
    cycles(&job, "ffmpeg", Second::Whole)?;
    let output = end(&job)?;
    ensure!(output == "0\n", "{output}");
    let frames = fs::read_to_string(job.path("frames"))?;
    // Undisturbed, too, x264 with threads does not always give the same bytes on a busy machine: seen in one run of six,
    // with some macroblocks of one group of pictures coded otherwise.
    for _ in 0..4 {
        shell(&job, &encode(&frames, "expected.mkv"))?;
        let (disturbed, expected) =
            (fs::read(job.path("disturbed.mkv"))?, fs::read(job.path("expected.mkv"))?);
        if disturbed == expected && !expected.is_empty() {
            return Ok(());
        }
    }
    bail!("{frames} frames are not encoded as without a disturbance")
}
