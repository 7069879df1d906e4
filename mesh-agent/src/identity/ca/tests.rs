//! A root made in a directory, and what is issued from it.

use std::os::unix::fs::PermissionsExt as _;

use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::*;
use crate::dirwatch::testing::TempDir;
use crate::identity::testing::{cluster_local, id};

#[test]
fn init_makes_a_root_that_show_and_open_understand() {
    let dir = TempDir::new();
    let made = init(dir.path(), &cluster_local(), SystemTime::now()).unwrap();
    assert_eq!(made, show(dir.path()).unwrap());
    assert_eq!(made.trust_domain, cluster_local());
    assert_eq!(made.bundle, std::slice::from_ref(&made.root));
    let days = made.root.not_after.duration_since(SystemTime::now()).unwrap().as_secs() / 86400;
    assert!((3648..=3650).contains(&days), "{days}");
    let mode = fs::metadata(dir.path().join(ROOT_KEY)).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    assert_eq!(DirectoryCa::open(dir.path()).unwrap().trust_domain(), &cluster_local());
}

#[test]
fn init_overwrites_nothing() {
    let dir = TempDir::new();
    init(dir.path(), &cluster_local(), SystemTime::now()).unwrap();
    let before = fs::read(dir.path().join(ROOT_KEY)).unwrap();
    let again = init(dir.path(), &cluster_local(), SystemTime::now()).unwrap_err();
    assert_eq!(again.reason(), "exists", "{again}");
    assert_eq!(fs::read(dir.path().join(ROOT_KEY)).unwrap(), before);
}

#[test]
fn certificate_is_an_svid() {
    let dir = TempDir::new();
    let now = SystemTime::now();
    init(dir.path(), &cluster_local(), now).unwrap();
    let ca = DirectoryCa::open(dir.path()).unwrap();
    let issued = ca.issue(&id("web"), Duration::from_secs(5), now).unwrap();
    issued.certified().unwrap();

    let (_, cert) = X509Certificate::from_der(&issued.chain[0]).unwrap();
    assert!(!cert.is_ca());
    let san = cert.subject_alternative_name().unwrap().unwrap();
    assert!(san.critical);
    assert_eq!(
        format!("{:?}", san.value.general_names),
        format!("[URI({:?})]", id("web").to_string())
    );
    let usage = cert.key_usage().unwrap().unwrap();
    assert!(usage.critical && usage.value.digital_signature() && usage.value.flags == 1);
    let purposes = cert.extended_key_usage().unwrap().unwrap().value;
    assert!(purposes.server_auth && purposes.client_auth);
    let seconds = |at: SystemTime| {
        i64::try_from(at.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs()).unwrap()
    };
    assert_eq!(cert.validity().not_after.timestamp(), seconds(now) + 5);
    assert_eq!(cert.validity().not_before.timestamp(), seconds(now) - 120);
    assert_eq!(cert.raw_serial_as_string().replace(':', ""), issued.serial);
}

#[test]
fn certificate_does_not_outlive_its_root() {
    let dir = TempDir::new();
    let now = SystemTime::now();
    let view = init(dir.path(), &cluster_local(), now).unwrap();
    let ca = DirectoryCa::open(dir.path()).unwrap();
    let late = view.root.not_after - Duration::from_secs(60);
    let issued = ca.issue(&id("web"), Duration::from_secs(86_400), late).unwrap();
    assert_eq!(issued.not_after, view.root.not_after);
    let gone = ca.issue(&id("web"), Duration::from_secs(60), view.root.not_after).unwrap_err();
    assert_eq!(gone.reason(), "root_not_valid");
}

#[test]
fn key_of_another_root_is_refused() {
    let (one, two) = (TempDir::new(), TempDir::new());
    init(one.path(), &cluster_local(), SystemTime::now()).unwrap();
    init(two.path(), &cluster_local(), SystemTime::now()).unwrap();
    fs::copy(two.path().join(ROOT_KEY), one.path().join(ROOT_KEY)).unwrap();
    assert_eq!(DirectoryCa::open(one.path()).unwrap_err().reason(), "root_key");
}

#[test]
fn identity_of_another_trust_domain_is_not_issued() {
    let dir = TempDir::new();
    init(dir.path(), &cluster_local(), SystemTime::now()).unwrap();
    let ca = DirectoryCa::open(dir.path()).unwrap();
    let foreign = SpiffeId::parse("spiffe://elsewhere/ns/a/sa/b").unwrap();
    let refused = ca.issue(&foreign, Duration::from_secs(5), SystemTime::now()).unwrap_err();
    assert_eq!(refused.reason(), "foreign_trust_domain", "{refused}");
}

#[test]
fn key_does_not_reach_a_log() {
    let dir = TempDir::new();
    init(dir.path(), &cluster_local(), SystemTime::now()).unwrap();
    let ca = DirectoryCa::open(dir.path()).unwrap();
    let issued = ca.issue(&id("web"), Duration::from_secs(5), SystemTime::now()).unwrap();
    let shown = format!("{issued:?}");
    assert!(shown.contains(&issued.serial) && !shown.contains("key"), "{shown}");
}
