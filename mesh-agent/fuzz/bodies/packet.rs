//! Any frame from a pod: what is read of it is in it, and what is passed on has one hop less to live and
//! a checksum that is as right as it was.

use mesh_common::packet::{Frame, Hop, Ipv4, Ipv6};

pub(crate) fn feed(input: &[u8]) {
    let four = size_of::<Frame<Ipv4>>();
    if let Some(bytes) = input.get(..four) {
        // SAFETY: as many bytes as the frame has, of which every pattern is valid.
        let frame = unsafe { bytes.as_ptr().cast::<Frame<Ipv4>>().read_unaligned() };
        if let Some(out) = forwarded(&frame) {
            assert_eq!(out[22] + 1, bytes[22], "the time to live");
            let is_right = |header: &[u8]| sum(&header[14..34]) == 0xffff;
            assert_eq!(is_right(&out), is_right(bytes), "the checksum");
        }
    }
    if let Some(bytes) = input.get(..size_of::<Frame<Ipv6>>()) {
        // SAFETY: as above.
        let frame = unsafe { bytes.as_ptr().cast::<Frame<Ipv6>>().read_unaligned() };
        if let Some(out) = forwarded(&frame) {
            assert_eq!(out[21] + 1, bytes[21], "the hop limit");
        }
    }
}

/// What is written back, if the frame is a segment that is passed on.
fn forwarded<Ip: Hop>(frame: &Frame<Ip>) -> Option<Vec<u8>> {
    let segment = frame.segment()?;
    assert!(!(segment.opens() && segment.answers()));
    let head = frame.forwarded([1; 6], [2; 6]);
    let at = (&raw const head).cast::<u8>();
    // SAFETY: packed, so every byte is initialised.
    Some(unsafe { std::slice::from_raw_parts(at, size_of_val(&head)) }.to_vec())
}

/// RFC 1071.
fn sum(header: &[u8]) -> u32 {
    let words =
        header.chunks_exact(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])));
    let sum: u32 = words.sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    (sum & 0xffff) + (sum >> 16)
}
