//! The manifest: one JSON document per checkpoint, whose rename into place is the commit.
//!
//! ```text
//! {"format":1,"id":"<blake3 of the text of body>","body":{ ... }}
//! ```
//! The id vouches for the body, and the file must be exactly what its three fields give, so every
//! changed byte is found. The body names each part by hash, a part names its packs by hash: the id
//! vouches for the whole checkpoint.

use super::{Digest, FormatError, tcp::Position};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use std::net::IpAddr;

/// Format that this code writes, and the newest that it reads.
pub const FORMAT: u32 = 1;
/// Largest manifest in bytes.
pub const MAX_SIZE: u64 = 256 << 20;

const WHAT: &str = "manifest";

/// A committed checkpoint: the manifest and its id.
#[derive(Clone, Debug, PartialEq)]
pub struct Checkpoint {
    /// blake3 of the manifest's body.
    pub id: Digest,
    /// What it says.
    pub manifest: Manifest,
}

/// What a checkpoint consists of.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Name of the job in the store.
    pub job: String,
    /// Number of the checkpoint, counting up from 1 per job.
    pub number: u64,
    /// Identity of the dump that made it (the name of its temporary directory).
    pub dump: String,
    /// Time of the cut, in seconds since 1970.
    pub created: u64,
    /// Version of ckpt that wrote it.
    pub ckpt_version: String,
    /// How it was asked for; a restore needs none of it repeated.
    pub options: DumpRecord,
    /// One entry per node.
    pub nodes: Vec<NodePart>,
    /// TCP connections with both ends in the job.
    pub channels: Vec<Channel>,
    /// What took how long, in order.
    pub phases: Vec<PhaseTime>,
    /// Time from the first stopped process to the last resumed one, in us; 0 where the job was
    /// stopped for good.
    pub paused_us: u64,
}

/// Options of the dump that made a checkpoint.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DumpRecord {
    /// What was dumped, such as `--job 17` or `--pid 4242`.
    pub selector: String,
    /// Was the job ended after the dump?
    pub stop: bool,
    /// `none` or a zstd level.
    pub compress: String,
    /// What is kept of files that are open for writing: `content`, `length` or `none`.
    pub files: String,
    /// Kinds of outside connections that were allowed, such as `outside-tcp`.
    pub allow: Vec<String>,
}

/// What one node contributed.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct NodePart {
    /// Name of the node, as given to `--nodes`.
    pub name: String,
    /// Kernel release.
    pub kernel: String,
    /// Its part.
    pub part: PartRef,
    /// Addresses of the node at the time of the dump.
    pub addresses: Vec<NodeAddress>,
    /// Its processes, for `ls` and `show`.
    pub processes: Vec<ProcessSummary>,
    /// The checkpoint since which it has saved only what was modified; none if it saved all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<BaseRef>,
    /// What took how long on this node, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub times: Vec<PhaseTime>,
    /// How the memory of its processes was saved.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub memory: Vec<ProcessMemory>,
}

/// The checkpoint that an increment was taken against. It need not exist any more.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BaseRef {
    /// `job@number`.
    pub name: String,
    /// Its id.
    pub id: Digest,
}

/// How the memory of a process was saved. All in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ProcessMemory {
    /// PID as the process sees it.
    pub pid: i32,
    /// Resident at the cut.
    pub resident_bytes: u64,
    /// Modified since the base.
    pub modified_bytes: u64,
    /// Copied before the cut (modified again later or not).
    pub presaved_bytes: u64,
    /// Copied in the cut, while it was frozen.
    pub cut_bytes: u64,
    /// Old content saved after the cut, because it was about to be overwritten.
    pub copied_before_write_bytes: u64,
}

/// Reference to a durable part.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartRef {
    /// blake3 of its bytes.
    pub id: Digest,
    /// Its size in bytes.
    pub bytes: u64,
    /// Packs that were written with it. It may point into older ones too.
    pub packs: Vec<PackRef>,
    /// Number of its records.
    pub records: u64,
    /// Pages with content, wherever it is stored.
    pub data_pages: u64,
    /// Pages full of zeros.
    pub zero_pages: u64,
    /// Of the pages with content: those in packs of older parts.
    #[serde(default)]
    pub inherited_pages: u64,
    /// Of the pages with content: those that have it from another page of this part.
    #[serde(default)]
    pub shared_pages: u64,
}

impl PartRef {
    /// Size of the part and of the packs written with it, in bytes.
    pub fn stored_bytes(&self) -> u64 {
        self.bytes + self.packs.iter().map(|pack| pack.bytes).sum::<u64>()
    }
}

/// Reference to a durable pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PackRef {
    /// Its name.
    pub id: Digest,
    /// Its size in bytes.
    pub bytes: u64,
}

