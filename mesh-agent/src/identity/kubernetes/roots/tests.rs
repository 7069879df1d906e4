//! Secret and ConfigMap, with one signer and with several.

use kube::Client;
use serde_json::Value;

use super::*;
use crate::identity::kubernetes::published::RETIREMENT;
use crate::identity::kubernetes::testing::{SECRET as AT, Server, new_root};
use crate::identity::testing::cluster_local;

const SPREAD: Duration = Duration::from_secs(180);
const MINUTE: Duration = Duration::from_secs(60);
const MAP: &str = "/api/v1/namespaces/malla-system/configmaps/malla-trust";

/// Those of a signer.
fn roots_of(client: &Client) -> Roots {
    Roots::new(Api::new(client.clone()), "malla-system".into(), cluster_local(), SPREAD)
}

/// The first look of another term.
async fn lead_again(roots: &mut Roots, now: SystemTime) -> Result<Standing, CaError> {
    roots.begin_term();
    roots.look(now).await
}

fn fingerprint(standing: &Standing) -> String {
    standing.authority.root().fingerprint.clone()
}

/// What is written beside the roots.
fn annotated(server: &Server) -> Vec<Published> {
    let map = server.get(MAP);
    serde_json::from_str(map["metadata"]["annotations"][SINCE].as_str().unwrap()).unwrap()
}

fn bundle(server: &Server) -> String {
    server.get(MAP)["data"][BUNDLE].as_str().unwrap().to_owned()
}

/// The Secret also lists these as trusted.
fn listing(mut secret: Value, roots: &str) -> Value {
    secret["data"][ROOTS] = json!(ByteString(roots.as_bytes().to_vec()));
    secret
}

/// Two signers: the first one has seen the first root, and the second one has replaced it by another.
/// Also returns when that is done, and the fingerprint of the root that signs then.
async fn replaced() -> (Server, Roots, Roots, SystemTime, String) {
    let (server, client) = Server::start().await;
    let (mut one, mut other) = (roots_of(&client), roots_of(&client));
    let begin = SystemTime::now();
    server.put(AT, new_root().1);
    let first = fingerprint(&one.look(begin).await.unwrap());
    server.put(AT, new_root().1);
    assert_eq!(other.look(begin).await.unwrap_err().reason(), "not_spread");
    let now = begin + SPREAD;
    let second = other.look(now).await.unwrap();
    let signs = fingerprint(&second);
    assert!(!second.waits && signs != first);
    (server, one, other, now, signs)
}

/// A signer with one root, which signs, and when that was.
async fn started() -> (Server, Client, Roots, SystemTime) {
    let (server, client) = Server::start().await;
    let mut roots = roots_of(&client);
    let begin = SystemTime::now();
    server.put(AT, new_root().1);
    roots.look(begin).await.unwrap();
    (server, client, roots, begin)
}

/// What agents trust, and what is written beside it.
fn state(server: &Server) -> (String, Vec<Published>) {
    (bundle(server), annotated(server))
}

/// Somebody else writes another text into the bundle.
fn edit(server: &Server, text: &str) {
    let mut map = server.get(MAP);
    map["data"][BUNDLE] = json!(text);
    server.put(MAP, map);
}

#[tokio::test]
async fn signer_that_leads_again_lets_a_root_retire_that_another_one_has_replaced() {
    let (server, mut one, _, now, second) = replaced().await;
    let published = server.get(MAP);
    let again = lead_again(&mut one, now + MINUTE).await.unwrap();
    assert_eq!(again.authority.root().fingerprint, second);
    assert_eq!(server.get(MAP), published, "for no longer than before");
}

#[tokio::test]
async fn root_that_nobody_trusts_any_more_signs_for_no_signer_that_leads_again() {
    let (server, mut one, mut other, now, second) = replaced().await;
    let later = now + RETIREMENT + Duration::from_secs(1);
    other.look(later).await.unwrap();
    server.put(AT, new_root().1);
    assert_eq!(lead_again(&mut one, later).await.unwrap_err().reason(), "not_spread");
    let standing = lead_again(&mut other, later).await.unwrap();
    assert!(standing.waits && standing.authority.root().fingerprint == second);
}

