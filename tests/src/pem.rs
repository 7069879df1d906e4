//! Certificates as text, and whether openssl believes them.

use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::{env, fs};

use anyhow::{Context as _, Result};

/// A directory, removed with what is in it when dropped.
struct Dir(PathBuf);

impl Drop for Dir {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).ok();
    }
}

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/// RFC 4648 section 4.
pub fn base64(bytes: &[u8]) -> String {
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let word = chunk
            .iter()
            .chain([0, 0].iter())
            .take(3)
            .fold(0, |word, byte| word << 8 | usize::from(*byte));
        for at in 0..4 {
            let letter = ALPHABET[word >> (18 - 6 * at) & 63];
            text.push(if at <= chunk.len() { char::from(letter) } else { '=' });
        }
    }
    text
}

/// The same backwards, if that is text.
pub fn unbase64(text: &str) -> Option<String> {
    let mut bytes = Vec::new();
    for chunk in text.trim_end_matches('=').as_bytes().chunks(4) {
        let mut word = 0;
        for letter in chunk {
            let value = ALPHABET.iter().position(|known| known == letter)?;
            word = word << 6 | u32::try_from(value).ok()?;
        }
        word <<= 6 * (4 - chunk.len());
        // Three letters are two bytes, and so on.
        bytes.extend(&word.to_be_bytes()[1..chunk.len()]);
    }
    String::from_utf8(bytes).ok()
}

/// Whether openssl believes a leaf, the first in `chain`, under these roots.
///
/// # Errors
///
/// Fails if openssl cannot be run.
pub fn is_believed(chain: &str, roots: &str) -> Result<bool> {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let nth = NEXT.fetch_add(1, Ordering::Relaxed);
    let dir = env::temp_dir().join(format!("malla-{}-believed-{nth}", std::process::id()));
    fs::create_dir_all(&dir).context("create a directory")?;
    let dir = Dir(dir);
    for (name, text) in [("leaf.pem", chain), ("roots.pem", roots)] {
        fs::write(dir.0.join(name), text).context("write certificates")?;
    }
    let mut verify = Command::new("openssl");
    verify.current_dir(&dir.0).args(["verify", "-purpose", "sslserver", "-CAfile", "roots.pem"]);
    let said = verify.args(["-untrusted", "leaf.pem", "leaf.pem"]).output().context("openssl")?;
    Ok(said.status.success())
}

/// The certificates in a PEM file, each by itself.
pub fn certificates(pem: &str) -> Vec<String> {
    const END: &str = "-----END CERTIFICATE-----\n";
    pem.split_inclusive(END).filter(|cert| cert.ends_with(END)).map(str::to_owned).collect()
}
