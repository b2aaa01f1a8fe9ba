//! `ckpt doctor`: what the kernel and the nodes offer.

use super::{Global, interrupt, nodes_of};
use crate::{
    cluster::coordinator,
    doctor,
    ui::{ExitCode, Failed, Table, Ui},
};
use ckpt_common::wire::{Probe, ProbeState};
use serde_json::json;

/// Check what the kernel, the privileges and the nodes offer
///
/// Every feature is tried, not looked up. Exit code 5 if something is missing that ckpt cannot work
/// without.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Look at these nodes, too, by ssh
    #[arg(long, value_name = "LIST")]
    nodes: Option<String>,
}

pub(super) fn run(arguments: &Arguments, global: &Global, ui: &Ui) -> Result<(), Failed> {
    let launcher = global.launcher()?;
    let store = global.absolute_store()?;
    let nodes = arguments.nodes.as_deref().map(|list| nodes_of(Some(list))).transpose()?.flatten();
    let mut results = Vec::new();
    match nodes {
        // This machine is looked at directly: it works where starting an agent does not.
        None => results.push((launcher.this_node(), doctor::probe(&store))),
        Some(nodes) => {
            let interrupted = interrupt::flag()?;
            let context = global.context(&launcher, &interrupted, &());
            for (node, result) in coordinator::doctor(&nodes, &store.to_string_lossy(), &context) {
                let unreachable = |error: crate::cluster::ClusterError| Probe {
                    name: "agent".into(),
                    state: ProbeState::Missing,
                    detail: error.to_string(),
                    needed_for: "anything on this node".into(),
                };
                results.push((node, result.unwrap_or_else(|error| vec![unreachable(error)])));
            }
        }
    }
    ui.result(&text(&results), &document(&results))?;
    let missing = |(_, probes): &(_, Vec<Probe>)| probes.iter().any(|p| p.state == ProbeState::Missing);
    match results.iter().any(missing) {
        true => Err(Failed::silent(ExitCode::System)),
        false => Ok(()),
    }
}

fn word(state: ProbeState) -> &'static str {
    match state {
        ProbeState::Works => "ok",
        ProbeState::Degraded => "limited",
        ProbeState::Missing => "MISSING",
    }
}

fn text(results: &[(String, Vec<Probe>)]) -> String {
    let mut table = Table::new(&["NODE", "FEATURE", "STATE", "FOUND"]);
    for (node, probes) in results {
        for probe in probes {
            let found = match probe.state {
                ProbeState::Works => probe.detail.clone(),
                _ => format!("{}; needed for {}", probe.detail, probe.needed_for),
            };
            table.row([node.clone(), probe.name.clone(), word(probe.state).to_owned(), found]);
        }
    }
    table.text()
}

fn document(results: &[(String, Vec<Probe>)]) -> serde_json::Value {
    let probe = |probe: &Probe| {
        json!({
            "feature": probe.name,
            "state": word(probe.state).to_lowercase(),
            "found": probe.detail,
            "needed_for": probe.needed_for,
        })
    };
    let nodes = results
        .iter()
        .map(|(node, probes)| json!({"node": node, "probes": probes.iter().map(probe).collect::<Vec<_>>()}));
    json!({"type": "doctor", "nodes": nodes.collect::<Vec<_>>()})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_person_reads() {
        let probe = |name: &str, state, detail: &str| Probe {
            name: name.into(),
            state,
            detail: detail.into(),
            needed_for: "connections".into(),
        };
        let results = [
            ("n1".to_owned(), vec![probe("ptrace", ProbeState::Works, "a child was stopped and let go")]),
            (
                "n2".to_owned(),
                vec![
                    probe("TCP_REPAIR", ProbeState::Missing, "Operation not permitted"),
                    probe("userfaultfd", ProbeState::Degraded, "No such file or directory"),
                ],
            ),
        ];
        insta::assert_snapshot!(text(&results));
    }
}
