//! The wire protocol against its description, and against any bytes at all.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use proptest::prelude::*;

use super::*;
use crate::addr::EndpointAddr;
use crate::stage::Stage;

fn open() -> Open {
    Open {
        flow: 0x0102_0304_0506_0708,
        trace: [0xAB; 16],
        destination: EndpointAddr("10.1.2.3:8080".parse().unwrap()),
        source: "[fd00::1]:4711".parse().unwrap(),
    }
}

/// An event without borrowed payload; neighbouring payload is one.
#[derive(Clone, Debug, PartialEq)]
enum Owned {
    Open(Open),
    Unsupported(u8),
    Answer(Answer),
    Data(Vec<u8>),
    Fin,
    Reset(ResetReason),
}

/// All events of `bytes` cut into pieces of the lengths in `cuts` (repeated), and the error if any.
fn decode(role: Role, bytes: &[u8], cuts: &[usize]) -> (Vec<Owned>, Option<WireError>) {
    let mut decoder = Decoder::new(role);
    let mut events = Vec::new();
    let mut cuts = cuts.iter().copied().cycle();
    let mut rest = bytes;
    while !rest.is_empty() {
        let cut = cuts.next().unwrap_or(usize::MAX).clamp(1, rest.len());
        let (mut piece, later) = rest.split_at(cut);
        rest = later;
        loop {
            let event = match decoder.next(&mut piece) {
                Ok(None) => break,
                Err(error) => return (events, Some(error)),
                Ok(Some(event)) => event,
            };
            let event = match event {
                Event::Open(open) => Owned::Open(open),
                Event::Unsupported { version } => Owned::Unsupported(version),
                Event::Answer(answer) => Owned::Answer(answer),
                Event::Fin => Owned::Fin,
                Event::Reset(reason) => Owned::Reset(reason),
                Event::Data(data) => {
                    if let Some(Owned::Data(before)) = events.last_mut() {
                        before.extend_from_slice(data);
                        continue;
                    }
                    Owned::Data(data.to_vec())
                }
            };
            events.push(event);
        }
        assert!(piece.is_empty(), "`None` means that all was used");
    }
    (events, None)
}

fn data(payload: &[u8]) -> Vec<u8> {
    let mut frame = data_header(payload.len()).to_vec();
    frame.extend_from_slice(payload);
    frame
}

#[test]
fn open_is_laid_out_as_described() {
    let mut expected = vec![0x01, 0, 0, 62, 1, 0, 1, 2, 3, 4, 5, 6, 7, 8];
    expected.extend_from_slice(&[0xAB; 16]);
    expected
        .extend_from_slice(&[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xFF, 0xFF, 10, 1, 2, 3, 0x1F, 0x90]);
    expected.extend_from_slice(&[0xFD, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0x12, 0x67]);
    assert_eq!(open().encode().as_slice(), expected);
}

#[test]
fn answer_and_reset_are_laid_out_as_described() {
    assert_eq!(encode_answer(Ok(())), [0x02, 0, 0, 4, 0, 0, 0, 1]);
    let refusal = Refusal::new(Stage::Authorize, Reason::Denied);
    assert_eq!(encode_answer(Err(refusal)), [0x02, 0, 0, 4, 1, 6, 10, 1]);
    assert_eq!(encode_reset(ResetReason::TimedOut), [0x05, 0, 0, 1, 2]);
    assert_eq!(FIN, [0x04, 0, 0, 0]);
    assert_eq!(data_header(0x01_02_03), [0x03, 1, 2, 3]);
}

