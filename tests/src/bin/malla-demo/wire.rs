//! What somebody who taps the link between the nodes sees: `tcpdump`, read as it writes.

use std::io::{self, BufRead as _, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::thread::{self, JoinHandle};

use anyhow::{Context as _, Result, bail, ensure};

/// Larger than any packet, offloads included; a record beyond it is a broken file.
const LONGEST_PACKET: u32 = 1 << 20;

/// What was seen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Seen {
    /// Packets.
    pub(crate) packets: u64,
    /// Their bytes.
    pub(crate) bytes: u64,
    /// Packets in which the marker can be read.
    pub(crate) marked: u64,
}

/// A running capture.
#[derive(Debug)]
pub(crate) struct Tap {
    tcpdump: Child,
    reader: Option<JoinHandle<Result<Seen>>>,
}

impl Tap {
    /// Starts to look for `marker` on `interface`; `start` runs the command in the right place.
    /// Returns once packets are seen.
    ///
    /// # Errors
    ///
    /// Fails when `tcpdump` does.
    pub(crate) fn start(
        start: impl FnOnce(&mut Command) -> Result<Child>,
        interface: &str,
        marker: &str,
    ) -> Result<Self> {
        let mut command = Command::new("tcpdump");
        // Every packet whole, at once, as root (it would give up the right to write), no names.
        command.args(["-i", interface, "-n", "-U", "--immediate-mode", "-Z", "root", "-w", "-"]);
        // Room for a burst while the load holds both cores.
        command.args(["-B", "16384"]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut tap = Self { tcpdump: start(&mut command)?, reader: None };

        let packets = tap.tcpdump.stdout.take().context("no pipe from tcpdump")?;
        let marker = marker.as_bytes().to_vec();
        let read = move || read(BufReader::with_capacity(1 << 16, packets), &marker);
        tap.reader = Some(thread::Builder::new().name("tap".into()).spawn(read)?);

        let said = tap.tcpdump.stderr.take().context("no pipe from tcpdump")?;
        let mut said = BufReader::new(said);
        let mut all = String::new();
        while said.read_line(&mut all).context("read what tcpdump says")? > 0 {
            if all.contains("listening on") {
                // Nothing reads its last words, which are few: the pipe holds them.
                tap.tcpdump.stderr = Some(said.into_inner());
                return Ok(tap);
            }
        }
        bail!("tcpdump: {}", all.trim())
    }

    /// Ends the capture, with what `tcpdump` still has.
    ///
    /// # Errors
    ///
    /// Fails when it lost packets, or what it wrote cannot be read.
    pub(crate) fn stop(mut self) -> Result<Seen> {
        // The child is not waited for yet, so the id is still its own.
        let pid = self.tcpdump.id().to_string();
        let asked = Command::new("kill").args(["-INT", &pid]).status().context("run kill")?;
        ensure!(asked.success(), "tcpdump is gone");
        let reader = self.reader.take().context("stopped twice")?;
        let seen = reader.join().map_err(|_panic| anyhow::anyhow!("the tap panicked"))??;
        let mut said = String::new();
        if let Some(mut last) = self.tcpdump.stderr.take() {
            last.read_to_string(&mut said).context("read what tcpdump says")?;
        }
        let dropped = dropped(&said).with_context(|| format!("tcpdump said {said:?}"))?;
        ensure!(dropped == 0, "tcpdump missed {dropped} packets: the capture proves nothing");
        Ok(seen)
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        self.tcpdump.kill().ok();
        self.tcpdump.wait().ok();
    }
}

/// The count in the line `0 packets dropped by kernel`.
fn dropped(said: &str) -> Option<u64> {
    let line = said.lines().find(|line| line.contains("dropped by kernel"))?;
    line.split_whitespace().next()?.parse().ok()
}

/// Reads a capture to its end: pcap-savefile(5), in this machine's byte order.
fn read(mut file: impl Read, marker: &[u8]) -> Result<Seen> {
    let mut header = [0; 24];
    file.read_exact(&mut header).context("read the capture's header")?;
    let magic = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]);
    ensure!(matches!(magic, 0xa1b2_c3d4 | 0xa1b2_3c4d), "no capture: begins with {magic:#x}");

    let mut seen = Seen::default();
    let mut packet = Vec::new();
    loop {
        let mut record = [0; 16];
        match file.read_exact(&mut record) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(seen),
            Err(error) => return Err(error).context("read the capture"),
        }
        let captured = u32::from_ne_bytes([record[8], record[9], record[10], record[11]]);
        ensure!(captured <= LONGEST_PACKET, "a packet of {captured} bytes");
        packet.resize(captured as usize, 0);
        file.read_exact(&mut packet).context("read a packet")?;
        seen.packets += 1;
        seen.bytes += u64::from(captured);
        seen.marked += u64::from(packet.windows(marker.len()).any(|window| window == marker));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn capture(packets: &[&[u8]]) -> Vec<u8> {
        let mut file = 0xa1b2_c3d4_u32.to_ne_bytes().to_vec();
        file.resize(24, 0);
        for packet in packets {
            let length = u32::try_from(packet.len()).unwrap().to_ne_bytes();
            file.extend([0; 8]);
            file.extend(length);
            file.extend(length);
            file.extend(*packet);
        }
        file
    }

    #[test]
    fn packets_with_the_marker_are_counted_once_each() {
        let file = capture(&[b"GET /?m4rk m4rk", b"nothing", b"", b"m4r", b"xm4rk"]);
        let seen = read(&file[..], b"m4rk").unwrap();
        assert_eq!(seen, Seen { packets: 5, bytes: 30, marked: 2 });
        assert_eq!(read(&capture(&[])[..], b"m4rk").unwrap(), Seen::default());
    }

    #[test]
    fn what_is_no_capture_is_an_error() {
        assert!(read(&b""[..], b"m").is_err());
        assert!(read(&[7; 24][..], b"m").is_err());
        let mut cut = capture(&[b"whole"]);
        cut.pop();
        assert!(read(&cut[..], b"m").is_err());
    }

    #[test]
    fn lost_packets_are_read_from_the_last_words() {
        let said =
            "12 packets captured\n24 packets received by filter\n3 packets dropped by kernel\n";
        assert_eq!(dropped(said), Some(3));
        assert_eq!(dropped("nothing"), None);
    }
}
