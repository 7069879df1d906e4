//! Lines that are written whole or not at all: a full disk takes the beginning of a record and not its
//! end, and whoever reads records one a line would stumble over what comes behind it.

use std::io;

/// A writer of lines. What is cut off of one waits, and goes before everything else.
#[derive(Debug)]
pub(super) struct WholeLines<W> {
    output: W,
    rest: Vec<u8>,
}

/// Lines that were not written, and why.
#[derive(Debug)]
pub(super) struct Dropped {
    pub(super) lines: u64,
    pub(super) error: io::Error,
}

impl<W: io::Write> WholeLines<W> {
    pub(super) fn new(output: W) -> Self {
        Self { output, rest: Vec::new() }
    }

    /// Writes `lines`, each of which ends with a newline.
    ///
    /// # Errors
    ///
    /// Says how many of them have been dropped; the one that was begun is not among them.
    pub(super) fn write(&mut self, lines: &[u8]) -> Result<(), Dropped> {
        let rest = std::mem::take(&mut self.rest);
        if let (_, Some(error)) = self.write_some(&rest, !rest.is_empty()) {
            return Err(Dropped { lines: count(lines), error });
        }
        match self.write_some(lines, false) {
            (_, None) => Ok(()),
            (written, Some(error)) => {
                let unwritten = &lines[written..];
                Err(Dropped { lines: count(unwritten) - u64::from(!self.rest.is_empty()), error })
            }
        }
    }

    /// Writes as much of `bytes` as can be, and keeps the rest of a line that was `begun` before or is
    /// now. Returns how much was written, and what was in the way of more.
    fn write_some(&mut self, bytes: &[u8], begun: bool) -> (usize, Option<io::Error>) {
        let mut written = 0;
        let error = loop {
            if written == bytes.len() {
                break self.output.flush().err();
            }
            match self.output.write(&bytes[written..]) {
                Ok(0) => break Some(io::ErrorKind::WriteZero.into()),
                Ok(n) => written += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => break Some(error),
            }
        };
        let is_cut = written.checked_sub(1).map_or(begun, |last| bytes[last] != b'\n');
        if error.is_some() && is_cut {
            let left = &bytes[written..];
            let end = left.iter().position(|byte| *byte == b'\n').map_or(left.len(), |at| at + 1);
            self.rest = left[..end].to_vec();
        }
        (written, error)
    }
}

fn count(lines: &[u8]) -> u64 {
    lines.iter().filter(|byte| **byte == b'\n').count() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A disk with so much room.
    #[derive(Default)]
    struct Disk {
        room: usize,
        file: Vec<u8>,
    }

    impl io::Write for Disk {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let n = bytes.len().min(self.room);
            if n == 0 && !bytes.is_empty() {
                return Err(io::ErrorKind::StorageFull.into());
            }
            self.room -= n;
            self.file.extend_from_slice(&bytes[..n]);
            Ok(n)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn disk_of_any_size_holds_whole_lines_and_the_others_are_counted() {
        for room in 0..40 {
            for later in 0..12 {
                let mut lines = WholeLines::new(Disk { room, ..Disk::default() });
                let (mut dropped, mut given) = (0, 0);
                for batch in ["first 1\nsecond 2\n", "third 3\n", "fourth 4\nfifth 5\n"] {
                    given += count(batch.as_bytes());
                    let written = lines.write(batch.as_bytes());
                    dropped += written.err().map_or(0, |dropped| dropped.lines);
                    lines.output.room += later;
                }
                // Room for everything that is still owed.
                lines.output.room = 100;
                lines.write(b"last 9\n").unwrap();
                let file = String::from_utf8(lines.output.file).unwrap();
                let good = ["first 1", "second 2", "third 3", "fourth 4", "fifth 5", "last 9"];
                assert!(file.lines().all(|line| good.contains(&line)), "{room} {later}: {file:?}");
                assert_eq!(
                    file.lines().count() as u64 + dropped,
                    given + 1,
                    "{room} {later}: {file:?}"
                );
            }
        }
    }
}
