//! Programs that nobody here wrote: dumped, killed and restored twice, with the result of an uninterrupted run.

use anyhow::{Context, Result, ensure};
use ckpt_tests::job::Job;
use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

/// The file in a job's directory that tells a job without an end of its own that it has been disturbed enough.
const ENOUGH: &str = "enough";

/// What a shell command prints when nothing disturbs it.
fn undisturbed(job: &Job, script: &str) -> Result<String> {
    let output = Command::new("bash").args(["-c", script]).current_dir(job.directory()).output()?;
    ensure!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs `script` with two cycles, each after `pause`, and gives its output.
fn disturbed(job: &mut Job, script: &str, pause: Duration) -> Result<String> {
    job.start(&["bash", "-c", script])?;
    for _ in 0..2 {
        std::thread::sleep(pause);
        ensure!(job.is_running(), "the job ended before it could be disturbed:\n{}", job.output()?);
        job.cycle()?;
    }
    fs::write(job.path(ENOUGH), "")?;
    job.wait()?;
    job.output()
}

/// The result of `script` is the same with and without cycles, which fall into its first half on any machine.
fn same_result(name: &str, script: &str) -> Result<()> {
    let mut job = Job::new(name)?;
    let start = Instant::now();
    let expected = undisturbed(&job, script)?;
    let got = disturbed(&mut job, script, start.elapsed() / 5)?;
    ensure!(got == expected, "{name}: {got:?} instead of {expected:?}");
    Ok(())
}

#[test]
fn numpy_with_threads() -> Result<()> {
    let job = Job::new("numpy")?;
    let code = r"
import hashlib, os
import numpy as np
a = np.random.default_rng(1).standard_normal((500, 500))
b = a.copy()
for i in range(900):
    b = a @ b
    b /= np.abs(b).max()
print(hashlib.sha256(np.round(b, 6).tobytes()).hexdigest(), len(os.listdir('/proc/self/task')) > 1)
";
    let path = job.path("work.py");
    fs::write(&path, code)?;
    let script = format!("exec /usr/bin/python3 {}", path.display());
    ensure!(undisturbed(&job, &script)?.trim().ends_with("True"), "OpenBLAS has no threads here");
    same_result("numpy", &script)
}

#[test]
fn xz_with_two_threads() -> Result<()> {
    let job = Job::new("xz-data")?;
    let data = job.path("data");
    undisturbed(&job, "for i in $(seq 24); do seq $i 7 6000000; done > data")?;
    same_result("xz", &format!("xz -T2 -1 -c {} | md5sum", data.display()))
}

#[test]
fn pipeline() -> Result<()> {
    same_result("pipeline", "seq 1 25000000 | gzip -1 | gunzip | md5sum")
}

#[test]
fn sqlite_in_wal_mode() -> Result<()> {
    let code = r"
import hashlib, os, sqlite3, time
for old in ('t.db', 't.db-wal', 't.db-shm'):
    if os.path.exists(old): os.unlink(old)
db = sqlite3.connect('t.db')
print(db.execute('pragma journal_mode=wal').fetchone())
db.execute('create table t(id integer primary key, v text)')
for i in range(1500):
    with db: db.execute('insert into t(v) values(?)', (hashlib.md5(str(i).encode()).hexdigest(),))
    time.sleep(0.001)
print(db.execute('select count(*), max(id), min(v), max(v) from t').fetchone())
print(db.execute('pragma integrity_check').fetchone())
";
    let job = Job::new("sqlite-code")?;
    let path = job.path("work.py");
    fs::write(&path, code)?;
    same_result("sqlite", &format!("exec /usr/bin/python3 {}", path.display()))
}

#[test]
fn redis_under_load() -> Result<()> {
    let mut job = Job::new("redis")?;
    let script = r#"
redis-server --port 0 --unixsocket ./r.sock --save "" --logfile redis.log --dir . &
while [ ! -S r.sock ]; do sleep 0.05; done
redis-server --port 17379 --bind 127.0.0.1 --save "" --logfile tcp.log --dir . &
until redis-cli -p 17379 ping >/dev/null 2>&1; do sleep 0.05; done
rounds=0
until [ -e enough ]; do
    redis-benchmark -p 17379 -n 30000 -c 20 -t incr -q >bench1 2>&1 || echo failed
    redis-benchmark -s ./r.sock -n 30000 -c 20 -t incr -q >bench2 2>&1 || echo failed
    rounds=$((rounds + 1))
done
echo $((rounds * 30000))
redis-cli -p 17379 get counter:__rand_int__
redis-cli -s ./r.sock get counter:__rand_int__
redis-cli -p 17379 shutdown nosave
redis-cli -s ./r.sock shutdown nosave
wait
"#;
    // The relative path of the Unix socket is redis' own choice here, and is refused by name.
    let script = script.replace("./r.sock", &job.path("r.sock").display().to_string());
    let output = disturbed(&mut job, &script, Duration::from_millis(1200))?;
    let counts: Vec<u64> =
        output.lines().map(str::parse).collect::<Result<_, _>>().context(output.clone())?;
    ensure!(counts.len() == 3 && counts[0] > 0 && counts.iter().all(|count| *count == counts[0]), "{output}");
    Ok(())
}

#[test]
fn nginx_under_load() -> Result<()> {
    let mut job = Job::new("nginx")?;
    fs::create_dir(job.path("www"))?;
    fs::write(job.path("www/index.html"), vec![b'x'; 20_000])?;
    let temporary =
        ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"].map(|name| format!("{name}_temp_path tmp; "));
    let conf = format!(
        "daemon off; worker_processes 2; pid nginx.pid; error_log error.log;\n\
         events {{ worker_connections 256; }}\n\
         http {{ access_log off; {} server {{ listen 127.0.0.1:18188; root www; }} }}\n",
        temporary.concat()
    );
    fs::write(job.path("nginx.conf"), conf)?;
    let script = "/usr/sbin/nginx -p $PWD -c nginx.conf &\n\
                  sleep 0.5; wrk -t2 -c20 -d600s --timeout 30s http://127.0.0.1:18188/ &\n\
                  until [ -e enough ]; do sleep 0.1; done; kill -INT %2; wait %2; kill %1; wait";
    let output = disturbed(&mut job, script, Duration::from_millis(1500))?;
    ensure!(output.contains("requests in") && !output.contains("Socket errors"), "{output}");
    ensure!(!output.contains("Non-2xx"), "{output}");
    let errors = fs::read_to_string(job.path("error.log")).unwrap_or_default();
    ensure!(!errors.contains("[alert]") && !errors.contains("[error]"), "{errors}");
    Ok(())
}

#[test]
fn make_with_two_jobs() -> Result<()> {
    let mut job = Job::new("make")?;
    let mut main = String::from("#include <stdio.h>\nint main(void) { long s = 0;\n");
    for i in 0..150 {
        let code = format!(
            "#include <stdio.h>\n#include <stdlib.h>\n#include <string.h>\n#include <math.h>\n#include <time.h>\n\
             long f{i}(long x) {{ char b[64]; snprintf(b, 64, \"%ld\", x * {i}); return atol(b) + (long)strlen(b); }}\n"
        );
        fs::write(job.path(&format!("f{i}.c")), code)?;
        main += &format!("extern long f{i}(long); s += f{i}({i});\n");
    }
    fs::write(job.path("main.c"), main + "printf(\"%ld\\n\", s); return 0; }\n")?;
    let makefile = "O = $(patsubst %.c,%.o,$(wildcard *.c))\nprog: $(O)\n\tgcc -o $@ $(O)\n\
                    %.o: %.c\n\tgcc -O2 -c -o $@ $<\nclean:\n\trm -f *.o prog\n";
    fs::write(job.path("Makefile"), makefile)?;
    let start = Instant::now();
    let expected = undisturbed(&job, "make -j2 >/dev/null && ./prog && make clean >/dev/null")?;
    disturbed(&mut job, "exec make -j2", start.elapsed() / 5)?;
    let got = undisturbed(&job, "make -q prog && ./prog")?;
    ensure!(got == expected, "{got} instead of {expected}: {}", job.output()?);
    Ok(())
}

#[test]
fn job_runs_on_while_it_is_dumped() -> Result<()> {
    let mut job = Job::new("running")?;
    let script = "i=0; until [ -e enough ]; do seq 1 500000; i=$((i + 1)); echo $i >rounds; done";
    job.start(&["bash", "-c", &format!("({script}) | gzip -1 | gunzip | md5sum")])?;
    for _ in 0..5 {
        job.pause(200);
        job.dump(false)?;
    }
    fs::write(job.path(ENOUGH), "")?;
    job.wait()?;
    let expected = undisturbed(&job, "for i in $(seq $(cat rounds)); do seq 1 500000; done | md5sum")?;
    ensure!(job.output()? == expected, "{}", job.output()?);
    Ok(())
}

#[test]
fn taken_pids_lead_to_a_namespace() -> Result<()> {
    let mut job = Job::new("namespace")?;
    let code = "import os, time\np = os.getpid()\nfor i in range(60):\n    assert os.getpid() == p\n    time.sleep(0.05)\nprint('same', flush=True)\n";
    fs::write(job.path("work.py"), code)?;
    job.start(&["/usr/bin/python3", "work.py"])?;
    job.pause(300);
    job.dump(false)?;
    // The original still has the PID.
    let refused = job.ckpt(&["restore", "namespace", "--pids", "same"])?;
    ensure!(refused.status.code() == Some(4), "{refused:?}");
    job.wait()?;
    ensure!(job.output()? == "same\n", "{}", job.output()?);
    fs::write(job.path("out"), "")?;
    let pidfile = job.path("pid");
    let again = ["restore", "namespace", "--pids", "namespace", "--pidfile", &pidfile.display().to_string()];
    job.ok(&again)?;
    // In there it is dumped like anywhere else.
    let pid = fs::read_to_string(&pidfile)?.trim().to_owned();
    ensure!(pid != job.pid().to_string(), "it has the old PID");
    job.ok(&["dump", "--pid", &pid, "--name", "namespace"])?;
    job.ok(&["dump", "--pid", &pid, "--name", "namespace", "--stop"])?;
    ensure!(job.output()?.is_empty(), "it ended before it could be dumped in its namespace");
    job.ok(&again)?;
    job.until_output("same")
}

/// What is missing where the job is to come back is named before anything is built; once it is there, all is well.
#[test]
fn missing_files_are_named() -> Result<()> {
    let mut job = Job::new("missing")?;
    let program = job.path("own-sleep");
    fs::copy("/usr/bin/sleep", &program)?;
    fs::write(job.path("data"), "what it reads")?;
    let command = format!("exec {} 1000 <data", program.display());
    job.start(&["bash", "-c", &command])?;
    job.until("it sleeps", || Ok(fs::read_link(format!("/proc/{}/exe", job.pid()))? == program))?;
    job.dump(true)?;
    for file in [&program, &job.path("data")] {
        let away = file.with_extension("away");
        fs::rename(file, &away)?;
        let refused = job.ckpt(&["restore", "missing", "--pids", "same"])?;
        let said = String::from_utf8_lossy(&refused.stderr);
        ensure!(refused.status.code() == Some(4), "{refused:?}");
        ensure!(said.contains(&*file.display().to_string()), "{} is not named: {said}", file.display());
        ensure!(!job.is_running(), "something was built without {}", file.display());
        fs::rename(&away, file)?;
    }
    job.restore()?;
    ensure!(job.is_running(), "it does not run");
    Ok(())
}

/// The segments that its processes share are System V's, and each session that works in parallel makes one more.
#[test]
fn postgres_with_a_session_that_inserts() -> Result<()> {
    let mut job = Job::new("postgres")?;
    let directory = job.directory().display().to_string();
    let script = format!(
        r#"
cd {directory} && chmod 755 . && install -d -o postgres data sock
as() {{ setpriv --reuid postgres --regid postgres --clear-groups "$@"; }}
PATH=$PATH:$(echo /usr/lib/postgresql/*/bin)
as initdb -D data --locale C -N -A trust >initdb.log 2>&1 || cat initdb.log
as postgres -D data -k {directory}/sock -c listen_addresses= -c shared_memory_type=sysv \
    -c dynamic_shared_memory_type=sysv -c fsync=off >postgres.log 2>&1 &
until as psql -h {directory}/sock -c 'create table t (n bigint, v text)' postgres >/dev/null 2>&1; do sleep 0.1; done
i=0; until [ -e enough ]; do
    i=$((i + 1)); echo "insert into t values ($i, md5('$i')); select pg_sleep(0.002);"; echo $i >count
done | as psql -q -h {directory}/sock postgres >/dev/null
all="count(*), sum(n), md5(string_agg(v, '' order by n))"
as psql -At -h {directory}/sock -c "select $all from t" postgres
as psql -At -h {directory}/sock -c "select $all from (select n, md5(n::text) v from generate_series(1, $(cat count)) n) w" postgres
kill -INT $(head -n 1 data/postmaster.pid); wait; tail -n 1 postgres.log | grep -o 'database system is shut down'
"#
    );
    let output = disturbed(&mut job, &script, Duration::from_millis(2500))?;
    let log = fs::read_to_string(job.path("postgres.log"))?;
    let said: Vec<&str> = output.lines().collect();
    ensure!(
        matches!(said[..], [had, expected, "database system is shut down"] if had == expected),
        "{output}{log}"
    );
    ensure!(!log.contains("PANIC") && !log.contains("terminated by signal"), "{log}");
    let left = fs::read_to_string("/proc/sysvipc/shm")?;
    let user = nix::unistd::User::from_name("postgres")?.context("no user postgres")?.uid.to_string();
    ensure!(left.lines().all(|line| line.split_ascii_whitespace().nth(7) != Some(&user)), "{left}");
    Ok(())
}
