//! Inputs of a fuzz target in one file: thousands of files of some bytes each are nothing to have in a repository.
//!
//! ```text
//! length (4 bytes, big endian)   input   length   input   …
//! ```

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};

/// Puts each input of `packed`, if there is such a file, into a file in `place`, which is made, instead of those of an
/// earlier one.
pub(super) fn unpack(packed: &Path, place: &Path) -> Result<()> {
    fs::create_dir_all(place).with_context(|| format!("make {}", place.display()))?;
    for file in files(place)? {
        let name = file.file_name().unwrap_or_default();
        if name.to_string_lossy().starts_with("kept-") {
            fs::remove_file(&file).with_context(|| format!("remove {}", file.display()))?;
        }
    }
    if !packed.exists() {
        return Ok(());
    }
    let all = fs::read(packed).with_context(|| format!("read {}", packed.display()))?;
    for (nth, input) in inputs(&all).enumerate() {
        let input = input.with_context(|| format!("read {}", packed.display()))?;
        let file = place.join(format!("kept-{nth}"));
        fs::write(&file, input).with_context(|| format!("write {}", file.display()))?;
    }
    Ok(())
}

/// Puts what the files in `place` hold into the file `packed`, in the order of its bytes, and says how many inputs
/// and how many bytes that are.
pub(super) fn pack(place: &Path, packed: &Path) -> Result<(usize, usize)> {
    let mut all = Vec::new();
    for file in files(place)? {
        all.push(fs::read(&file).with_context(|| format!("read {}", file.display()))?);
    }
    all.sort();
    all.dedup();
    ensure!(!all.is_empty(), "there is nothing in {}", place.display());
    let mut bytes = Vec::new();
    for input in &all {
        let length = u32::try_from(input.len()).context("an input of gigabytes")?;
        bytes.extend(length.to_be_bytes());
        bytes.extend(input);
    }
    if let Some(dir) = packed.parent() {
        fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))?;
    }
    fs::write(packed, &bytes).with_context(|| format!("write {}", packed.display()))?;
    Ok((all.len(), bytes.len()))
}

fn files(place: &Path) -> Result<Vec<PathBuf>> {
    let all = fs::read_dir(place).with_context(|| format!("read {}", place.display()))?;
    all.map(|entry| Ok(entry.context("read a directory")?.path())).collect()
}

/// The inputs in a packed file.
fn inputs(mut rest: &[u8]) -> impl Iterator<Item = Result<&[u8]>> {
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let input = next(rest);
        rest = input.as_ref().map_or(&[], |(_, rest)| rest);
        Some(input.map(|(input, _)| input))
    })
}

fn next(packed: &[u8]) -> Result<(&[u8], &[u8])> {
    let (length, rest) = packed.split_first_chunk().context("it ends within a length")?;
    let length = usize::try_from(u32::from_be_bytes(*length)).context("too long")?;
    ensure!(length <= rest.len(), "it ends within an input of {length} bytes");
    Ok(rest.split_at(length))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_packed_is_unpacked_in_order_and_once_and_a_torn_file_is_refused() {
        let dir = std::env::temp_dir().join(format!("malla-{}-kept", std::process::id()));
        let [from, to, packed] = ["from", "to", "packed"].map(|name| dir.join(name));
        fs::create_dir_all(&from).unwrap();
        let all: [&[u8]; 4] = [b"two", b"", b"one", b"two"];
        for (nth, input) in all.iter().enumerate() {
            fs::write(from.join(nth.to_string()), input).unwrap();
        }
        assert_eq!(pack(&from, &packed).unwrap(), (3, 3 * 4 + 6));
        unpack(&packed, &to).unwrap();
        let read = |nth: usize| fs::read(to.join(format!("kept-{nth}"))).unwrap();
        assert_eq!([read(0), read(1), read(2)], [&b""[..], b"one", b"two"]);
        assert!(!to.join("kept-3").exists());

        let whole = fs::read(&packed).unwrap();
        for cut in [whole.len() - 1, 6, 2] {
            fs::write(&packed, &whole[..cut]).unwrap();
            assert!(unpack(&packed, &to).is_err(), "{cut}");
        }
        unpack(&dir.join("none"), &to).unwrap();

        fs::write(to.join("found"), b"by itself").unwrap();
        for input in ["0", "1", "3"] {
            fs::remove_file(from.join(input)).unwrap();
        }
        assert_eq!(pack(&from, &packed).unwrap(), (1, 4 + 3));
        unpack(&packed, &to).unwrap();
        assert_eq!(files(&to).unwrap().len(), 2, "the one that is kept, and what was found");
        fs::remove_file(from.join("2")).unwrap();
        assert!(pack(&from, &packed).is_err(), "nothing would be left");
        fs::remove_dir_all(&dir).unwrap();
    }
}
