//! Programs that nobody here wrote: dumped, killed and restored twice, with the result of an uninterrupted run.

use anyhow::{Context, Result, ensure};
use ckpt_tests::job::Job;
use std::fs;
use std::process::Command;

/// What a shell command prints when nothing disturbs it.
fn undisturbed(job: &Job, script: &str) -> Result<String> {
    let output = Command::new("bash").args(["-c", script]).current_dir(job.directory()).output()?;
    ensure!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs `script` with two cycles, the first after `wait` ms, and gives its output.
fn disturbed(job: &mut Job, script: &str, wait: u64) -> Result<String> {
    job.start(&["bash", "-c", script])?;
    for _ in 0..2 {
        job.pause(wait);
        ensure!(job.is_running(), "the job ended before it could be disturbed:\n{}", job.output()?);
        job.cycle()?;
    }
    job.wait()?;
    job.output()
}

fn same_result(name: &str, script: &str, wait: u64) -> Result<()> {
    let mut job = Job::new(name)?;
    let expected = undisturbed(&job, script)?;
    let got = disturbed(&mut job, script, wait)?;
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
    same_result("numpy", &script, 700)
}

#[test]
fn xz_with_two_threads() -> Result<()> {
    let job = Job::new("xz-data")?;
    let data = job.path("data");
    undisturbed(&job, "for i in $(seq 24); do seq $i 7 6000000; done > data")?;
    same_result("xz", &format!("xz -T2 -1 -c {} | md5sum", data.display()), 600)
}

#[test]
fn pipeline() -> Result<()> {
    same_result("pipeline", "seq 1 25000000 | gzip -1 | gunzip | md5sum", 800)
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
    same_result("sqlite", &format!("exec /usr/bin/python3 {}", path.display()), 700)
}

#[test]
fn redis_under_load() -> Result<()> {
    let mut job = Job::new("redis")?;
    let script = r#"
redis-server --port 0 --unixsocket ./r.sock --save "" --logfile redis.log --dir . &
while [ ! -S r.sock ]; do sleep 0.05; done
redis-server --port 17379 --bind 127.0.0.1 --save "" --logfile tcp.log --dir . &
until redis-cli -p 17379 ping >/dev/null 2>&1; do sleep 0.05; done
redis-benchmark -p 17379 -n 150000 -c 20 -t incr -q >bench1 2>&1 || echo failed
redis-benchmark -s ./r.sock -n 150000 -c 20 -t incr -q >bench2 2>&1 || echo failed
redis-cli -p 17379 get counter:__rand_int__
redis-cli -s ./r.sock get counter:__rand_int__
redis-cli -p 17379 shutdown nosave
redis-cli -s ./r.sock shutdown nosave
wait
"#;
    // The relative path of the Unix socket is redis' own choice here, and is refused by name.
    let script = script.replace("./r.sock", &job.path("r.sock").display().to_string());
    let output = disturbed(&mut job, &script, 1200)?;
    ensure!(output == "150000\n150000\n", "{output}");
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
                  sleep 0.5; wrk -t2 -c20 -d6s --timeout 30s http://127.0.0.1:18188/; kill %1; wait; ls nginx.pid 2>&1";
    let output = disturbed(&mut job, script, 1500)?;
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
    let expected = undisturbed(&job, "make -j2 >/dev/null && ./prog && make clean >/dev/null")?;
    disturbed(&mut job, "exec make -j2", 700)?;
    let got = undisturbed(&job, "make -q prog && ./prog")?;
    ensure!(got == expected, "{got} instead of {expected}: {}", job.output()?);
    Ok(())
}

#[test]
fn job_runs_on_while_it_is_dumped() -> Result<()> {
    let mut job = Job::new("running")?;
    let script = "seq 1 15000000 | gzip -1 | gunzip | md5sum";
    let expected = undisturbed(&job, script)?;
    job.start(&["bash", "-c", script])?;
    let mut dumps = 0;
    while job.is_running() && dumps < 10 {
        job.pause(200);
        // It may end while it is looked at.
        dumps += usize::from(job.dump(false).is_ok());
    }
    ensure!(dumps > 2, "only {dumps} dumps");
    job.wait()?;
    ensure!(job.output()? == expected, "{}", job.output()?);
    Ok(())
}

#[test]
fn taken_pids_lead_to_a_namespace() -> Result<()> {
    let mut job = Job::new("namespace")?;
    let code = "import os, time\np = os.getpid()\nfor i in range(40):\n    assert os.getpid() == p\n    time.sleep(0.05)\nprint('same', flush=True)\n";
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
    job.ok(&["restore", "namespace", "--pids", "namespace"])?;
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
for i in $(seq 3000); do echo "insert into t values ($i, md5('$i')); select pg_sleep(0.002);"; done | as psql -q -h {directory}/sock postgres >/dev/null
as psql -At -h {directory}/sock -c "select count(*), sum(n), md5(string_agg(v, '' order by n)) from t" postgres
kill -INT $(head -n 1 data/postmaster.pid); wait; tail -n 1 postgres.log | grep -o 'database system is shut down'
"#
    );
    let output = disturbed(&mut job, &script, 2000)?;
    let log = fs::read_to_string(job.path("postgres.log"))?;
    ensure!(
        output.contains("3000|4501500|") && output.ends_with("database system is shut down\n"),
        "{output}{log}"
    );
    ensure!(!log.contains("PANIC") && !log.contains("terminated by signal"), "{log}");
    let left = fs::read_to_string("/proc/sysvipc/shm")?;
    let user = nix::unistd::User::from_name("postgres")?.context("no user postgres")?.uid.to_string();
    ensure!(left.lines().all(|line| line.split_ascii_whitespace().nth(7) != Some(&user)), "{left}");
    Ok(())
}