#[test]
fn codes_mean_what_they_always_meant() {
    let reasons: Vec<_> = Reason::ALL.iter().map(|r| (r.code(), r.as_str())).collect();
    let expected = [
        (0, "other"),
        (1, "protocol"),
        (2, "version"),
        (3, "internal"),
        (4, "draining"),
        (5, "overloaded"),
        (6, "unknown_workload"),
        (7, "wrong_workload"),
        (8, "not_enrolled"),
        (9, "source_mismatch"),
        (10, "denied"),
        (11, "connection_refused"),
        (12, "connect_timeout"),
        (13, "unreachable"),
        (14, "caller_certificate"),
    ];
    assert_eq!(reasons, expected);
    assert!(Reason::ALL.iter().all(|reason| Reason::from_code(reason.code()) == *reason));
    assert!(ResetReason::ALL.iter().all(|reason| ResetReason::from_code(reason.code()) == *reason));
    assert_eq!(Reason::from_code(200), Reason::Other);
    assert_eq!(ResetReason::from_code(200), ResetReason::Other);
}

#[test]
fn two_flows_follow_each_other_on_a_lane() {
    let mut bytes = Vec::new();
    for _ in 0..2 {
        bytes.extend_from_slice(&open().encode());
        bytes.extend_from_slice(&data(b"payload"));
        bytes.extend_from_slice(&FIN);
    }
    let (events, error) = decode(Role::Server, &bytes, &[]);
    let flow = [Owned::Open(open()), Owned::Data(b"payload".to_vec()), Owned::Fin];
    assert_eq!(events, [flow.clone(), flow].concat());
    assert_eq!(error, None);
}

#[test]
fn a_refused_flow_is_followed_by_the_next_answer() {
    let refusal = Refusal::new(Stage::Deliver, Reason::ConnectionRefused);
    let bytes = [encode_answer(Err(refusal)), encode_answer(Ok(()))].concat();
    let (events, error) = decode(Role::Client, &bytes, &[3]);
    let answer = |verdict| Owned::Answer(Answer { verdict, version: VERSION });
    assert_eq!((events, error), (vec![answer(Err(refusal)), answer(Ok(()))], None));
}

#[test]
fn what_is_out_of_order_is_refused() {
    let opened = open().encode();
    let server: [(&[&[u8]], u8); 7] = [
        (&[&data(b"x")], 0x03),
        (&[&FIN], 0x04),
        (&[&encode_reset(ResetReason::Application)], 0x05),
        (&[&encode_answer(Ok(()))], 0x02),
        (&[&opened, &opened], 0x01),
        (&[&opened, &FIN, &data(b"x")], 0x03),
        (&[&opened, &encode_reset(ResetReason::Application), &opened], 0x01),
    ];
    for (frames, kind) in server {
        let (_, error) = decode(Role::Server, &frames.concat(), &[]);
        assert_eq!(error, Some(WireError::OutOfOrder(kind)), "{frames:?}");
    }
    let (_, error) = decode(Role::Client, &opened, &[]);
    assert_eq!(error, Some(WireError::OutOfOrder(0x01)));
}

#[test]
fn a_reset_may_follow_the_end_of_the_senders_own_direction() {
    let bytes =
        [open().encode().as_slice(), &FIN, &encode_reset(ResetReason::Application)].concat();
    let (events, error) = decode(Role::Server, &bytes, &[]);
    assert_eq!(events[1..], [Owned::Fin, Owned::Reset(ResetReason::Application)]);
    assert_eq!(error, None);
}

#[test]
fn an_impossible_length_is_refused_from_the_header() {
    let opened = open().encode();
    let [_, high, mid, low] = u32::try_from(MAX_DATA + 1).unwrap().to_be_bytes();
    let cases: [(&[u8], u8); 7] = [
        (&[0x03, 0, 0, 0], 0x03),
        (&[0x03, high, mid, low], 0x03),
        (&[0x04, 0, 0, 1], 0x04),
        (&[0x05, 0, 0, 0], 0x05),
        (&[0x05, 0, 0, 2], 0x05),
        (&[0x05, 0xFF, 0xFF, 0xFF], 0x05),
        (&[0x04, 0xFF, 0xFF, 0xFF], 0x04),
    ];
    for (header, kind) in cases {
        let (_, error) = decode(Role::Server, &[opened.as_slice(), header].concat(), &[]);
        assert_eq!(error, Some(WireError::Length(kind)), "{header:?}");
    }
    let (_, error) = decode(Role::Server, &[0x01, 0, 4, 1], &[]);
    assert_eq!(error, Some(WireError::Length(0x01)), "OPEN over MAX_CONTROL");
    let (_, error) = decode(Role::Client, &[0x02, 0, 0, 5], &[]);
    assert_eq!(error, Some(WireError::Length(0x02)));
}

