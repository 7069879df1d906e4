//! Certificates as text, and whether openssl believes them.

use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::{env, fs};

use anyhow::{Context as _, Result};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;

/// A directory, removed with what is in it when dropped.
struct Dir(PathBuf);

impl Drop for Dir {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).ok();
    }
}

/// What the API has PEM in: RFC 4648 section 4.
pub fn base64(text: &str) -> String {
    BASE64_STANDARD.encode(text)
}

/// The same backwards, if that is text.
pub fn unbase64(text: &str) -> Option<String> {
    String::from_utf8(BASE64_STANDARD.decode(text).ok()?).ok()
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
