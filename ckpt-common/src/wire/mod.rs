//! Between nodes: what coordinator and agents say to each other.
//!
//! Each side begins with a preamble and then sends frames:
//! ```text
//! preamble = "CKPTWIRE" | protocol version u16 | 6 zero bytes
//! frame    = payload length u32 | crc32c of the payload u32 | payload
//! payload  = one message, MessagePack with named fields
//! ```
//! Integers are little-endian. The coordinator sends [`Request`]s, one at a time, and
//! [`Request::Ping`] every second; the agent answers each request but a ping with one [`Response`],
//! and sends [`Response::Alive`] every second.
//!
//! ```text
//! dump      coordinator                        agent                          job
//!              | Hello                           |                              |
//!              |-------------------------------->| same version?                |
//!              | Plan (store, dump, selector)    |                              |
//!              |-------------------------------->| processes, blockers          | runs
//!              |    all blockers, of all nodes, at once; nothing frozen yet     |
//!              | Sample: as long as too much memory is modified, if asked for    |
//!              | Arm                             |                              |
//!              |-------------------------------->| trackers, traffic hold       | runs
//!              | Cut                             |                              |
//!              |-------------------------------->| freeze, take state           | FROZEN
//!              | Settle: every sender is cut     |                              |
//!              |-------------------------------->| what sockets have received   | FROZEN
//!              |    connections matched, positions compared                     |
//!              | Run            (not with stop)  |                              |
//!              |-------------------------------->| thaw                         | runs
//!              | Save                            |                              |
//!              |-------------------------------->| pages, records -> part       | runs
//!              |    all parts durable: the manifest is renamed into place       |
//!              | Commit                          |                              |
//!              |-------------------------------->| end of session               | runs, or is ended
//!              | Abort: instead of any of these; whatever was done is undone    | runs
//!
//! watch     Hello, Watch, then Await again and again: requests for a checkpoint, and their answers.
//!
//! restore   Hello, Plan, Build, Connect, Release: nothing of the job runs before every node has
//!           connected; Abort before that removes what was built.
//! ```

mod dump;
mod restore;
mod watch;

pub use dump::*;
pub use restore::*;
pub use watch::*;

use crate::image::FormatError;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::{fmt, str::FromStr};

/// Version of the protocol; both sides must have the same.
pub const VERSION: u16 = 3;
/// Size of the preamble in bytes.
pub const PREAMBLE_SIZE: usize = 16;
/// Size of a frame's header in bytes.
pub const HEADER_SIZE: usize = 8;
/// Largest payload in bytes.
pub const MAX_PAYLOAD: usize = 64 << 20;

const MAGIC: [u8; 8] = *b"CKPTWIRE";
const WHAT: &str = "message";

/// The bytes each side sends first.
pub fn preamble() -> [u8; PREAMBLE_SIZE] {
    let mut bytes = [0; PREAMBLE_SIZE];
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..10].copy_from_slice(&VERSION.to_le_bytes());
    bytes
}

/// Checks the other side's first bytes.
///
/// # Errors
/// [`FormatError::Damaged`] if the other side is not ckpt, [`FormatError::Newer`] if it speaks
/// another version (also an older one) of the protocol.
pub fn check_preamble(bytes: &[u8; PREAMBLE_SIZE]) -> Result<(), FormatError> {
    if bytes[..8] != MAGIC {
        return Err(FormatError::damaged("preamble", "the other side does not answer as ckpt"));
    }
    let version = u16::from_le_bytes([bytes[8], bytes[9]]);
    if version != VERSION {
        let (found, supported) = (version.into(), VERSION.into());
        return Err(FormatError::Newer { what: "protocol".into(), found, supported });
    }
    if bytes[10..] != [0; 6] {
        return Err(FormatError::damaged("preamble", "reserved bytes are set"));
    }
    Ok(())
}

/// A message as a frame.
///
/// # Errors
/// [`FormatError::TooLarge`] above [`MAX_PAYLOAD`].
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, FormatError> {
    let too_large = |why| FormatError::TooLarge { what: WHAT, why };
    let mut frame = vec![0; HEADER_SIZE];
    rmp_serde::encode::write_named(&mut frame, message).map_err(|error| too_large(error.to_string()))?;
    let payload = &frame[HEADER_SIZE..];
    if payload.len() > MAX_PAYLOAD {
        return Err(too_large(format!("{} bytes, the limit is {MAX_PAYLOAD}", payload.len())));
    }
    let (length, crc) = (payload.len() as u32, crc32c::crc32c(payload));
    frame[..4].copy_from_slice(&length.to_le_bytes());
    frame[4..8].copy_from_slice(&crc.to_le_bytes());
    Ok(frame)
}

