//! The test cluster itself: nodes are separate, reach each other, and leave nothing behind.

use anyhow::{Context, Result, ensure};
use ckpt_tests::cluster::Cluster;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

fn wait_for(what: &str, mut condition: impl FnMut() -> bool) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        ensure!(Instant::now() < deadline, "{what}: not within 20 seconds");
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// Is this process there, and not only waiting for its parent to notice its end?
fn running(process: i32) -> bool {
    let status = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    status.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

/// Processes of a cluster, by what their command line or working files mention.
fn processes_of(dir: &Path) -> Result<Vec<i32>> {
    let text = fs::read_to_string(dir.join("cluster.json"))?;
    let description: serde_json::Value = serde_json::from_str(&text)?;
    let nodes = description["nodes"].as_array().context("nodes")?;
    let numbers = nodes.iter().map(|node| &node["init"]).chain([&description["keeper"]]);
    numbers.map(|number| Ok(i32::try_from(number.as_i64().context("a PID")?)?)).collect()
}

#[test]
fn nodes_reach_each_other_by_ssh() -> Result<()> {
    let cluster = Cluster::start(3)?;
    assert_eq!(cluster.node(1).run(&["ssh", "node2", "hostname"])?, "node2");
    assert_eq!(cluster.node(3).run(&["ssh", "node1", "ssh node2 ssh node3 hostname"])?, "node3");
    let output = cluster.ssh("node2").arg("hostname; echo $PATH; exit 7").output()?;
    assert_eq!(output.status.code(), Some(7));
    let text = String::from_utf8(output.stdout)?;
    assert!(text.starts_with("node2\n/run/node/bin:"), "{text}");
    for address in [cluster.node(2).ip4.to_string(), cluster.node(2).ip6.to_string()] {
        let script = format!("exec 3<>/dev/tcp/{address}/22; head -c 4 <&3");
        assert_eq!(cluster.node(1).run(&["bash", "-c", &script])?, "SSH-");
    }
    assert_eq!(cluster.node(1).command(&["sh", "-c", "exit 9"]).status()?.code(), Some(9));
    Ok(())
}

#[test]
fn nodes_are_separate_and_share_one_folder() -> Result<()> {
    let cluster = Cluster::start(2)?;
    let (one, two) = (cluster.node(1), cluster.node(2));
    for own in ["/tmp", "/run", "/var/lib/ckpt", "/dev/shm"] {
        one.run(&["sh", "-c", &format!("echo mine > {own}/only-here")])?;
        assert!(!two.exec(&["cat", &format!("{own}/only-here")])?.status.success(), "{own}");
        assert!(!Path::new(own).join("only-here").exists(), "{own}");
    }
    one.run(&["sh", "-c", "echo both > /shared/file"])?;
    assert_eq!(two.run(&["cat", "/shared/file"])?, "both");
    assert_eq!(fs::read_to_string(cluster.shared().join("file"))?, "both\n");
    assert_eq!(fs::read_to_string(one.path("/shared/file"))?, "both\n");

    assert_eq!(one.run(&["cat", "/proc/1/comm"])?, "ckpt-cluster");
    assert_eq!(two.run(&["cat", "/etc/hostname"])?, "node2");
    assert!(one.run(&["ls", "/sys/fs/cgroup"]).is_ok());
    one.run(&["ipcmk", "--shmem", "4096"])?;
    assert!(one.run(&["ipcs", "--shmems"])?.contains("4096"));
    assert!(!two.run(&["ipcs", "--shmems"])?.contains("4096"));
    for space in ["net", "mnt", "pid", "uts", "ipc"] {
        let link = format!("/proc/self/ns/{space}");
        let all = [one.run(&["readlink", &link])?, two.run(&["readlink", &link])?];
        let here = fs::read_link(&link)?.display().to_string();
        assert!(all[0] != all[1] && all[0] != here && all[1] != here, "{space}");
    }
    Ok(())
}

#[test]
fn orphans_become_children_of_init_and_are_reaped() -> Result<()> {
    let cluster = Cluster::start(1)?;
    let node = cluster.node(1);
    let start = "(sleep 0.2 > /dev/null 2>&1 & echo $!; setsid sleep 1000 > /dev/null 2>&1 & echo $!)";
    let pids = node.run(&["bash", "-c", start])?;
    let [short, long] = pids.split_whitespace().collect::<Vec<_>>()[..] else { panic!("{pids}") };
    assert_eq!(node.run(&["ps", "-o", "ppid=", "-p", long])?, "1");
    wait_for("the orphan is reaped", || !node.path(format!("/proc/{short}")).exists())?;
    assert!(node.path(format!("/proc/{long}")).exists());
    Ok(())
}

#[test]
fn clusters_run_side_by_side() -> Result<()> {
    let starts: Vec<_> = (0..3).map(|_| std::thread::spawn(|| Cluster::start(2))).collect();
    let clusters: Vec<Cluster> =
        starts.into_iter().map(|start| start.join().expect("no panic")).collect::<Result<_>>()?;
    for cluster in &clusters {
        assert_eq!(cluster.node(1).run(&["ssh", "node2", "hostname"])?, "node2");
    }
    let addresses: std::collections::HashSet<_> = clusters.iter().map(|c| c.node(1).ip4).collect();
    assert_eq!(addresses.len(), 3);
    let dirs: Vec<PathBuf> = clusters.iter().map(|cluster| cluster.dir().to_owned()).collect();
    let processes: Vec<i32> = dirs.iter().map(|dir| processes_of(dir)).collect::<Result<Vec<_>>>()?.concat();
    assert!(processes.iter().all(|process| running(*process)));
    drop(clusters);
    assert!(!processes.iter().any(|process| running(*process)));
    assert!(!dirs.iter().any(|dir| dir.exists()));
    Ok(())
}

#[test]
fn killing_the_owner_leaves_nothing_behind() -> Result<()> {
    let tool = env!("CARGO_BIN_EXE_ckpt-cluster");
    let mut owner = Command::new(tool).args(["own", "2"]).stdout(Stdio::piped()).spawn()?;
    let mut line = String::new();
    BufReader::new(owner.stdout.take().context("output")?).read_line(&mut line)?;
    let dir = PathBuf::from(line.trim());
    let processes = processes_of(&dir)?;
    assert_eq!(processes.len(), 3);
    assert!(processes.iter().all(|process| running(*process)));
    owner.kill()?;
    owner.wait()?;
    wait_for("all processes end", || !processes.iter().any(|process| running(*process)))?;
    wait_for("the folder goes", || !dir.exists())
}

#[test]
fn killing_the_keeper_kills_the_nodes() -> Result<()> {
    let cluster = Cluster::start(2)?;
    let dir = cluster.dir().to_owned();
    let mut survivor = cluster.node(1).spawn(&["sleep", "1000"])?;
    let processes = processes_of(&dir)?;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(cluster.keeper()), nix::sys::signal::Signal::SIGKILL)?;
    wait_for("all processes end", || !processes.iter().any(|process| running(*process)))?;
    assert!(!survivor.wait()?.success());
    drop(cluster);
    assert!(!dir.exists());
    Ok(())
}

#[test]
fn a_named_cluster_outlives_its_command() -> Result<()> {
    let tool = env!("CARGO_BIN_EXE_ckpt-cluster");
    let name = format!("test-{}", std::process::id());
    let run = |arguments: &[&str]| Command::new(tool).args(arguments).output();
    let up = run(&["up", &name, "--nodes", "1"])?;
    let text = String::from_utf8_lossy(&up.stdout).into_owned();
    let exec = run(&["exec", &name, "node1", "hostname"]);
    let again = run(&["up", &name, "--nodes", "1"]);
    let processes = Cluster::open(&name).and_then(|cluster| processes_of(cluster.dir()));
    let down = run(&["down", &name])?;
    assert!(text.starts_with("node1  10."), "{text}{}", String::from_utf8_lossy(&up.stderr));
    assert_eq!(exec?.stdout, b"node1\n");
    assert!(String::from_utf8_lossy(&again?.stderr).contains("is up already"));
    assert!(down.status.success());
    // The keeper is on its way out when `down` returns; what it kept is gone.
    let processes = processes?;
    wait_for("all processes end", || !processes.iter().any(|process| running(*process)))?;
    assert!(Cluster::open(&name).is_err());
    Ok(())
}
