//! What the binary is when it is started as an agent or a coordinator.

use crate::fake::FakeEngine;
use ckpt_cli::cluster::{
    ClusterError, agent,
    coordinator::{self, Context, DumpRequest, RestoreRequest, StdioChoice},
    fault,
    frames::FrameWriter,
    link::Timing,
    transport::Launcher,
};
use ckpt_common::wire::{DumpOptions, FailureClass, PidPolicy, Response, Selector};
use std::{io::Write, path::PathBuf, process::exit, sync::atomic::AtomicBool, time::Duration};

fn directory() -> PathBuf {
    std::env::var_os("FAKE_DIRECTORY").expect("FAKE_DIRECTORY is set").into()
}

/// Started in place of ssh: `protocol agent NODE ckpt serve`.
pub(crate) fn agent(node: &str) {
    let mut stdout = std::io::stdout();
    match node {
        "dead" => {
            let _ = writeln!(std::io::stderr(), "ssh: connect to host dead port 22: No route to host");
            exit(255);
        }
        "chatty" => drop(writeln!(stdout, "Welcome to node 7, and mind the step!")),
        "silent" => std::thread::sleep(Duration::from_secs(3600)),
        "old" => {
            let hello = Response::Hello { ckpt: "0.0.1".into(), kernel: "6.1".into() };
            FrameWriter::new(stdout).write(&hello).expect("the coordinator reads");
            std::thread::sleep(Duration::from_secs(1));
        }
        "foreign" => {
            let mut preamble = ckpt_common::wire::preamble();
            preamble[8] = 77;
            stdout.write_all(&preamble).and_then(|()| stdout.flush()).expect("the coordinator reads");
            std::thread::sleep(Duration::from_secs(1));
        }
        _ => {
            let engine = FakeEngine { directory: directory(), node: node.to_owned() };
            if agent::serve(&engine, std::io::stdin(), stdout, &|_| {}).is_err() {
                exit(1);
            }
        }
    }
}

fn launcher() -> Launcher {
    let own = std::env::current_exe().expect("our own path");
    Launcher {
        ssh: vec![own.into(), "agent".into()],
        remote: "ckpt".into(),
        local: Vec::new(),
        local_names: Vec::new(),
    }
}

fn with_context<T>(act: impl FnOnce(&Context<'_>) -> Result<T, ClusterError>) -> T {
    let hang = fault::from_environment().is_some_and(|fault| fault.ends_with("hang"));
    let answer = Duration::from_millis(if hang { 500 } else { 60_000 });
    let second = Duration::from_secs(1);
    // Short, where that is what is tested; else long enough for a busy machine.
    let patience = if hang { 2 * second } else { 30 * second };
    let start = if std::env::args().any(|word| word.contains("silent")) { second } else { 60 * second };
    let context = Context {
        launcher: &launcher(),
        timing: Timing { start, patience: patience.min(start), answer, end: second },
        log: String::new(),
        interrupted: &AtomicBool::new(false),
        observer: &(),
    };
    match act(&context) {
        Ok(result) => result,
        Err(error) => {
            let mut stdout = std::io::stdout();
            let _ = writeln!(stdout, "{error}");
            if let ClusterError::Blocked { blockers } = &error {
                for (node, blocker) in blockers {
                    let _ = writeln!(stdout, "{node} {} {}", blocker.item, blocker.reason);
                }
            }
            exit(if error.class() == FailureClass::Blocked || error.is_transient() { 4 } else { 1 })
        }
    }
}

fn nodes(list: &str) -> Vec<String> {
    list.split(',').map(str::to_owned).collect()
}

/// `protocol dump NODES STOP ALLOW`
pub(crate) fn dump(words: &[String]) {
    let allow = words[2].split(',').filter(|word| !word.is_empty()).map(str::to_owned).collect();
    let request = DumpRequest {
        store: directory().join("store"),
        job: "job".parse().expect("a name"),
        selector: Selector::Pids(vec![std::process::id() as i32]),
        nodes: nodes(&words[0]),
        options: DumpOptions { stop: words[1] == "stop", compress: Some(1), allow, ..Default::default() },
        record: Default::default(),
        when_below: None,
    };
    let outcome = with_context(|context| coordinator::dump(&request, context));
    let _ = write!(std::io::stdout(), "{}", outcome.checkpoint.name());
}

/// `protocol restore NODES`
pub(crate) fn restore(words: &[String]) {
    let nodes = nodes(&words[0]);
    let places = ["n1", "n2"].into_iter().map(str::to_owned).zip(nodes).collect();
    let request = RestoreRequest {
        store: directory().join("store"),
        name: "job".into(),
        places,
        nodes: None,
        pids: PidPolicy::Auto,
        lazy: false,
        stdio: StdioChoice::Null,
    };
    let outcome = with_context(|context| coordinator::restore(&request, context));
    let names: Vec<_> = outcome.nodes.iter().map(|(node, _)| node.as_str()).collect();
    let _ = write!(std::io::stdout(), "{}", names.join(" "));
}
