//! `ckpt request`: ask for a checkpoint.

use crate::{
    cluster::requests,
    job::{MARK, scheduler},
    store::JobName,
    ui::{Failed, Ui},
};
use serde_json::json;
use std::{
    io::{BufRead, BufReader, ErrorKind, Write},
    os::unix::net::UnixStream,
    path::Path,
};

/// Ask for a checkpoint now, and wait for it
///
/// `ckpt watch` has to watch the job. May be used by root, and by the job itself; a job that is restored from the
/// checkpoint that it has asked for here learns that.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Name of the job in the store [default: what CKPT_JOB or the batch scheduler calls the job that this is part of]
    #[arg(long, value_name = "ID")]
    job: Option<String>,
}

pub(super) fn run(arguments: &Arguments, ui: &Ui) -> Result<(), Failed> {
    let marks = std::iter::once(MARK).chain(scheduler::MARKS);
    let own = || marks.into_iter().find_map(|name| std::env::var(name).ok());
    let Some(job) = arguments.job.clone().or_else(own) else {
        return Err(Failed::usage("which job?").hint("give --job ID; inside a job, CKPT_JOB says it"));
    };
    let job: JobName = job.parse()?;
    match ask(&requests::path(&job.to_string()))? {
        Reply::Saved { checkpoint, id } => ui.summary(
            &format!("Saved {checkpoint} ({})\n", id.get(..8).unwrap_or(&id)),
            &json!({"type": "request", "restored": false, "checkpoint": checkpoint, "id": id}),
        ),
        Reply::Restored => ui.summary(
            "Restored from the checkpoint that was asked for\n",
            &json!({"type": "request", "restored": true}),
        ),
        Reply::Failed(why) => Err(Failed::other(format!("no checkpoint of job {job}: {why}"))),
    }
}

/// What became of a request.
#[derive(Debug, PartialEq, Eq)]
enum Reply {
    Saved { checkpoint: String, id: String },
    Failed(String),
    Restored,
}

fn ask(path: &Path) -> Result<Reply, Failed> {
    let mut stream = UnixStream::connect(path).map_err(|error| {
        let failed = Failed::other(format!("nobody listens at {}: {error}", path.display()));
        failed.hint("`ckpt watch` watches a job and takes requests")
    })?;
    let mut line = String::new();
    let sent = stream.write_all(format!("{}\n", requests::WORD).as_bytes());
    match sent.and_then(|()| BufReader::new(stream).read_line(&mut line)) {
        Ok(_) => reply(&line),
        // A copy of us that was restored before it had sent anything, or read its answer.
        Err(error) if matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe) => reply(""),
        Err(error) => Err(Failed::other(format!("waiting for the checkpoint: {error}"))),
    }
}

fn reply(line: &str) -> Result<Reply, Failed> {
    let words: Vec<&str> = line.trim_end().splitn(3, ' ').collect();
    match words[..] {
        [""] => Ok(Reply::Restored),
        ["saved", checkpoint, id] => Ok(Reply::Saved { checkpoint: checkpoint.into(), id: id.into() }),
        ["failed", ..] => Ok(Reply::Failed(line.trim_end().trim_start_matches("failed ").to_owned())),
        _ => Err(Failed::other(format!("an answer that makes no sense: {line:?}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers() {
        assert_eq!(reply("").unwrap(), Reply::Restored);
        let saved = Reply::Saved { checkpoint: "a@3".into(), id: "9f".into() };
        assert_eq!(reply("saved a@3 9f\n").unwrap(), saved);
        assert_eq!(reply("failed the disk is full\n").unwrap(), Reply::Failed("the disk is full".into()));
        assert!(reply("well\n").is_err());
    }
}