/// An address of a node.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct NodeAddress {
    /// Network interface.
    pub interface: String,
    /// Address.
    pub address: IpAddr,
}

/// What `ls` and `show` tell about a process.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessSummary {
    /// PID as the process sees it.
    pub pid: i32,
    /// Parent in the job, or 0.
    pub ppid: i32,
    /// Name (`/proc/PID/comm`).
    pub name: String,
    /// Command line.
    pub cmdline: Vec<String>,
    /// Number of threads.
    pub threads: u32,
    /// Resident memory in bytes.
    pub rss: u64,
}

/// A TCP connection with both ends in the job, at the cut.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Channel {
    /// The two ends; which one is first has no meaning.
    pub ends: [ChannelEnd; 2],
}

/// One end of a TCP connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChannelEnd {
    /// Index of the node in [`Manifest::nodes`].
    pub node: u32,
    /// Where it stands.
    pub position: Position,
}

impl Channel {
    /// Bytes on their way from end `from` (0 or 1) to the other: written, not yet received; none
    /// where the ends do not fit.
    pub fn in_flight(&self, from: usize) -> u32 {
        let (sender, receiver) = (&self.ends[from].position, &self.ends[1 - from].position);
        sender.in_flight(receiver).map_or(0, |flight| flight.bytes)
    }

    /// Is every byte at one of the ends? If not: why.
    pub fn check(&self) -> Result<(), String> {
        let [a, b] = &self.ends;
        if !a.position.matches(&b.position) {
            return Err(format!("TCP {}: its two ends are of different connections", a.position.local));
        }
        for (sender, receiver) in [(a, b), (b, a)] {
            let (from, to) = (sender.position.local, receiver.position.local);
            let flight = sender.position.in_flight(&receiver.position);
            flight.map_err(|misfit| format!("TCP {from} -> {to}: {misfit}"))?;
        }
        Ok(())
    }
}

/// How long a phase took.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PhaseTime {
    /// Name of the phase.
    pub phase: String,
    /// Microseconds, over all nodes.
    pub us: u64,
}

#[derive(Serialize, Deserialize)]
struct Envelope<'a> {
    format: u32,
    id: Digest,
    #[serde(borrow)]
    body: &'a RawValue,
}

#[derive(Deserialize)]
struct FormatOnly {
    format: u32,
}

impl Manifest {
    /// Text of the file, and the checkpoint's id.
    ///
    /// # Errors
    /// [`FormatError::TooLarge`] above [`MAX_SIZE`].
    pub fn encode(&self) -> Result<(Vec<u8>, Digest), FormatError> {
        let too_large = |why: String| FormatError::TooLarge { what: WHAT, why };
        let body = serde_json::value::to_raw_value(self).map_err(|error| too_large(error.to_string()))?;
        let id = Digest::of(&[body.get().as_bytes()]);
        let envelope = Envelope { format: FORMAT, id, body: &body };
        let mut text = serde_json::to_vec(&envelope).map_err(|error| too_large(error.to_string()))?;
        text.push(b'\n');
        if text.len() as u64 > MAX_SIZE {
            return Err(too_large(format!("{} bytes, the limit is {MAX_SIZE}", text.len())));
        }
        Ok((text, id))
    }

    /// Size on storage of what was written for this checkpoint, in bytes.
    pub fn stored_bytes(&self) -> u64 {
        self.nodes.iter().map(|node| node.part.stored_bytes()).sum()
    }

    /// Number of processes.
    pub fn processes(&self) -> usize {
        self.nodes.iter().map(|node| node.processes.len()).sum()
    }
}

impl Checkpoint {
    /// Reads the text of a manifest.
    pub fn decode(text: &[u8]) -> Result<Self, FormatError> {
        let damaged = |why: String| FormatError::damaged(WHAT, why);
        let format: FormatOnly = serde_json::from_slice(text).map_err(|error| damaged(error.to_string()))?;
        if format.format > FORMAT {
            let (found, supported) = (format.format, FORMAT);
            return Err(FormatError::Newer { what: WHAT.into(), found, supported });
        }
        let envelope: Envelope<'_> =
            serde_json::from_slice(text).map_err(|error| damaged(error.to_string()))?;
        let body = envelope.body.get();
        if envelope.format == 0 || Digest::of(&[body.as_bytes()]) != envelope.id {
            return Err(damaged("its text does not have the hash that is its id".into()));
        }
        let again = serde_json::to_vec(&envelope).map_err(|error| damaged(error.to_string()))?;
        if text.strip_suffix(b"\n") != Some(&again) {
            return Err(damaged("there is text around the body that does not belong there".into()));
        }
        let manifest = serde_json::from_str(body).map_err(|error| damaged(error.to_string()))?;
        Ok(Self { id: envelope.id, manifest })
    }

