//! The protocol between coordinator and agents, with real processes and a fake engine: every side
//! fails at every point, and what must hold then is looked at from outside.
//!
//! The binary is the tests, the coordinator and the agent: each is started as `protocol ROLE ...`.

mod fake;
mod roles;
mod scene;

use ckpt_cli::store::StoreError;
use libtest_mimic::{Arguments, Trial};
use scene::Scene;

const DUMP_PHASES: [&str; 7] = ["plan", "arm", "cut", "settle", "run", "save", "commit"];
const RESTORE_PHASES: [&str; 4] = ["plan", "build", "connect", "release"];

fn main() {
    let words: Vec<String> = std::env::args().collect();
    match words.get(1).map(String::as_str) {
        Some("agent") => return roles::agent(&words[2]),
        Some("dump") => return roles::dump(&words[2..]),
        Some("restore") => return roles::restore(&words[2..]),
        _ => {}
    }
    let mut trials = vec![
        trial("dumps_count_up_and_leave_the_job_running", dumps_count_up_and_leave_the_job_running),
        trial("stop_ends_the_job_after_the_commit", stop_ends_the_job_after_the_commit),
        trial("blockers_of_all_nodes_come_at_once", blockers_of_all_nodes_come_at_once),
        trial("connections_are_sorted_into_channels", connections_are_sorted_into_channels),
        trial("connections_that_lead_out_block", connections_that_lead_out_block),
        trial("what_passes_by_itself_is_tried_again", what_passes_by_itself_is_tried_again),
        trial("what_was_lost_is_copied_in_the_freeze", what_was_lost_is_copied_in_the_freeze),
        trial("agents_that_are_none_are_told_apart", agents_that_are_none_are_told_apart),
        trial("a_hanging_agent_does_not_hang_the_job", a_hanging_agent_does_not_hang_the_job),
        trial("a_stopped_coordinator_is_given_up", a_stopped_coordinator_is_given_up),
        trial("nothing_is_pruned_while_a_dump_lives", nothing_is_pruned_while_a_dump_lives),
        trial("restore_moves_and_detaches", restore_moves_and_detaches),
    ];
    for who in ["coordinator", "n1"] {
        for action in ["kill", "error"] {
            for point in DUMP_PHASES.iter().flat_map(|phase| [phase.to_string(), format!("{phase}-end")]) {
                let fault = format!("{who}:{point}:{action}");
                trials.push(trial(&format!("dump_survives::{fault}"), move || dump_survives(&fault)));
            }
            for point in RESTORE_PHASES.iter().flat_map(|phase| [phase.to_string(), format!("{phase}-end")]) {
                let fault = format!("{who}:{point}:{action}");
                trials.push(trial(&format!("restore_survives::{fault}"), move || restore_survives(&fault)));
            }
        }
    }
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}

fn trial(name: &str, test: impl FnOnce() + Send + 'static) -> Trial {
    Trial::test(name, move || {
        test();
        Ok(())
    })
}

fn dumps_count_up_and_leave_the_job_running() {
    let scene = Scene::new();
    for number in 1..=2 {
        let output = scene.dump(&["n1", "n2"]).run();
        assert_eq!(output, (0, format!("job@{number}")));
    }
    scene.assert_unharmed();
    scene.assert_whole(2);
}

fn stop_ends_the_job_after_the_commit() {
    let scene = Scene::new();
    assert_eq!(scene.dump(&["n1", "n2"]).stop().run().0, 0);
    assert!(scene.has("n1.killed") && scene.has("n2.killed"));
    scene.assert_whole(1);
}

fn blockers_of_all_nodes_come_at_once() {
    let scene = Scene::new();
    scene.put("n1.blocked", "");
    scene.put("n2.blocked", "");
    let (code, text) = scene.dump(&["n1", "n2"]).run();
    assert_eq!(code, 4, "{text}");
    assert!(text.contains("n1 fd 7") && text.contains("n2 fd 7"), "{text}");
    assert!(!scene.has("n1.was-cut"));
    scene.assert_whole(0);
}