#[test]
fn an_unknown_type_is_refused_also_if_it_is_reserved() {
    for kind in [0x00, 0x06, 0x10, 0x11, 0xFF] {
        let (_, error) = decode(Role::Server, &[kind, 0, 0, 0], &[]);
        assert_eq!(error, Some(WireError::UnknownType(kind)));
    }
}

#[test]
fn a_later_version_is_recognised_whatever_its_length() {
    for len in [1, 61, 62, 63, 200, MAX_CONTROL] {
        let [high, low] = u16::try_from(len).unwrap().to_be_bytes();
        let mut bytes = vec![0x01, 0, high, low, 2];
        bytes.resize(HEADER_LEN + len, 0xEE);
        for cuts in [&[][..], &[1], &[7]] {
            let (events, error) = decode(Role::Server, &bytes, cuts);
            assert_eq!((events, error), (vec![Owned::Unsupported(2)], None), "{len}");
        }
    }
}

#[test]
fn a_flag_that_is_not_known_is_not_ignored() {
    let mut bytes = open().encode();
    bytes[5] = 0x01;
    assert_eq!(decode(Role::Server, &bytes, &[]).0, [Owned::Unsupported(VERSION)]);
}

#[test]
fn our_version_with_another_length_is_refused() {
    let mut bytes = vec![0x01, 0, 0, 63, VERSION];
    bytes.resize(HEADER_LEN + 63, 0);
    assert_eq!(decode(Role::Server, &bytes, &[]), (vec![], Some(WireError::Length(0x01))));
}

#[test]
fn an_answer_that_means_nothing_is_refused() {
    for body in [[2, 0, 0, 1], [1, 0, 10, 1], [1, 9, 10, 1]] {
        let bytes = [&[0x02, 0, 0, 4][..], &body].concat();
        assert_eq!(decode(Role::Client, &bytes, &[]), (vec![], Some(WireError::Answer)));
    }
}

#[test]
fn an_error_stays() {
    let opened = open().encode();
    let mut decoder = Decoder::new(Role::Server);
    decoder.next(&mut &[0xFF, 0, 0, 0][..]).unwrap_err();
    decoder.next(&mut &opened[..]).unwrap_err();

    // Found by fuzzing: the rest of an OPEN that is too long for its version was still skipped.
    let mut longer = opened;
    longer[3] += 30;
    let mut decoder = Decoder::new(Role::Server);
    assert_eq!(decoder.next(&mut &longer[..]), Err(WireError::Length(0x01)));
    assert_eq!(decoder.next(&mut &[0; 30][..]), Err(WireError::Length(0x01)));
    assert_eq!(decoder.next(&mut &[][..]), Err(WireError::Length(0x01)));
}

#[test]
fn a_boundary_is_where_no_frame_is_cut() {
    let mut decoder = Decoder::new(Role::Server);
    assert!(decoder.at_boundary());
    let bytes = [open().encode().as_slice(), &data(b"ab")].concat();
    for (at, byte) in bytes.iter().enumerate() {
        let mut input = std::slice::from_ref(byte);
        while decoder.next(&mut input).unwrap().is_some() {}
        let boundary = at + 1 == OPEN_LEN || at + 1 == bytes.len();
        assert_eq!(decoder.at_boundary(), boundary, "after byte {at}");
    }
}

#[test]
fn a_decoder_is_small() {
    assert!(size_of::<Decoder>() <= 128, "{} bytes in every idle lane", size_of::<Decoder>());
}