    /// `job@number`.
    pub fn name(&self) -> String {
        format!("{}@{}", self.manifest.job, self.manifest.number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> Manifest {
        let part = PartRef {
            id: Digest([1; 32]),
            bytes: 10,
            packs: vec![PackRef { id: Digest([2; 32]), bytes: 20 }],
            records: 3,
            data_pages: 4,
            zero_pages: 5,
            inherited_pages: 1,
            shared_pages: 2,
        };
        let address = NodeAddress { interface: "eth0".into(), address: "10.0.0.1".parse().unwrap() };
        Manifest {
            job: "shop".into(),
            number: 3,
            nodes: vec![NodePart {
                name: "node1".into(),
                kernel: "6.18".into(),
                part,
                addresses: vec![address],
                processes: vec![ProcessSummary { pid: 7, name: "redis \"x\"".into(), ..Default::default() }],
                base: Some(BaseRef { name: "shop@2".into(), id: Digest([7; 32]) }),
                times: vec![PhaseTime { phase: "cut".into(), us: 9 }],
                memory: vec![ProcessMemory { pid: 7, cut_bytes: 4096, ..Default::default() }],
            }],
            ..Default::default()
        }
    }

    /// Positions: start and end of sending, next to receive.
    fn channel(a: [u32; 3], b: [u32; 3]) -> Channel {
        let address = |text: &str| text.parse::<std::net::SocketAddr>().unwrap().into();
        let end = |local, peer, [send_start, send_end, receive_next]: [u32; 3]| ChannelEnd {
            node: 0,
            position: Position {
                local: address(local),
                peer: address(peer),
                send_start,
                send_end,
                receive_next,
                window_end: receive_next,
                finished: false,
                peer_finished: false,
            },
        };
        Channel { ends: [end("10.0.0.1:1", "10.0.0.2:2", a), end("10.0.0.2:2", "10.0.0.1:1", b)] }
    }

    #[test]
    fn round_trip_and_every_flipped_byte() {
        let (text, id) = sample().encode().unwrap();
        assert_eq!(Checkpoint::decode(&text).unwrap(), Checkpoint { id, manifest: sample() });
        for position in 0..text.len() {
            for bit in [0x01, 0x20, 0x80] {
                let mut text = text.clone();
                text[position] ^= bit;
                assert!(Checkpoint::decode(&text).is_err(), "byte {position}");
            }
            assert!(Checkpoint::decode(&text[..position]).is_err(), "cut at {position}");
        }
    }

    #[test]
    fn what_was_added_later_may_be_missing() {
        let mut old = sample();
        let node = &mut old.nodes[0];
        (node.base, node.times, node.memory) = Default::default();
        (node.part.inherited_pages, node.part.shared_pages) = (0, 0);
        let text = serde_json::to_string(&old).unwrap();
        let text = text.replace(r#","inherited_pages":0,"shared_pages":0"#, "");
        for name in ["inherited_pages", "shared_pages", "base", "times", "memory"] {
            assert!(!text.contains(name), "{name}");
        }
        assert_eq!(serde_json::from_str::<Manifest>(&text).unwrap(), old);
    }

    #[test]
    fn a_newer_format_is_named_whatever_else_it_holds() {
        let error = Checkpoint::decode(br#"{"format":7,"content":[]}"#).unwrap_err();
        assert_eq!(error.to_string(), "manifest has version 7, but this ckpt reads only up to version 1");
    }

    #[test]
    fn channels_are_checked_modulo_the_sequence_space() {
        // 20 bytes in flight from a to b, across the wrap of the sequence numbers.
        let good = channel([u32::MAX - 10, 15, 100], [100, 100, u32::MAX - 4]);
        assert_eq!((good.check(), good.in_flight(0), good.in_flight(1)), (Ok(()), 20, 0));
        let ahead = channel([10, 20, 0], [0, 0, 25]).check().unwrap_err();
        assert!(ahead.ends_with("5 bytes were received that the sender had not written"), "{ahead}");
        let gap = channel([10, 20, 0], [0, 0, 7]).check().unwrap_err();
        assert!(gap.ends_with("3 bytes were acknowledged and not captured"), "{gap}");
        let mut strangers = channel([0; 3], [0; 3]);
        strangers.ends[1].position.local.port = 9;
        assert!(strangers.check().unwrap_err().ends_with("different connections"));
    }

    proptest! {
        #[test]
        fn garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(Checkpoint::decode(&bytes).is_err());
        }

        #[test]
        fn any_text_survives(job in ".*", selector in ".*", created: u64) {
            let options = DumpRecord { selector, ..Default::default() };
            let manifest = Manifest { job, created, options, ..Default::default() };
            let (text, id) = manifest.encode().unwrap();
            prop_assert_eq!(Checkpoint::decode(&text).unwrap(), Checkpoint { id, manifest });
        }
    }
}
