//! Certificates issued, renewed and dropped, under a paused clock.

use std::fs;
use std::path::Path;
use std::sync::atomic::AtomicU64;

use tokio::task::JoinHandle;
use tokio::time::{Instant, advance, timeout};

use super::keeper::untrusted;
use super::*;
use crate::dirwatch::testing::TempDir;
use crate::identity::bundle;
use crate::identity::ca::{self, BUNDLE, ROOT_CERT, ROOT_KEY};
use crate::identity::sni_name;
use crate::identity::testing::{cluster_local, id};

const LIFE: Duration = Duration::from_secs(40);

/// Identities that are maintained, in a paused clock.
struct Node {
    dir: TempDir,
    identities: Arc<Identities>,
    begin: (SystemTime, Instant),
    /// Seconds by which the wall clock is wrong.
    wrong_s: Arc<AtomicU64>,
    task: JoinHandle<()>,
}

impl Node {
    fn start() -> Self {
        Self::start_ahead(Duration::ZERO)
    }

    /// With a wall clock that is so far ahead.
    fn start_ahead(ahead: Duration) -> Self {
        let dir = TempDir::new();
        ca::init(dir.path(), &cluster_local(), SystemTime::now()).unwrap();
        let issuer = Issuer::Directory(DirectoryCa::open(dir.path()).unwrap());
        let identities = Arc::new(Identities::new(load(dir.path())));
        let lifetimes = Lifetimes { lifetime: LIFE, ..Lifetimes::default() };
        let begin = (SystemTime::now(), Instant::now());
        let wrong_s = Arc::new(AtomicU64::new(ahead.as_secs()));
        let clock = {
            let wrong_s = Arc::clone(&wrong_s);
            move || now(begin, &wrong_s)
        };
        let task = tokio::spawn(Arc::clone(&identities).maintain(issuer, lifetimes, clock));
        Self { dir, identities, begin, wrong_s, task }
    }

    fn now(&self) -> SystemTime {
        now(self.begin, &self.wrong_s)
    }

    /// Sets the wall clock so far ahead of the right time, and no timer with it.
    fn set_ahead(&self, ahead: Duration) {
        self.wrong_s.store(ahead.as_secs(), Ordering::Relaxed);
    }

    fn want(&self, names: &[&str]) {
        self.identities.wanted(names.iter().map(|name| id(name)).collect());
    }

    fn serial(&self, name: &str) -> Option<String> {
        let views = self.identities.view(self.now());
        views.into_iter().find(|view| view.identity == id(name))?.serial
    }