fn any_addr() -> impl Strategy<Value = SocketAddr> {
    let ip = prop_oneof![
        any::<[u8; 4]>().prop_map(|ip| IpAddr::from(Ipv4Addr::from(ip))),
        // Canonical: a v4-mapped address is the IPv4 address.
        any::<[u8; 16]>().prop_map(|ip| Ipv6Addr::from(ip).to_canonical()),
    ];
    (ip, any::<u16>()).prop_map(SocketAddr::from)
}

fn any_open() -> impl Strategy<Value = Open> {
    (any::<u64>(), any::<[u8; 16]>(), any_addr(), any_addr()).prop_map(
        |(flow, trace, destination, source)| Open {
            flow,
            trace,
            destination: EndpointAddr(destination),
            source,
        },
    )
}

/// Flows as a client sends them, and the events that they are.
fn any_flows() -> impl Strategy<Value = (Vec<u8>, Vec<Owned>)> {
    let payload = proptest::collection::vec(any::<u8>(), 1..300);
    let flow = (any_open(), proptest::collection::vec(payload, 0..4));
    (proptest::collection::vec(flow, 1..4), any::<bool>()).prop_map(|(flows, reset)| {
        let (mut bytes, mut events) = (Vec::new(), Vec::new());
        for (open, payloads) in flows {
            bytes.extend_from_slice(&open.encode());
            events.push(Owned::Open(open));
            for payload in &payloads {
                bytes.extend_from_slice(&data(payload));
            }
            if !payloads.is_empty() {
                events.push(Owned::Data(payloads.concat()));
            }
            bytes.extend_from_slice(&FIN);
            events.push(Owned::Fin);
        }
        if reset {
            bytes.extend_from_slice(&encode_reset(ResetReason::Draining));
            events.push(Owned::Reset(ResetReason::Draining));
        }
        (bytes, events)
    })
}

proptest! {
    #[test]
    fn open_survives_its_own_encoding(open in any_open()) {
        let (events, error) = decode(Role::Server, &open.encode(), &[]);
        prop_assert_eq!((events, error), (vec![Owned::Open(open)], None));
    }

    #[test]
    fn answers_survive_their_own_encoding(
        stage in proptest::sample::select(&Stage::ALL),
        reason in proptest::sample::select(Reason::ALL),
    ) {
        for verdict in [Ok(()), Err(Refusal::new(stage, reason))] {
            let (events, error) = decode(Role::Client, &encode_answer(verdict), &[]);
            let answer = Owned::Answer(Answer { verdict, version: VERSION });
            prop_assert_eq!((events, error), (vec![answer], None));
        }
    }

    #[test]
    fn pieces_of_any_size_are_the_same_frames(
        (bytes, events) in any_flows(),
        cuts in proptest::collection::vec(1usize..200, 1..8),
    ) {
        prop_assert_eq!(decode(Role::Server, &bytes, &cuts), (events, None));
    }

    #[test]
    fn any_bytes_give_the_same_result_in_any_pieces(
        bytes in proptest::collection::vec(any::<u8>(), 0..600),
        cuts in proptest::collection::vec(1usize..50, 1..8),
        server in any::<bool>(),
    ) {
        let role = if server { Role::Server } else { Role::Client };
        prop_assert_eq!(decode(role, &bytes, &cuts), decode(role, &bytes, &[]));
    }

    #[test]
    fn a_flipped_bit_never_panics_and_never_depends_on_the_pieces(
        (mut bytes, _) in any_flows(),
        at in any::<proptest::sample::Index>(),
        bit in 0u8..8,
        cuts in proptest::collection::vec(1usize..100, 1..4),
    ) {
        *at.get_mut(&mut bytes) ^= 1 << bit;
        let whole = decode(Role::Server, &bytes, &[]);
        prop_assert_eq!(decode(Role::Server, &bytes, &cuts), whole);
    }
}
