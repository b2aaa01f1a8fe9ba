//! Fifty busy connections between two nodes, through the whole product: dumped and left running, then dumped,
//! ended and restored with the nodes swapped. Every byte arrives once and in order.
#![expect(clippy::print_stdout, reason = "times are for people to look at, not to assert on")]

use anyhow::{Context, Result, ensure};
use ckpt_tests::cluster::Cluster;
use ckpt_tests::stream::{Freeze, Report};
use std::path::PathBuf;
use std::time::{Duration, Instant};

const CONNECTIONS: usize = 50;
const PATIENCE: Duration = Duration::from_secs(60);

struct Streams {
    cluster: Cluster,
    /// How many of each side's freezes have been printed.
    seen: [usize; 2],
}

impl Streams {
    fn start() -> Result<Self> {
        let streams = Self { cluster: Cluster::start(2)?, seen: [0; 2] };
        let address = format!("{}:7000", streams.cluster.node(1).ip4);
        for (node, role) in [(1, "listen"), (2, "connect")] {
            let program = "/run/node/target/ckpt-stream";
            let count = CONNECTIONS.to_string();
            let report = format!("/shared/{role}.json");
            // In a session of its own, a child of the node's init, with no stream that leads out.
            let script = format!(
                "cd /; exec 0</dev/null 1>/dev/null 2>/shared/{role}.err; \
                 CKPT_JOB=streams exec setsid -f {program} {role} {address} {count} {report} /shared/stop"
            );
            streams.cluster.node(node).run(&["sh", "-c", &script])?;
            if node == 1 {
                let listening = |node: &str| node.contains(":7000");
                streams
                    .wait("listening", || Ok(listening(&streams.cluster.node(1).run(&["ss", "-tlnH"])?)))?;
            }
        }
        streams.progress(20 << 20)?;
        Ok(streams)
    }

    fn report(&self, role: &str) -> Result<Report> {
        let report = Report::read(&self.cluster.shared().join(format!("{role}.json")))?;
        ensure!(report.error.is_none(), "{role}: {}", report.error.unwrap_or_default());
        Ok(report)
    }

    fn wait(&self, what: &str, mut condition: impl FnMut() -> Result<bool>) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let last = condition();
            if matches!(last, Ok(true)) {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "{what}: not within {PATIENCE:?} ({last:?})");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until both sides have received so many more bytes.
    fn progress(&self, bytes: u64) -> Result<()> {
        for role in ["listen", "connect"] {
            let start = self.report(role).map_or(0, |report| report.received());
            self.wait(role, || Ok(self.report(role)?.received() >= start + bytes))?;
        }
        Ok(())
    }

    fn ckpt(&self, arguments: &[&str]) -> Result<()> {
        let words = [&["ckpt", "--store", "/shared/store"], arguments].concat();
        let start = Instant::now();
        let text = self.cluster.node(1).run(&words)?;
        println!("{}: {:?}\n{text}", arguments.join(" "), start.elapsed());
        Ok(())
    }

    /// Prints the longest freeze that each side has noticed since the last time.
    fn freezes(&mut self, when: &str) -> Result<()> {
        for (role, seen) in [("listen", 0), ("connect", 1)] {
            let freezes = self.report(role)?.freezes;
            let new = freezes.get(self.seen[seen]..).unwrap_or_default();
            self.seen[seen] = freezes.len();
            if let Some(Freeze { gap_ms, stall_ms }) = new.iter().max_by(|a, b| a.gap_ms.total_cmp(&b.gap_ms))
            {
                println!("{when}, {role}: stood still for {gap_ms:.0} ms, all moving {stall_ms:.1} ms later");
            }
        }
        Ok(())
    }

    /// No process of the job is left on any node.
    fn gone(&self) -> Result<bool> {
        let alive = |node: usize| self.cluster.node(node).exec(&["pgrep", "-f", "/ckpt-stream "]);
        Ok(!alive(1)?.status.success() && !alive(2)?.status.success())
    }

    /// Both sides end, and what one has sent the other has received.
    fn end(&self) -> Result<()> {
        std::fs::write(self.cluster.shared().join("stop"), "")?;
        self.wait("the end", || Ok(self.report("listen")?.done && self.report("connect")?.done))?;
        let reports = [self.report("listen")?, self.report("connect")?];
        let mut sent: Vec<_> = reports.iter().flat_map(|report| report.streams.iter().map(|s| s.0)).collect();
        let mut received: Vec<_> =
            reports.iter().flat_map(|report| report.streams.iter().map(|s| s.1)).collect();
        sent.sort_unstable();
        received.sort_unstable();
        ensure!(sent.len() == 2 * CONNECTIONS && sent == received, "other bytes were sent than received");
        println!("{} bytes in all, each of them once", sent.iter().map(|(_, bytes)| bytes).sum::<u64>());
        Ok(())
    }
}

#[test]
fn fifty_streams_live_through_dumps_and_a_restore_on_swapped_nodes() -> Result<()> {
    let mut streams = Streams::start()?;
    for _ in 0..2 {
        streams.ckpt(&["dump", "--job", "streams", "--nodes", "node[1-2]"])?;
        streams.progress(20 << 20)?;
        streams.freezes("left running")?;
    }
    for round in 0..2 {
        let (one, two) =
            if round == 0 { ("node1=node2", "node2=node1") } else { ("node1=node1", "node2=node2") };
        streams.ckpt(&["dump", "--job", "streams", "--nodes", "node[1-2]", "--stop"])?;
        streams.wait("the job's end", || streams.gone())?;
        streams.ckpt(&["restore", "streams", "--place", one, "--place", two])?;
        streams.progress(20 << 20)?;
        streams.freezes("restored")?;
    }
    streams.end()?;
    let errors: Vec<PathBuf> =
        ["listen.err", "connect.err"].map(|name| streams.cluster.shared().join(name)).into();
    for path in errors {
        let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        ensure!(text.is_empty(), "{text}");
    }
    Ok(())
}