    /// Waits until `held`, at most for `limit` of the paused clock.
    async fn until(&self, limit: Duration, held: impl Fn(&Self) -> bool) {
        let mut changes = self.identities.changes();
        let wait = async {
            while !held(self) {
                changes.changed().await.unwrap();
            }
        };
        timeout(limit, wait).await.expect("did not come true in time");
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn now(begin: (SystemTime, Instant), wrong_s: &AtomicU64) -> SystemTime {
    begin.0 + begin.1.elapsed() + Duration::from_secs(wrong_s.load(Ordering::Relaxed))
}

fn load(dir: &Path) -> TrustBundles {
    TrustBundles::load(&dir.join(BUNDLE), &cluster_local()).unwrap()
}

#[tokio::test(start_paused = true)]
async fn what_is_wanted_is_issued_and_served_and_nothing_else() {
    let node = Node::start();
    node.want(&["a", "b"]);
    assert!(!node.identities.ready(node.now()));
    assert_eq!(node.identities.view(node.now())[0].state, CertState::Initializing);
    node.until(Duration::from_secs(1), |node| node.identities.ready(node.now())).await;

    let (who, cert) = node.identities.served(&sni_name(&id("a"))).unwrap();
    assert_eq!(who, id("a"));
    assert!(Arc::ptr_eq(&cert, &node.identities.certified(&id("a")).unwrap()));
    assert!(node.identities.certified(&id("c")).is_none());
    assert!(node.identities.served(&sni_name(&id("c"))).is_none());
    let states: Vec<_> = node.identities.view(node.now()).iter().map(|v| v.state).collect();
    assert_eq!(states, [CertState::Available; 2]);
    node.want(&["a", "b", "c"]);
    assert!(node.identities.ready(node.now()), "one more pod has come: nobody has to go elsewhere");
}

#[tokio::test(start_paused = true)]
async fn certificate_is_renewed_at_half_life_and_always_valid() {
    let node = Node::start();
    node.want(&["a"]);
    node.until(LIFE, |node| node.identities.ready(node.now())).await;
    for _ in 0..5 {
        let (serial, since) = (node.serial("a"), Instant::now());
        node.until(LIFE, |node| {
            assert!(node.identities.ready(node.now()));
            node.serial("a") != serial
        })
        .await;
        let share = since.elapsed().as_secs_f64() / LIFE.as_secs_f64();
        assert!((0.42..=0.56).contains(&share), "{share}");
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_no_longer_wanted_lingers_and_goes() {
    let node = Node::start();
    node.want(&["a", "b"]);
    node.until(LIFE, |node| node.identities.ready(node.now())).await;
    node.want(&["a"]);
    sleep(Duration::from_secs(50)).await;
    assert!(node.identities.served(&sni_name(&id("b"))).is_some());
    let gone = |node: &Node| node.identities.served(&sni_name(&id("b"))).is_none();
    node.until(Duration::from_secs(20), gone).await;
    assert!(node.identities.certified(&id("a")).is_some());
}

#[tokio::test(start_paused = true)]
async fn what_is_wanted_again_stays_and_is_renewed() {
    let node = Node::start();
    node.want(&["a"]);
    node.until(LIFE, |node| node.identities.ready(node.now())).await;
    let serial = node.serial("a");
    node.want(&[]);
    sleep(Duration::from_secs(1)).await;
    node.want(&["a"]);
    node.until(LIFE, |node| node.serial("a") != serial).await;
    sleep(Duration::from_secs(120)).await;
    assert!(node.identities.ready(node.now()));
}

#[tokio::test(start_paused = true)]
async fn failed_renewal_keeps_the_certificate_and_is_tried_again() {
    let node = Node::start();
    node.want(&["a"]);
    node.until(LIFE, |node| node.identities.ready(node.now())).await;
    let serial = node.serial("a");
    let (key, away) = (node.dir.path().join(ROOT_KEY), node.dir.path().join("away"));
    fs::rename(&key, &away).unwrap();
    node.until(LIFE, |node| node.identities.view(node.now())[0].error.is_some()).await;
    let view = node.identities.view(node.now()).remove(0);
    assert_eq!((view.state, view.serial), (CertState::Available, serial.clone()));
    let error = view.error.unwrap();
    assert!(error.contains(ROOT_KEY) && error.contains("No such file"), "{error}");

    fs::rename(&away, &key).unwrap();
    node.until(LIFE / 4, |node| node.serial("a") != serial).await;
    assert_eq!(node.identities.view(node.now())[0].error, None);
}

#[tokio::test(start_paused = true)]
async fn certificate_that_was_not_renewed_in_time_is_unavailable() {
    let node = Node::start();
    node.want(&["a"]);
    node.until(LIFE, |node| node.identities.ready(node.now())).await;
    fs::remove_file(node.dir.path().join(ROOT_KEY)).unwrap();
    advance(LIFE).await;
    assert_eq!(node.identities.view(node.now())[0].state, CertState::Unavailable);
    assert!(!node.identities.ready(node.now()));
}

#[tokio::test(start_paused = true)]
async fn what_the_issuer_denies_or_does_not_sign_keeps_no_node_unready() {
    let node = Node::start();
    let now = node.now();
    let issue = |name| {
        let root = DirectoryCa::open(node.dir.path()).unwrap();
        root.issue(&id(name), LIFE, now)
    };
    let ready_of = |wanted: &[&str], answers: Vec<(&str, Result<Issued, CaError>)>| {
        let lifetimes = Lifetimes { lifetime: LIFE, ..Lifetimes::default() };
        let mut keeper = Keeper::new(lifetimes);
        let wanted: HashSet<_> = wanted.iter().copied().map(id).collect();
        keeper.follow(&wanted, now);
        for (name, answer) in answers {
            keeper.issued(&id(name), answer, &load(node.dir.path()), now, 0.5);
        }
        let identities = Identities::new(load(node.dir.path()));
        identities.wanted(wanted);
        identities.held.store(Arc::new(keeper.publish()));
        identities.ready(now)
    };
    let ready_with = |answers| ready_of(&["a", "b"], answers);
    let denied = || Err(CaError::Denied { why: "no such account".into() });
    let silent = || Err(CaError::NotAnswered { name: "csr-1".into(), signer: "x/y".into() });
    assert!(ready_with(vec![("a", issue("a")), ("b", issue("b"))]));
    assert!(ready_with(vec![("a", issue("a")), ("b", denied())]));
    assert!(ready_with(vec![("a", issue("a")), ("b", silent())]));
    assert!(!ready_with(vec![("a", denied()), ("b", denied())]), "nothing is signed");
    assert!(ready_of(&["a"], vec![("a", denied())]), "one account's own affair");
    assert!(!ready_with(vec![("a", silent()), ("b", silent())]), "nothing is signed");
    assert!(!ready_with(vec![("a", denied()), ("b", silent())]), "nothing is signed");
    assert!(!ready_with(vec![("a", issue("a"))]), "b has not been answered yet");
    assert!(!ready_with(vec![("a", denied())]), "b has not been answered yet");
}

/// The whole rotation: trust both, sign with the new one, drop the old one.
#[tokio::test(start_paused = true)]
async fn root_is_rotated_without_a_moment_of_distrust() {
    let node = Node::start();
    node.want(&["a"]);
    node.until(LIFE, |node| node.identities.ready(node.now())).await;
    let new = TempDir::new();
    ca::init(new.path(), &cluster_local(), SystemTime::now()).unwrap();
    let read = |dir: &TempDir, name| fs::read_to_string(dir.path().join(name)).unwrap();
    let trusted = |node: &Node| {
        let cert = node.identities.certified(&id("a")).unwrap();
        untrusted(&node.identities.trust(), &cert.cert, node.now()).is_none()
    };

    // The new root alone in root.pem: nobody would trust it, so the old certificate stays.
    let old = read(&node.dir, BUNDLE);
    for name in [ROOT_CERT, ROOT_KEY] {
        fs::copy(new.path().join(name), node.dir.path().join(name)).unwrap();
    }
    let serial = node.serial("a");
    node.until(LIFE, |node| node.identities.view(node.now())[0].error.is_some()).await;
    assert!(trusted(&node) && node.serial("a") == serial);

    let both = format!("{old}{}", read(&new, BUNDLE));
    fs::write(node.dir.path().join(BUNDLE), both).unwrap();
    node.identities.set_trust(load(node.dir.path()));
    assert_eq!(node.identities.roots().len(), 2);
    node.until(LIFE, |node| node.serial("a") != serial).await;
    assert!(trusted(&node));

    fs::copy(new.path().join(BUNDLE), node.dir.path().join(BUNDLE)).unwrap();
    node.identities.set_trust(load(node.dir.path()));
    assert!(trusted(&node));
}

#[tokio::test(start_paused = true)]
async fn certificate_that_new_roots_do_not_cover_is_replaced_at_once() {
    let node = Node::start();
    node.want(&["a"]);
    node.until(LIFE, |node| node.identities.ready(node.now())).await;
    let serial = node.serial("a");
    let new = TempDir::new();
    ca::init(new.path(), &cluster_local(), SystemTime::now()).unwrap();
    for name in [ROOT_CERT, ROOT_KEY, BUNDLE] {
        fs::copy(new.path().join(name), node.dir.path().join(name)).unwrap();
    }
    node.identities.set_trust(load(node.dir.path()));
    node.until(Duration::from_secs(1), |node| node.serial("a") != serial).await;
}

#[tokio::test]
async fn bundle_file_is_followed_and_a_wrong_one_changes_nothing() {
    let (dir, second) = (TempDir::new(), TempDir::new());
    ca::init(dir.path(), &cluster_local(), SystemTime::now()).unwrap();
    ca::init(second.path(), &cluster_local(), SystemTime::now()).unwrap();
    let path = dir.path().join(BUNDLE);
    let one = fs::read_to_string(&path).unwrap();
    let both = format!("{one}{}", fs::read_to_string(second.path().join(BUNDLE)).unwrap());
    let identities = Arc::new(Identities::new(load(dir.path())));
    let follow = bundle::follow(Arc::clone(&identities), path.clone(), cluster_local());
    let task = tokio::spawn(follow);
    let until = async |held: &dyn Fn() -> bool| {
        let wait = async {
            while !held() {
                sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(Duration::from_secs(5), wait).await.expect("did not come true in time");
    };

    fs::write(dir.path().join("new"), &both).unwrap();
    fs::rename(dir.path().join("new"), &path).unwrap();
    until(&|| identities.roots().len() == 2).await;

    for wrong in ["", "nonsense", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"]
    {
        fs::write(&path, wrong).unwrap();
        until(&|| identities.trust_problem().is_some()).await;
        assert!(identities.trust_problem().unwrap().to_string().contains(BUNDLE));
        assert_eq!(identities.roots().len(), 2);
        fs::write(&path, &both).unwrap();
        until(&|| identities.trust_problem().is_none()).await;
    }

    fs::write(&path, &one).unwrap();
    until(&|| identities.roots().len() == 1).await;
    task.abort();
}

#[test]
fn renewal_is_at_half_life_give_or_take_a_tenth() {
    let issued = SystemTime::UNIX_EPOCH;
    let expires = issued + Duration::from_secs(1000);
    let at = |draw| renew_at(issued, expires, draw).duration_since(issued).unwrap().as_secs();
    assert_eq!((at(0.0), at(0.5), at(1.0)), (450, 500, 550));
    assert_eq!(renew_at(expires, issued, 0.5), expires);
}

#[test]
fn retries_slow_down_and_stay_within_a_life() {
    let day = Duration::from_secs(86_400);
    let after = |failures| retry_after(failures, day, 1.0).as_secs();
    assert_eq!([after(0), after(1), after(5), after(6), after(99)], [1, 2, 32, 60, 60]);
    assert_eq!(retry_after(0, day, 0.0), Duration::from_millis(500));
    assert_eq!(retry_after(9, Duration::from_secs(8), 1.0), Duration::from_secs(1));
}

#[test]
fn identity_that_is_denied_again_and_again_is_asked_for_seldom_until_something_changes() {
    let dir = TempDir::new();
    ca::init(dir.path(), &cluster_local(), SystemTime::now()).unwrap();
    let trust = load(dir.path());
    let (mut keeper, now) = (Keeper::new(Lifetimes::default()), SystemTime::now());
    keeper.follow(&HashSet::from([id("a")]), now);
    let denied = |keeper: &mut Keeper, draw| {
        let denied = CaError::Denied { why: "not_enrolled".into() };
        keeper.issued(&id("a"), Err(denied), &trust, now, draw);
        keeper.next(now).as_secs()
    };
    let waits: Vec<_> = (0..6).map(|_| denied(&mut keeper, 1.0)).collect();
    assert_eq!(waits, [1, 2, 4, 8, 300, 300]);
    assert_eq!(denied(&mut keeper, 0.0), 150);

    let (soon, later) = (now + Duration::from_secs(10), now + Duration::from_secs(100));
    assert!(keeper.due(later).is_empty());
    // Another pod has come.
    keeper.follow(&HashSet::from([id("a"), id("b")]), soon);
    assert_eq!(keeper.due(soon), [id("b")], "it was denied a moment ago");
    assert!(keeper.due(later).contains(&id("a")));
    keeper.asked(&id("b"));
    for _ in 0..5 {
        denied(&mut keeper, 1.0);
    }
    assert!(keeper.due(later).is_empty());
    keeper.renew_untrusted(&trust, later);
    assert_eq!(keeper.due(later), [id("a")]);
}

/// Of a clock that is behind.
#[test]
fn certificate_that_has_yet_to_begin_is_asked_for_again_when_it_does() {
    let dir = TempDir::new();
    let now = SystemTime::now();
    ca::init(dir.path(), &cluster_local(), now - DAY).unwrap();
    let ca = DirectoryCa::open(dir.path()).unwrap();
    let issue = || ca.issue(&id("a"), LIFE, now);
    let behind = now - Duration::from_secs(180);
    let mut keeper = Keeper::new(Lifetimes::default());
    keeper.follow(&HashSet::from([id("a")]), behind);
    keeper.issued(&id("a"), issue(), &load(dir.path()), behind, 0.0);
    let error = keeper.publish().by_id[&id("a")].error.clone().unwrap();
    assert!(error.contains("this node's clock is behind"), "{error}");
    let begins = behind + Duration::from_secs(60);
    assert_eq!(keeper.due(begins - Duration::from_secs(2)), [], "no other one before");
    assert_eq!(keeper.due(begins + Duration::from_secs(1)), [id("a")]);
}

const DAY: Duration = Duration::from_secs(86_400);

/// The clock is looked at, and what is due is made.
const SOON: Duration = LONGEST_WAIT.saturating_add(Duration::from_secs(1));

#[tokio::test(start_paused = true)]
async fn clock_that_jumps_ahead_ends_no_identity_for_long() {
    let node = Node::start();
    node.want(&["a"]);
    node.until(LIFE, |node| node.identities.ready(node.now())).await;
    node.set_ahead(DAY);
    assert!(!node.identities.ready(node.now()), "the old one has expired");
    node.until(SOON, |node| node.identities.ready(node.now())).await;
}

#[tokio::test(start_paused = true)]
async fn clock_that_is_set_back_has_certificates_issued_that_are_valid_now() {
    let node = Node::start_ahead(DAY);
    node.want(&["a"]);
    node.until(LIFE, |node| node.identities.ready(node.now())).await;
    node.set_ahead(Duration::ZERO);
    assert!(!node.identities.ready(node.now()), "the old one is not valid yet");
    node.until(SOON, |node| node.identities.ready(node.now())).await;
    // And not over and over: it is a new one's turn at half its life.
    let serial = node.serial("a");
    advance(LIFE / 4).await;
    assert_eq!(node.serial("a"), serial);
}

#[tokio::test(start_paused = true)]
async fn what_failed_under_a_wrong_clock_is_tried_when_the_clock_is_right() {
    // Long after the root has expired.
    let node = Node::start_ahead(DAY * 365 * 50);
    node.want(&["a"]);
    node.until(LIFE, |node| node.identities.view(node.now())[0].error.is_some()).await;
    node.set_ahead(Duration::ZERO);
    node.until(SOON, |node| node.identities.ready(node.now())).await;
}
