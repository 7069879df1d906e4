//! Any bytes, in any pieces: the decoder never panics, uses all that it is given, and sees the same
//! frames however they are cut.

use mesh_core::wire::{Decoder, Event, Role};

pub(crate) fn feed(input: &[u8]) {
    let Some((&[mode, cut], bytes)) = input.split_first_chunk::<2>() else { return };
    let role = if mode & 1 == 0 { Role::Server } else { Role::Client };
    let whole = trace(role, bytes, usize::MAX);
    let pieces = trace(role, bytes, usize::from(cut).max(1));
    assert_eq!(whole, pieces);
}

/// What was seen, in a form that does not depend on how payload was cut: control frames as text, and
/// payload byte by byte.
fn trace(role: Role, bytes: &[u8], cut: usize) -> (Vec<String>, Vec<u8>) {
    let mut decoder = Decoder::new(role);
    let (mut seen, mut payload) = (Vec::new(), Vec::new());
    for mut piece in bytes.chunks(cut.min(bytes.len().max(1))) {
        loop {
            match decoder.next(&mut piece) {
                Ok(None) => break,
                Ok(Some(Event::Data(data))) => {
                    assert!(!data.is_empty());
                    payload.extend_from_slice(data);
                }
                Ok(Some(event)) => seen.push(format!("{} {event:?}", payload.len())),
                Err(error) => {
                    seen.push(format!("{} {error:?}", payload.len()));
                    // An error stays.
                    assert!(decoder.next(&mut &[1, 0, 0, 0][..]).is_err());
                    return (seen, payload);
                }
            }
        }
        assert!(piece.is_empty());
    }
    (seen, payload)
}