/// Length of the payload behind a frame's header, capped.
pub fn payload_length(header: &[u8; HEADER_SIZE]) -> Result<usize, FormatError> {
    let length = u32::from_le_bytes([header[0], header[1], header[2], header[3]]) as usize;
    if length > MAX_PAYLOAD {
        return Err(FormatError::damaged(WHAT, format!("{length} bytes, the limit is {MAX_PAYLOAD}")));
    }
    Ok(length)
}

/// The message in a frame.
pub fn decode<T: DeserializeOwned>(header: &[u8; HEADER_SIZE], payload: &[u8]) -> Result<T, FormatError> {
    let crc = u32::from_le_bytes([header[4], header[5], header[6], header[7]]);
    if payload_length(header)? != payload.len() || crc32c::crc32c(payload) != crc {
        return Err(FormatError::damaged(WHAT, "its checksum is wrong"));
    }
    rmp_serde::from_slice(payload).map_err(|error| FormatError::damaged(WHAT, error.to_string()))
}

/// The steps of a dump and of a restore, on both sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Phase {
    /// Dump and restore: find out everything that stands in the way. Nothing is touched.
    Plan,
    /// Dump: make ready what the freeze must not wait for.
    Arm,
    /// Dump: freeze and take the state.
    Cut,
    /// Dump: take what connections have received, now that every sender is cut.
    Settle,
    /// Dump: let the job run on.
    Run,
    /// Dump: write the part.
    Save,
    /// Dump: the checkpoint exists.
    Commit,
    /// Restore: processes, objects, memory.
    Build,
    /// Restore: connections between nodes.
    Connect,
    /// Restore: everything exists; the job runs.
    Release,
    /// Undo everything.
    Abort,
}

impl Phase {
    /// All of them.
    pub const ALL: [Self; 11] = [
        Self::Plan,
        Self::Arm,
        Self::Cut,
        Self::Settle,
        Self::Run,
        Self::Save,
        Self::Commit,
        Self::Build,
        Self::Connect,
        Self::Release,
        Self::Abort,
    ];
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Plan => "plan",
            Self::Arm => "arm",
            Self::Cut => "cut",
            Self::Settle => "settle",
            Self::Run => "run",
            Self::Save => "save",
            Self::Commit => "commit",
            Self::Build => "build",
            Self::Connect => "connect",
            Self::Release => "release",
            Self::Abort => "abort",
        })
    }
}

impl FromStr for Phase {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let all = Self::ALL.into_iter();
        all.into_iter().find(|phase| phase.to_string() == text).ok_or(format!("`{text}` is not a phase"))
    }
}

/// First request on a connection.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Hello {
    /// Version of ckpt; both must have the same.
    pub ckpt: String,
    /// Name by which the coordinator knows the node.
    pub node: String,
    /// Silence in seconds after which either side gives the other up.
    pub patience: u64,
    /// Log filter, as `-v` gives it.
    pub log: String,
    /// A fault to inject: see `CKPT_FAULT`.
    pub fault: Option<String>,
}

/// What a coordinator asks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Request {
    /// Who is there?
    Hello(Hello),
    /// What does the kernel of this node offer?
    Doctor {
        /// The store to try.
        store: String,
    },
    /// [`Phase::Plan`] of a dump.
    PlanDump(DumpTask),
    /// Between plan and arm: how much memory was modified?
    Sample,
    /// [`Phase::Arm`].
    Arm,
    /// [`Phase::Cut`].
    Cut,
    /// [`Phase::Settle`].
    Settle,
    /// [`Phase::Run`].
    Run,
    /// [`Phase::Save`].
    Save,
    /// [`Phase::Commit`].
    Commit,
    /// [`Phase::Plan`] of a restore.
    PlanRestore(RestoreTask),
    /// [`Phase::Build`].
    Build(NetworkTask),
    /// [`Phase::Connect`].
    Connect,
    /// [`Phase::Release`].
    Release,
    /// After [`Phase::Release`]: answer when all restored processes have ended.
    Wait,
    /// Listen for requests for a checkpoint.
    Watch(WatchTask),
    /// After [`Request::Watch`]: give these answers, and say what has happened since the last time.
    Await(Vec<Answer>),
    /// [`Phase::Abort`].
    Abort,
    /// The coordinator lives. Not answered.
    Ping,
}