fn connections_are_sorted_into_channels() {
    let scene = Scene::new();
    scene.put("n1.connections", "10.0.0.1:1 10.0.0.2:2 5 30 7\n");
    scene.put("n2.connections", "10.0.0.2:2 10.0.0.1:1 7 7 10\n");
    assert_eq!(scene.dump(&["n1", "n2"]).run().0, 0);
    let checkpoint = scene.store().resolve("job").unwrap();
    let channels = &checkpoint.manifest.channels;
    assert_eq!((channels.len(), channels[0].in_flight(0), channels[0].in_flight(1)), (1, 20, 0));
    // What the restore tells each node of the other's positions.
    assert_eq!(scene.restore(&["n1", "n2"]).run().0, 0);
    assert_eq!(scene.get("n1.peers"), "10.0.0.2:2 10.0.0.1:1 10\n");
    assert_eq!(scene.get("n2.peers"), "10.0.0.1:1 10.0.0.2:2 7\n");
    // A receiver ahead of its sender is never committed.
    scene.put("n2.connections", "10.0.0.2:2 10.0.0.1:1 7 7 31\n");
    let (code, text) = scene.dump(&["n1", "n2"]).run();
    assert!(
        code == 4 && text.contains("1 bytes were received that the sender had not written"),
        "{code} {text}"
    );
    scene.assert_unharmed();
    scene.assert_whole(1);
}

fn connections_that_lead_out_block() {
    let scene = Scene::new();
    scene.put("n1.connections", "10.0.0.1:1 10.7.7.7:2 0 0 0\n127.0.0.1:5 127.0.0.1:6 0 0 0\n");
    let (code, text) = scene.dump(&["n1"]).run();
    assert_eq!(code, 4, "{text}");
    assert!(text.contains("10.0.0.1:1 to 10.7.7.7:2") && text.contains("127.0.0.1:5"), "{text}");
    assert!(!scene.has("n1.was-cut"));
    assert_eq!(scene.dump(&["n1"]).allow("outside-tcp").run().0, 0);
}

fn what_passes_by_itself_is_tried_again() {
    let scene = Scene::new();
    scene.put("n1.flaky", "2");
    assert_eq!(scene.dump(&["n1", "n2"]).run(), (0, "job@1".into()));
    scene.put("n1.flaky", "1000");
    let (code, text) = scene.dump(&["n1", "n2"]).run();
    assert!(code == 4 && text.contains("a moment"), "{code} {text}");
    scene.assert_unharmed();
    scene.assert_whole(1);
}

/// Memory that was overwritten while it was saved: the next attempt copies it while the job stands, on
/// all nodes. What passes by itself earlier changes nothing.
fn what_was_lost_is_copied_in_the_freeze() {
    let scene = Scene::new();
    scene.put("n1.flaky", "1");
    scene.put("n1.loses", "2");
    assert_eq!(scene.dump(&["n1", "n2"]).run(), (0, "job@1".into()));
    for node in ["n1", "n2"] {
        // What was lost first, then everything.
        assert_eq!(scene.get(&format!("{node}.cow")), "Auto Auto Auto Stop ");
    }
    scene.assert_unharmed();
    scene.assert_whole(1);
}

fn agents_that_are_none_are_told_apart() {
    let scene = Scene::new();
    for (node, words) in [
        ("dead", "No route to host"),
        ("chatty", "it sent \"Welcome to node"),
        ("old", "old has ckpt 0.0.1, this is"),
        ("silent", "silent for"),
        ("foreign", "protocol has version 77"),
    ] {
        let (code, text) = scene.dump(&["n1", node]).run();
        assert_eq!(code, 1, "{node}: {text}");
        assert!(text.contains(words), "{node}: {text}");
    }
    scene.assert_unharmed();
    scene.assert_whole(0);
}

fn a_hanging_agent_does_not_hang_the_job() {
    let scene = Scene::new();
    for point in ["cut-end", "save"] {
        let (code, text) = scene.dump(&["n1", "n2"]).fault(&format!("n2:{point}:hang")).run();
        assert!(code == 1 && text.contains("no progress"), "{point}: {code} {text}");
        scene.assert_unharmed();
    }
    assert_eq!(scene.dump(&["n1", "n2"]).run().0, 0);
    scene.assert_whole(1);
}

