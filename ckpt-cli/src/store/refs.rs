//! Names: jobs, their checkpoints, and what a person calls them.

use super::{Result, Store, StoreError, files};
use ckpt_common::image::manifest::{self, Checkpoint};
use std::{fmt, path::PathBuf, str::FromStr};

/// Fewest digits of an id that name a checkpoint.
const SHORTEST_PREFIX: usize = 4;

/// Name of a job in the store; also a directory name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct JobName(String);

impl FromStr for JobName {
    type Err = StoreError;

    fn from_str(name: &str) -> Result<Self> {
        let fine = |c: char| c.is_ascii_alphanumeric() || "._-+:,=[]".contains(c);
        let why = if name.is_empty() || name.len() > 128 {
            "it needs 1 to 128 characters"
        } else if name.starts_with(['.', '-']) {
            "it begins with a dot or a dash"
        } else if !name.chars().all(fine) {
            "only letters, digits and ._-+:,=[] are possible"
        } else {
            return Ok(Self(name.to_owned()));
        };
        Err(StoreError::BadName { name: name.to_owned(), why })
    }
}

impl fmt::Display for JobName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Store {
    pub(super) fn job_path(&self, job: &JobName) -> PathBuf {
        self.root().join("jobs").join(&job.0)
    }

    /// Jobs that have at least one checkpoint, by name.
    pub fn jobs(&self) -> Result<Vec<JobName>> {
        let path = self.root().join("jobs");
        let mut jobs = Vec::new();
        for entry in std::fs::read_dir(&path).map_err(StoreError::io("read directory", &path))? {
            let name = entry.map_err(StoreError::io("read directory", &path))?.file_name();
            let Some(job) = name.to_str().and_then(|name| name.parse().ok()) else { continue };
            if !self.numbers(&job)?.is_empty() {
                jobs.push(job);
            }
        }
        jobs.sort();
        Ok(jobs)
    }

    /// Numbers of a job's checkpoints, in ascending order.
    pub(super) fn numbers(&self, job: &JobName) -> Result<Vec<u64>> {
        let path = self.job_path(job);
        let entries = match std::fs::read_dir(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(StoreError::io("read directory", &path))?,
        };
        let mut numbers = Vec::new();
        for entry in entries {
            let name = entry.map_err(StoreError::io("read directory", &path))?.file_name();
            numbers.extend(name.to_str().and_then(|name| name.strip_suffix(".json")?.parse::<u64>().ok()));
        }
        numbers.sort_unstable();
        Ok(numbers)
    }

    /// The job's checkpoints, the oldest first.
    pub fn checkpoints(&self, job: &JobName) -> Result<Vec<Checkpoint>> {
        self.numbers(job)?.into_iter().map(|number| self.checkpoint(job, number)).collect()
    }

    /// As [`Self::checkpoints`], but a damaged one does not hide the others.
    pub fn entries(&self, job: &JobName) -> Result<Vec<Result<Checkpoint>>> {
        Ok(self.numbers(job)?.into_iter().map(|number| self.checkpoint(job, number)).collect())
    }

    pub(super) fn checkpoint(&self, job: &JobName, number: u64) -> Result<Checkpoint> {
        let path = self.job_path(job).join(format!("{number}.json"));
        let text = files::read_capped(&path, manifest::MAX_SIZE)?;
        let checkpoint = Checkpoint::decode(&text).map_err(StoreError::damaged(&path))?;
        let manifest = &checkpoint.manifest;
        if manifest.job != job.0 || manifest.number != number {
            let why = format!("it says {}: it was moved or renamed", checkpoint.name());
            let source = ckpt_common::image::FormatError::damaged("manifest", why);
            return Err(StoreError::damaged(path)(source));
        }
        Ok(checkpoint)
    }

    /// Finds a checkpoint by `job`, `job@N`, `job@latest`, or the first digits of its id.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] if nothing, or more than one checkpoint, is called so.
    pub fn resolve(&self, name: &str) -> Result<Checkpoint> {
        let not_found = |what: String| StoreError::NotFound { what, path: self.root().to_owned() };
        let (job, number) = match name.split_once('@') {
            None | Some((_, "latest")) => (name.split('@').next().unwrap_or(name), None),
            Some((job, number)) => {
                let wrong =
                    || not_found(format!("`{name}` is neither JOB@NUMBER nor JOB@latest: nothing so"));
                (job, Some(number.parse::<u64>().map_err(|_| wrong())?))
            }
        };
        let numbers = match job.parse() {
            Ok(job) => self.numbers(&job)?,
            Err(_) => Vec::new(),
        };
        let found = match number {
            None => numbers.last().copied(),
            Some(number) => numbers.contains(&number).then_some(number),
        };
        if let Some(number) = found {
            return self.checkpoint(&job.parse()?, number);
        }
        if let (Some(number), Some(last)) = (number, numbers.last()) {
            return Err(not_found(format!("job {job} has no checkpoint {number}, the latest is {last},")));
        }
        let is_prefix = (SHORTEST_PREFIX..=64).contains(&name.len())
            && name.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte));
        if !is_prefix {
            return Err(not_found(format!("there is no job `{job}`")));
        }
        let mut found = Vec::new();
        for job in self.jobs()? {
            for number in self.numbers(&job)? {
                // One damaged manifest must not hide the others.
                found.extend(self.checkpoint(&job, number).ok());
            }
        }
        found.retain(|checkpoint| checkpoint.id.to_string().starts_with(name));
        match found.len() {
            0 => Err(not_found(format!("there is no job `{name}`, and no checkpoint with that id,"))),
            1 => Ok(found.remove(0)),
            _ => {
                let names: Vec<_> = found.iter().map(Checkpoint::name).collect();
                Err(not_found(format!("id {name} is not unique ({})", names.join(", "))))
            }
        }
    }
}