/// What an agent answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Response {
    /// To [`Request::Hello`].
    Hello {
        /// Version of ckpt.
        ckpt: String,
        /// Kernel release.
        kernel: String,
    },
    /// To [`Request::Doctor`].
    Doctor(Vec<Probe>),
    /// To [`Request::PlanDump`].
    Planned(PlanReport),
    /// To [`Request::Sample`]: bytes modified since the last checkpoint or, where there is none, since the
    /// first sample.
    Sampled(u64),
    /// To [`Request::Cut`].
    Cut(CutReport),
    /// To [`Request::Settle`]: TCP connections with their positions.
    Settled(Vec<Connection>),
    /// To [`Request::Save`].
    Saved(SaveReport),
    /// To [`Request::PlanRestore`].
    RestorePlanned(RestoreReport),
    /// To [`Request::Release`]: the restored processes' PIDs as this node sees them.
    Released(Vec<i32>),
    /// To [`Request::Await`], after a moment.
    Awaited(Awaited),
    /// To all other requests.
    Done,
    /// The request failed; the agent has undone what it had done before.
    Failed(Failure),
    /// The agent lives; a number that grows while it gets on.
    Alive(u64),
}

/// Why a request failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// The whole chain of reasons, as one line.
    pub message: String,
    /// What to do about it.
    pub hint: Option<String>,
    /// What sort of failure it is.
    pub class: FailureClass,
}

/// Sorts of failures; each has its exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum FailureClass {
    /// Anything else.
    Other,
    /// The request makes no sense.
    Usage,
    /// The target cannot be checkpointed, or not restored here.
    Blocked,
    /// As [`FailureClass::Blocked`], but it may work a moment later.
    Transient,
    /// Kernel or privilege lacking.
    System,
    /// No store.
    NoStore,
    /// Somebody else holds a lock.
    Locked,
    /// The image is damaged or from another version.
    Damaged,
    /// Interrupted by the operator.
    Interrupted,
}

/// One thing that `ckpt doctor` has looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Probe {
    /// What was tried.
    pub name: String,
    /// Does it work?
    pub state: ProbeState,
    /// What was seen.
    pub detail: String,
    /// What does not work without it.
    pub needed_for: String,
}

/// Outcome of a probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ProbeState {
    /// It works.
    Works,
    /// It does not, and something optional is lost.
    Degraded,
    /// It does not, and ckpt cannot work without.
    Missing,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn frames_round_trip_and_every_flipped_byte_is_found() {
        let request = Request::Hello(Hello {
            ckpt: "0.1.0".into(),
            node: "n1".into(),
            patience: 10,
            log: "info".into(),
            fault: None,
        });
        let frame = encode(&request).unwrap();
        let take = |frame: &[u8]| -> Result<Request, FormatError> {
            let header = frame.first_chunk().unwrap();
            decode(header, &frame[HEADER_SIZE..])
        };
        assert_eq!(take(&frame), Ok(request));
        for position in 0..frame.len() {
            let mut frame = frame.clone();
            frame[position] ^= 4;
            assert!(take(&frame).is_err(), "byte {position}");
        }
    }

    #[test]
    fn the_length_is_capped_before_anything_is_allocated() {
        let mut header = [0xff; HEADER_SIZE];
        assert!(payload_length(&header).is_err());
        header[..4].copy_from_slice(&(MAX_PAYLOAD as u32).to_le_bytes());
        assert_eq!(payload_length(&header), Ok(MAX_PAYLOAD));
    }

    #[test]
    fn other_programs_and_versions_are_told_apart() {
        assert_eq!(check_preamble(&preamble()), Ok(()));
        let error = check_preamble(b"Welcome to node1").unwrap_err().to_string();
        assert_eq!(error, "preamble is damaged: the other side does not answer as ckpt");
        let mut other = preamble();
        other[8] = 9;
        let error = check_preamble(&other).unwrap_err().to_string();
        assert_eq!(error, "protocol has version 9, but this ckpt reads only up to version 3");
    }

    #[test]
    fn phases_have_names() {
        for phase in Phase::ALL {
            assert_eq!(phase.to_string().parse(), Ok(phase));
        }
    }

    proptest! {
        #[test]
        fn garbage_never_panics(payload in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut header = [0; HEADER_SIZE];
            header[..4].copy_from_slice(&(payload.len() as u32).to_le_bytes());
            header[4..].copy_from_slice(&crc32c::crc32c(&payload).to_le_bytes());
            let _ = decode::<Request>(&header, &payload);
            let _ = decode::<Response>(&header, &payload);
        }
    }
}
