//! What batch schedulers say in the environment about a job's nodes.

use super::{JobError, nodes};
use std::path::Path;

/// Variables by which schedulers mark the processes of job ID. `ckpt dump --job ID` looks for these
/// besides `CKPT_JOB`.
pub const MARKS: [&str; 4] = ["SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID"];

/// The nodes of the job that ckpt was started in, if a scheduler started it: Slurm's
/// `SLURM_JOB_NODELIST`, LSF's `LSB_HOSTS`, or PBS's file of nodes.
pub fn nodes_from(environment: impl Fn(&str) -> Option<String>) -> Result<Option<Vec<String>>, JobError> {
    if let Some(list) = environment("SLURM_JOB_NODELIST").filter(|list| !list.is_empty()) {
        return nodes::parse(&list).map(Some);
    }
    if let Some(hosts) = environment("LSB_HOSTS").filter(|hosts| !hosts.is_empty()) {
        return Ok(Some(once_each(hosts.split_whitespace())));
    }
    if let Some(path) = environment("PBS_NODEFILE").filter(|path| !path.is_empty()) {
        let text = std::fs::read_to_string(Path::new(&path)).map_err(|error| JobError::BadList {
            list: path,
            why: format!("the file that PBS_NODEFILE names cannot be read: {error}"),
        })?;
        return Ok(Some(once_each(text.split_whitespace())));
    }
    Ok(None)
}

/// These name a node once per task.
fn once_each<'a>(names: impl Iterator<Item = &'a str>) -> Vec<String> {
    let mut nodes: Vec<String> = Vec::new();
    for name in names {
        if !nodes.iter().any(|node| node == name) {
            nodes.push(name.to_owned());
        }
    }
    nodes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schedulers_are_recognised() {
        let from = |name: &'static str, value: &'static str| {
            nodes_from(move |asked| (asked == name).then(|| value.to_owned())).unwrap()
        };
        let names = |text: &str| Some(text.split(' ').map(str::to_owned).collect::<Vec<_>>());
        assert_eq!(from("SLURM_JOB_NODELIST", "n[1-2]"), names("n1 n2"));
        assert_eq!(from("LSB_HOSTS", "a a b"), names("a b"));
        assert_eq!(from("OTHER", "a"), None);
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "x\nx\ny\n").unwrap();
        let path = file.path().to_str().unwrap().to_owned();
        let found = nodes_from(|name| (name == "PBS_NODEFILE").then(|| path.clone())).unwrap();
        assert_eq!(found, names("x y"));
    }
}
