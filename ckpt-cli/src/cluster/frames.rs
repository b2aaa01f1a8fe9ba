//! Frames on byte streams.

use ckpt_common::{
    image::FormatError,
    wire::{self, HEADER_SIZE, PREAMBLE_SIZE},
};
use serde::{Serialize, de::DeserializeOwned};
use std::io::{self, ErrorKind, Read, Write};

/// Why a stream cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The other side ended in the middle of something.
    #[error("the connection was cut in the middle of a message")]
    Cut,
    /// What came is not a message.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// What came instead of a preamble: often the output of a login script.
    #[error("it does not speak ckpt's protocol: it sent {0:?}")]
    Foreign(String),
    /// A system call failed.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Reads messages.
pub struct FrameReader<R> {
    stream: R,
    begun: bool,
}

impl<R: Read> FrameReader<R> {
    /// Reads from `stream`, the preamble first.
    pub fn new(stream: R) -> Self {
        Self { stream, begun: false }
    }

    /// The next message, or nothing where the other side has closed the stream between two.
    pub fn read<T: DeserializeOwned>(&mut self) -> Result<Option<T>, FrameError> {
        if !self.begun {
            let mut preamble = [0; PREAMBLE_SIZE];
            let got = fill(&mut self.stream, &mut preamble)?;
            if got == 0 {
                return Ok(None);
            }
            if got < PREAMBLE_SIZE || preamble[..8] != wire::preamble()[..8] {
                return Err(FrameError::Foreign(String::from_utf8_lossy(&preamble[..got]).into_owned()));
            }
            wire::check_preamble(&preamble)?;
            self.begun = true;
        }
        let mut header = [0; HEADER_SIZE];
        match fill(&mut self.stream, &mut header)? {
            0 => return Ok(None),
            HEADER_SIZE => {}
            _ => return Err(FrameError::Cut),
        }
        let length = wire::payload_length(&header)?;
        // Grows with what really arrives, not with what was announced.
        let mut payload = Vec::new();
        (&mut self.stream).take(length as u64).read_to_end(&mut payload)?;
        if payload.len() < length {
            return Err(FrameError::Cut);
        }
        Ok(Some(wire::decode(&header, &payload)?))
    }
}

/// Reads until `buffer` is full or the stream ends.
fn fill(stream: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut got = 0;
    while got < buffer.len() {
        match stream.read(&mut buffer[got..]) {
            Ok(0) => break,
            Ok(n) => got += n,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(got)
}

/// Writes messages.
pub struct FrameWriter<W> {
    stream: W,
    begun: bool,
}

impl<W: Write> FrameWriter<W> {
    /// Writes to `stream`, the preamble first.
    pub fn new(stream: W) -> Self {
        Self { stream, begun: false }
    }

    /// Sends a message.
    pub fn write<T: Serialize>(&mut self, message: &T) -> Result<(), FrameError> {
        let frame = wire::encode(message)?;
        if !self.begun {
            self.stream.write_all(&wire::preamble())?;
            self.begun = true;
        }
        self.stream.write_all(&frame)?;
        Ok(self.stream.flush()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ckpt_common::wire::Request;

    fn stream(requests: &[Request]) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut writer = FrameWriter::new(&mut bytes);
        requests.iter().for_each(|request| writer.write(request).unwrap());
        bytes
    }

    #[test]
    fn messages_come_in_order_until_the_end() {
        let bytes = stream(&[Request::Cut, Request::Run]);
        let mut reader = FrameReader::new(&bytes[..]);
        assert_eq!(reader.read().unwrap(), Some(Request::Cut));
        assert_eq!(reader.read().unwrap(), Some(Request::Run));
        assert_eq!(reader.read::<Request>().unwrap(), None);
    }

    #[test]
    fn a_cut_in_the_middle_is_not_an_end() {
        let bytes = stream(&[Request::Cut]);
        for length in PREAMBLE_SIZE + 1..bytes.len() {
            let error = FrameReader::new(&bytes[..length]).read::<Request>().unwrap_err();
            assert!(matches!(error, FrameError::Cut), "{length}: {error}");
        }
    }

    #[test]
    fn a_login_script_that_talks_is_shown() {
        let error =
            FrameReader::new(&b"Welcome to node1! Have a nice day"[..]).read::<Request>().unwrap_err();
        let text = "it does not speak ckpt's protocol: it sent \"Welcome to node1\"";
        assert_eq!(error.to_string(), text);
    }
}