/// It is trusted for what it has signed, for another day.
#[tokio::test]
async fn root_that_retires_signs_no_more_when_the_secret_is_replaced_again() {
    let (server, mut one, _, now, second) = replaced().await;
    let retires = |root: &Published| root.fingerprint != second && root.until.is_some();
    let before = annotated(&server).into_iter().find(retires).unwrap();
    server.put(AT, new_root().1);
    assert_eq!(lead_again(&mut one, now + MINUTE).await.unwrap_err().reason(), "not_spread");
    assert!(annotated(&server).contains(&before), "{:?}", annotated(&server));
    let third = one.look(now + MINUTE + SPREAD).await.unwrap();
    assert!(!third.waits && fingerprint(&third) != second);
}

/// As where all roots stay listed in `ca.crt`.
#[tokio::test]
async fn root_that_is_trusted_without_an_end_signs_no_more_when_it_has_a_successor() {
    let (server, client) = Server::start().await;
    let (mut one, mut other) = (roots_of(&client), roots_of(&client));
    let begin = SystemTime::now();
    let ((first, secret), (second, next)) = (new_root(), new_root());
    let both = first.clone() + &second;
    server.put(AT, listing(secret, &both));
    one.look(begin).await.unwrap();
    server.put(AT, listing(next, &both));
    let now = begin + SPREAD;
    assert!(!other.look(now).await.unwrap().waits);
    server.put(AT, listing(new_root().1, &both));
    assert_eq!(lead_again(&mut one, now).await.unwrap_err().reason(), "not_spread");
    assert!(lead_again(&mut other, now).await.unwrap().waits);
}

/// Then it is not known what has signed meanwhile.
#[tokio::test]
async fn no_root_signs_on_when_the_config_map_is_lost_between_two_terms() {
    let (server, mut one, _, now, _) = replaced().await;
    server.put(AT, new_root().1);
    server.put(MAP, json!({"metadata": {"name": "malla-trust"}}));
    assert_eq!(lead_again(&mut one, now + MINUTE).await.unwrap_err().reason(), "not_spread");
    assert_eq!(one.look(now + MINUTE).await.unwrap_err().reason(), "not_spread");
}

#[tokio::test]
async fn bundle_that_somebody_changes_is_put_back() {
    let (server, _, mut roots, begin) = started().await;
    let published = state(&server);
    let foreign = new_root().0;
    let both = published.0.clone() + &foreign;
    let mut now = begin;
    for text in [both.as_str(), &foreign, "no certificate", "-----BEGIN CERTIFICATE-----"] {
        edit(&server, text);
        now += MINUTE;
        assert!(!roots.look(now).await.unwrap().waits, "{text}");
        assert_eq!(state(&server), published, "{text}");
    }
    let mut map = server.get(MAP);
    map["metadata"]["annotations"][SINCE] = json!("[]");
    server.put(MAP, map);
    roots.look(now + MINUTE).await.unwrap();
    assert_eq!(state(&server), published);
}

#[tokio::test]
async fn bundle_that_was_changed_while_nobody_led_is_put_back_by_who_leads_next() {
    let (server, client, _, begin) = started().await;
    let published = state(&server);
    edit(&server, &(published.0.clone() + &new_root().0));
    roots_of(&client).look(begin).await.unwrap();
    assert_eq!(state(&server), published);
}

/// Rewrites what is written beside each root.
fn rewrite(map: &mut Value, change: fn(&mut Published)) {
    let text = &mut map["metadata"]["annotations"][SINCE];
    let mut roots: Vec<Published> = serde_json::from_str(text.as_str().unwrap()).unwrap();
    roots.iter_mut().for_each(change);
    *text = json!(serde_json::to_string(&roots).unwrap());
}

#[tokio::test]
async fn root_that_retires_signs_no_more_whatever_somebody_writes_into_the_config_map() {
    let edits: [fn(&mut Value); 7] = [
        |map| rewrite(map, |root| root.signs = true),
        |map| rewrite(map, |root| root.signs = root.since.is_none()),
        |map| rewrite(map, |root| (root.signs, root.until) = (false, None)),
        |map| map["metadata"]["annotations"] = json!({}),
        |map| map["metadata"]["annotations"][SINCE] = json!("[]"),
        |map| map["metadata"]["annotations"][SINCE] = json!("yesterday"),
        |map| *map = json!({"metadata": {"name": "malla-trust"}}),
    ];
    for (nth, edit) in edits.into_iter().enumerate() {
        // The first one could still sign: it has the key of the root that retires.
        let (server, mut one, _, now, _) = replaced().await;
        server.put(AT, new_root().1);
        let now = now + MINUTE;
        assert_eq!(lead_again(&mut one, now).await.unwrap_err().reason(), "not_spread");
        let published = state(&server);
        let mut map = server.get(MAP);
        edit(&mut map);
        server.put(MAP, map);
        assert_eq!(one.look(now + MINUTE).await.unwrap_err().reason(), "not_spread", "{nth}");
        assert_eq!(state(&server), published, "{nth}");
    }
}

