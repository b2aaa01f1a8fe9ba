//! Faults on purpose: a testing aid.
//!
//! `CKPT_FAULT=WHO:POINT:ACTION` makes one side fail at one point. WHO is `coordinator` or the name
//! of a node; POINT is a phase (its beginning) or a phase with `-end`; ACTION is `kill` (as by
//! `kill -9`), `hang` (the working thread stands still) or `error`. The coordinator passes it on to
//! its agents. The tests kill every side at every point this way.

use anyhow::{Result, bail};
use ckpt_common::wire::Phase;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::str::FromStr;

/// Name of the environment variable.
pub const VARIABLE: &str = "CKPT_FAULT";
/// Name of the coordinator in it.
pub const COORDINATOR: &str = "coordinator";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Kill,
    Hang,
    Error,
}

/// A fault that waits for its point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    who: String,
    phase: Phase,
    end: bool,
    action: Action,
}

impl FromStr for Fault {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut fields = text.rsplitn(3, ':');
        let (Some(action), Some(point), Some(who)) = (fields.next(), fields.next(), fields.next()) else {
            return Err(format!("{VARIABLE}: `{text}` is not WHO:POINT:ACTION"));
        };
        let action = match action {
            "kill" => Action::Kill,
            "hang" => Action::Hang,
            "error" => Action::Error,
            _ => return Err(format!("{VARIABLE}: `{action}` is not kill, hang or error")),
        };
        let (phase, end) = match point.strip_suffix("-end") {
            Some(phase) => (phase, true),
            None => (point, false),
        };
        Ok(Self { who: who.to_owned(), phase: phase.parse()?, end, action })
    }
}

/// The fault in the environment, as text.
pub fn from_environment() -> Option<String> {
    std::env::var(VARIABLE).ok().filter(|text| !text.is_empty())
}

/// The faults of one side.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    fault: Option<Fault>,
}

impl Faults {
    /// Those of `who` in `text`.
    ///
    /// # Errors
    /// If the text is not a fault: a test that injects nothing would be worthless.
    pub fn of(who: &str, text: Option<&str>) -> Result<Self, String> {
        let fault = text.map(str::parse::<Fault>).transpose()?.filter(|fault| fault.who == who);
        Ok(Self { fault })
    }

    /// The beginning of a phase.
    pub fn begin(&self, phase: Phase) -> Result<()> {
        self.hit(phase, false)
    }

    /// The end of a phase.
    pub fn end(&self, phase: Phase) -> Result<()> {
        self.hit(phase, true)
    }

    fn hit(&self, phase: Phase, end: bool) -> Result<()> {
        let hit = |fault: &&Fault| fault.phase == phase && fault.end == end;
        match self.fault.as_ref().filter(hit).map(|fault| fault.action) {
            None => Ok(()),
            Some(Action::Error) => bail!("injected fault ({VARIABLE})"),
            Some(Action::Kill) => {
                kill(Pid::this(), Signal::SIGKILL)?;
                bail!("still alive after SIGKILL")
            }
            Some(Action::Hang) => loop {
                std::thread::sleep(std::time::Duration::from_secs(3600));
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_named_point_is_hit() {
        let faults = Faults::of("node1", Some("node1:cut-end:error")).unwrap();
        assert!(faults.begin(Phase::Cut).is_ok() && faults.end(Phase::Save).is_ok());
        assert!(faults.end(Phase::Cut).is_err());
        let other = Faults::of("node2", Some("node1:cut-end:error")).unwrap();
        assert!(other.end(Phase::Cut).is_ok());
    }

    #[test]
    fn mistakes_are_not_ignored() {
        for text in ["node1", "node1:lunch:kill", "node1:cut:explode", ""] {
            assert!(Faults::of("x", Some(text)).is_err(), "{text}");
        }
    }
}
