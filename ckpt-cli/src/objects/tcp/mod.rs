//! TCP sockets: connections with data in flight, half closed ones, listening and unconnected sockets.
//!
//! **Capture.** Of each connection both ends are captured while all programs of the job are
//! frozen. The kernel's TCP goes on meanwhile, so the two captures are of different moments; they
//! fit as long as no byte is released by the sender that the receiver's capture does not have:
//! either the traffic is held during both, or the *sending* half is captured on all nodes before
//! the *receiving* half of any ([`Half`]). What both have is dropped when rebuilding.
//!
//! **Rebuild.** On all nodes: listening sockets, then connections in repair mode, where a sender's
//! queue starts at the very byte the receiver waits for. After a barrier, when every end exists,
//! [`Rebuilt::connect`] turns repair mode off and sends the queue as new data, so that nothing waits
//! for a retransmission time-out.
//!
//! ```text
//!   node A                coordinator              node B
//!   rebuild (repair) ------- done ------------- rebuild (repair)
//!          <---------------- go! ---------------------->
//!   connect                                     connect
//! ```

mod capture;
mod ended;
mod guard;
mod info;
mod rebuild;
mod repair;

pub use capture::{CaptureError, Half, capture, capture_sending, silence};
pub use guard::Guard;
pub use info::ends;
pub use rebuild::{Rebuilt, rebuild};