/// The annotation beside it says still what has signed last.
#[tokio::test]
async fn what_signs_alone_signs_on_when_the_bundle_is_emptied_between_two_terms() {
    let (server, mut one, mut other, now, second) = replaced().await;
    let published = bundle(&server);
    server.put(AT, new_root().1);
    edit(&server, "");
    let standing = lead_again(&mut other, now + MINUTE).await.unwrap();
    assert!(standing.waits && fingerprint(&standing) == second);
    let (whole, end) = (bundle(&server), "-----END CERTIFICATE-----\n");
    assert!(published.split_inclusive(end).all(|root| whole.contains(root)), "{whole}");
    edit(&server, "");
    assert_eq!(lead_again(&mut one, now + MINUTE).await.unwrap_err().reason(), "not_spread");
}

#[tokio::test]
async fn publication_whose_answer_is_lost_is_no_change_of_somebody_else() {
    let (server, _, mut roots, begin) = started().await;
    server.put(AT, new_root().1);
    server.lose_answers(true);
    assert_eq!(roots.look(begin).await.unwrap_err().reason(), "api");
    server.lose_answers(false);
    let written = state(&server);
    assert!(roots.look(begin + MINUTE).await.unwrap().waits);
    assert_eq!(roots.put_back, None, "nobody is warned");
    assert_eq!(state(&server), written);
    assert!(!roots.look(begin + SPREAD).await.unwrap().waits, "it has spread since it was written");
}

#[tokio::test]
async fn change_of_what_was_published_without_an_answer_is_put_back() {
    let (server, _, mut roots, begin) = started().await;
    server.put(AT, new_root().1);
    server.lose_answers(true);
    roots.look(begin).await.unwrap_err();
    server.lose_answers(false);
    let written = bundle(&server);
    edit(&server, &(written.clone() + &new_root().0));
    assert!(roots.look(begin + MINUTE).await.unwrap().waits);
    assert_eq!(roots.put_back, Some(begin + MINUTE));
    assert_eq!(bundle(&server), written);
}

/// As by a tool that applies its own state for ever.
#[tokio::test]
async fn bundle_that_is_changed_again_and_again_is_put_back_once_a_minute() {
    let (server, _, mut roots, begin) = started().await;
    let published = bundle(&server);
    let changed = published.clone() + &new_root().0;
    for (after_s, expected) in [(5, &published), (10, &changed), (50, &changed), (60, &published)] {
        edit(&server, &changed);
        roots.look(begin + Duration::from_secs(after_s)).await.unwrap();
        assert_eq!(bundle(&server), *expected, "{after_s}");
    }
}

/// Who has read the bundle meanwhile does not have it.
#[tokio::test]
async fn root_that_is_taken_out_while_it_spreads_is_counted_anew() {
    let (server, _, mut roots, begin) = started().await;
    let before = bundle(&server);
    server.put(AT, new_root().1);
    assert!(roots.look(begin).await.unwrap().waits);
    let both = bundle(&server);
    edit(&server, &before);
    let out = begin + SPREAD - MINUTE;
    assert!(roots.look(out).await.unwrap().waits);
    assert_eq!(bundle(&server), both);
    assert!(roots.look(begin + SPREAD).await.unwrap().waits);
    assert!(!roots.look(out + SPREAD).await.unwrap().waits);
}

/// What is listed in the Secret is the operator's.
#[tokio::test]
async fn root_that_is_listed_in_the_secret_is_published_and_leaves_when_it_is_listed_no_more() {
    let (server, client) = Server::start().await;
    let mut roots = roots_of(&client);
    let begin = SystemTime::now();
    let (foreign, (own, secret)) = (new_root().0, new_root());
    server.put(AT, listing(secret.clone(), &(own.clone() + &foreign)));
    roots.look(begin).await.unwrap();
    assert!(bundle(&server).contains(foreign.trim()));
    server.put(AT, listing(secret, &own));
    roots.look(begin).await.unwrap();
    roots.look(begin + RETIREMENT).await.unwrap();
    assert!(bundle(&server).contains(own.trim()) && !bundle(&server).contains(foreign.trim()));
}