/// The coordinator does not run, but its end of the connection stays open: silence is all the
/// agents have to go by.
fn a_stopped_coordinator_is_given_up() {
    use nix::sys::signal::Signal;
    let scene = Scene::new();
    let mut dump = scene.dump(&["n1", "n2"]).fault("coordinator:cut-end:hang").spawn();
    scene.wait_for("both nodes are frozen", || scene.is_frozen("n1") && scene.is_frozen("n2"));
    dump.signal(Signal::SIGSTOP);
    scene.assert_unharmed();
    dump.signal(Signal::SIGKILL);
    dump.wait();
    assert_eq!(scene.dump(&["n1", "n2"]).run().0, 0);
    scene.assert_whole(1);
}

fn nothing_is_pruned_while_a_dump_lives() {
    use nix::sys::signal::Signal;
    let scene = Scene::new();
    for _ in 0..2 {
        assert_eq!(scene.dump(&["n1", "n2"]).run().0, 0);
    }
    // Its parts are in their place, its manifest is not.
    let mut dump = scene.dump(&["n1", "n2"]).fault("coordinator:commit:hang").spawn();
    let parts = || std::fs::read_dir(scene.store().root().join("parts")).unwrap().count();
    scene.wait_for("both parts are there", || parts() == 6);
    let prune = || scene.store().prune(None, std::num::NonZeroUsize::MIN, false);
    assert!(matches!(prune(), Err(StoreError::Locked { .. })));
    scene.assert_unharmed();
    dump.signal(Signal::SIGKILL);
    dump.wait();
    let report = prune().unwrap();
    assert_eq!((&report.removed[..], report.kept, report.parts), (&["job@1".to_owned()][..], 1, 4));
    scene.assert_whole(1);
    assert_eq!(scene.dump(&["n1", "n2"]).run(), (0, "job@3".into()));
    let mut restore = scene.restore(&["n1", "n2"]).fault("coordinator:connect:hang").spawn();
    scene.wait_for("the job is built", || scene.is_built("n1") && scene.is_built("n2"));
    assert!(matches!(prune(), Err(StoreError::Locked { .. })));
    restore.signal(Signal::SIGKILL);
    restore.wait();
    assert_eq!(prune().unwrap().removed, ["job@2"]);
}

fn restore_moves_and_detaches() {
    let scene = Scene::new();
    assert_eq!(scene.dump(&["n1", "n2"]).run().0, 0);
    assert_eq!(scene.restore(&["n1", "n3"]).run(), (0, "n1 n3".into()));
    assert_eq!(scene.running(), ["n1", "n3"]);
}

/// A dump in which one side fails at one point: afterwards the job runs, the store shows only what
/// was committed, and the next dump works and clears up.
fn dump_survives(fault: &str) {
    let scene = Scene::new();
    assert_eq!(scene.dump(&["n1", "n2"]).run().0, 0);
    let (code, text) = scene.dump(&["n1", "n2"]).fault(fault).run();
    scene.assert_unharmed();
    let (who, point) = fault.split_once(':').unwrap();
    let committed = match who {
        "coordinator" => point.starts_with("commit-end"),
        _ => point.starts_with("commit"),
    };
    let expected = if committed && who != "coordinator" {
        0
    } else if point.ends_with("kill") && who == "coordinator" {
        137
    } else {
        1
    };
    assert_eq!(code, expected, "{text}");
    let before = if committed { 2 } else { 1 };
    assert_eq!(scene.checkpoints(), before, "{text}");
    assert_eq!(scene.dump(&["n1", "n2"]).run().0, 0);
    scene.assert_unharmed();
    scene.assert_whole(before + 1);
}

/// A restore in which one side fails at one point: afterwards either everything runs or nothing.
fn restore_survives(fault: &str) {
    let scene = Scene::new();
    assert_eq!(scene.dump(&["n1", "n2"]).run().0, 0);
    let (code, text) = scene.restore(&["n1", "n2"]).fault(fault).run();
    assert_ne!(code, 0, "{text}");
    scene.wait_for("nothing half built", || !scene.is_built("n1") && !scene.is_built("n2"));
    let expected: &[&str] = match fault {
        // Everything was released when the coordinator died.
        "coordinator:release-end:kill" => &["n1", "n2"],
        // Nobody is left on n1 who knows what was released; the message says where it stands.
        "n1:release-end:kill" => &["n1"],
        _ => &[],
    };
    scene.wait_for("the expected processes", || scene.running() == expected);
    scene.stop_running();
    assert_eq!(scene.restore(&["n1", "n2"]).run().0, 0);
    assert_eq!(scene.running(), ["n1", "n2"]);
}
