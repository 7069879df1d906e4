//! What the terminal shows, and whether it is what the demo promised.

use std::env;
use std::fmt::Write as _;
use std::path::PathBuf;

use anyhow::Result;

use crate::load::{CLIENTS, Load};
use crate::shop::{CLIENT, NODES, Shop, beside};
use crate::story::Story;
use crate::text::{amount, bytes, heading, table};
use crate::wire::Seen;

/// One of the two halves of the demo.
#[derive(Debug)]
pub(crate) struct Act {
    /// What people saw.
    pub(crate) load: Load,
    /// What somebody on the link between the nodes saw.
    pub(crate) seen: Seen,
}

/// Who is where.
pub(crate) fn stage(shop: &Shop) -> String {
    let rows = NODES.iter().map(|name| {
        let node = shop.mesh().node(name);
        let agent = shop.mesh().agent(name).pid();
        let pods = shop.pods_of(name).join(", ");
        vec![(*name).to_owned(), node.v4().to_string(), format!("pid {agent}"), pods]
    });
    let nodes = table(&["NODE", "ADDRESS", "AGENT", "PODS"], rows);
    format!("{}{nodes}\n", heading("Two nodes, one link, one agent each"))
}

/// Everything that was found.
///
/// # Errors
///
/// Fails when an agent does not answer.
pub(crate) fn outcome(
    shop: &Shop,
    story: &Story,
    plain: &Act,
    meshed: &Act,
    marker: &str,
) -> Result<String> {
    let mut text = heading("Who talked to whom (from the agents' access logs)");
    text.push_str(&story.traffic());
    text.push_str(&heading("As whom (across nodes proven by certificate, both ways)"));
    text.push_str(&story.identities());
    text.push_str(&heading("What the agents count (their /metrics)"));
    text.push_str(&counters(shop)?);

    let people = format!("How long people waited (GET /productpage, {CLIENTS} people, ms)");
    text.push_str(&heading(&people));
    let rows = [("without", plain), ("with", meshed)].map(|(name, act)| waited(name, &act.load));
    let head = ["MESH", ">PAGES", ">FAILED", ">P50", ">P90", ">P99", ">MAX", "REVIEWS SHOWN"];
    text.push_str(&table(&head, rows.into_iter()));

    let link = format!("What the link between the nodes shows (tcpdump -i {})", shop.link());
    text.push_str(&heading(&link));
    let rows = [("without", plain), ("with", meshed)].map(|(name, act)| {
        let Seen { packets, bytes: count, marked } = act.seen;
        vec![name.to_owned(), amount(packets), bytes(count), amount(marked)]
    });
    let head = ["MESH", ">PACKETS", ">BYTES", ">PACKETS WITH THE MARKER IN CLEAR"];
    text.push_str(&table(&head, rows.into_iter()));
    let _always_ok =
        writeln!(text, "  The marker is {marker}, in the URL and the request id of every page.");
    Ok(text)
}

fn waited(name: &str, load: &Load) -> Vec<String> {
    let versions: Vec<_> =
        load.versions.iter().map(|(version, count)| format!("{version} {count}")).collect();
    let mut row = vec![name.to_owned(), amount(load.pages as u64), amount(load.failed as u64)];
    row.extend([50, 90, 99, 100].map(|percent| format!("{:.1}", load.percentile_ms(percent))));
    row.push(versions.join(", "));
    row
}

/// The Istio-standard counters of both agents, by who reports.
fn counters(shop: &Shop) -> Result<String> {
    let mut rows = Vec::new();
    for name in NODES {
        let metrics = shop.mesh().agent(name).metrics()?;
        for reporter in ["source", "destination"] {
            let mutual = ("connection_security_policy", "mutual_tls");
            let sum = |family: &str| figure(metrics.sum(family, &[("reporter", reporter)]));
            let secured = metrics
                .sum("istio_tcp_connections_opened_total", &[("reporter", reporter), mutual]);
            rows.push(vec![
                name.to_owned(),
                reporter.to_owned(),
                amount(sum("istio_tcp_connections_opened_total")),
                amount(figure(secured)),
                bytes(sum("istio_tcp_sent_bytes_total")),
                bytes(sum("istio_tcp_received_bytes_total")),
            ]);
        }
    }
    let head = ["NODE", "REPORTER", ">CONNECTIONS", ">BY MUTUAL TLS", ">SENT", ">RECEIVED"];
    Ok(table(&head, rows.into_iter()))
}

/// A counter's value, which is a whole number that is not negative.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "see above")]
fn figure(value: f64) -> u64 {
    value as u64
}

/// What the demo promises, and whether it came true.
#[derive(Debug)]
pub(crate) struct Promise {
    text: String,
    /// Why not.
    broken: Option<String>,
}

/// Every promise, checked.
pub(crate) fn promises(story: &Story, plain: &Act, meshed: &Act) -> Vec<Promise> {
    let promise = |text: &str, holds: bool, else_why: String| Promise {
        text: text.to_owned(),
        broken: (!holds).then_some(else_why),
    };
    let served = |act: &Act| {
        let why = act.load.reason.clone().unwrap_or_else(|| "no page came".to_owned());
        (act.load.pages > 0 && act.load.failed == 0, why)
    };
    let ((plain_served, plain_why), (meshed_served, meshed_why)) = (served(plain), served(meshed));
    let (connections, failed) = story.connections();
    vec![
        promise("every page was served without the mesh", plain_served, plain_why),
        promise("every page was served with the mesh", meshed_served, meshed_why),
        promise(
            "no connection that an agent carried failed",
            failed == 0,
            format!("{failed} of {connections} did"),
        ),
        promise(
            "connections between the nodes had both identities proven",
            story.tunnelled() > 0,
            "there was none of that kind".to_owned(),
        ),
        promise(
            "without the mesh the tap can read the requests",
            plain.seen.marked > 0,
            format!("no marker in {} packets", plain.seen.packets),
        ),
        promise(
            "with the mesh the tap sees packets and can read none of them",
            meshed.seen.packets > 0 && meshed.seen.marked == 0,
            format!("{} of {} packets had the marker", meshed.seen.marked, meshed.seen.packets),
        ),
    ]
}

/// The promises, with a mark each.
pub(crate) fn verdict(promises: &[Promise]) -> String {
    promises.iter().fold(heading("What was shown"), |mut text, Promise { text: what, broken }| {
        let _always_ok = match broken {
            None => writeln!(text, "  \u{2714} {what}"),
            Some(why) => writeln!(text, "  \u{2718} {what}: {why}"),
        };
        text
    })
}

/// Whether all of them came true.
pub(crate) fn all_kept(promises: &[Promise]) -> bool {
    promises.iter().all(|promise| promise.broken.is_none())
}

/// Commands to paste.
///
/// # Errors
///
/// Fails when the agent's program is not found.
pub(crate) fn look_further(shop: &Shop) -> Result<String> {
    let program = env::var_os("MALLA_AGENT")
        .map_or_else(|| beside("mesh-agent"), |path| Ok(PathBuf::from(path)))?;
    let program = program.display();
    let mesh = shop.mesh();
    let people = mesh.pod(CLIENT).netns().name();
    let mut text = heading("Look further (from another terminal, as root)");
    let mut command = |what: &str, line: &str| {
        let _always_ok = writeln!(text, "  # {what}\n  {line}");
    };
    let page = shop.page();
    command(
        "the page, as a person sees it",
        &format!("ip netns exec {people} curl -s http://{page}/productpage"),
    );
    command(
        "which version of the reviews answered",
        &format!("ip netns exec {people} curl -s http://{page}/api/v1/products/0/reviews"),
    );
    for name in NODES {
        let agent = mesh.agent(name);
        let socket = agent.admin_socket();
        let socket = socket.display();
        let netns = mesh.node(name).netns().name();
        for (verb, what) in [
            ("connections", "open connections, with the peer's identity"),
            ("tunnels", "tunnels to the other node"),
            ("certs", "certificates"),
        ] {
            command(
                &format!("node {name}: {what}"),
                &format!("{program} {verb} --admin-socket {socket}"),
            );
        }
        command(
            &format!("node {name}: metrics"),
            &format!("ip netns exec {netns} curl -s localhost:15020/metrics | grep ^istio_tcp"),
        );
        command(
            &format!("node {name}: a record for each connection that ended"),
            &format!(
                "tail -f {}",
                mesh.state_dir().join(format!("node-{name}/access.log")).display()
            ),
        );
    }
    let first = mesh.node(NODES[0]).netns().name();
    command(
        "the link between the nodes, as text: nothing of the pages can be read",
        &format!("ip netns exec {first} tcpdump -ni {} -A", shop.link()),
    );
    command(
        "the manifests that the agents follow: edit them and see",
        &format!("ls {}", mesh.manifests().dir().display()),
    );
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn act(pages: usize, failed: usize, packets: u64, marked: u64) -> Act {
        let mut load = Load::default();
        (load.pages, load.failed) = (pages, failed);
        Act { load, seen: Seen { packets, bytes: packets * 100, marked } }
    }

    fn story() -> Story {
        let record = serde_json::json!({
            "scope": "access", "direction": "outbound", "way": "tunnel", "carrier": "lane",
            "src.identity": "spiffe://cluster.local/ns/bookinfo/sa/client",
            "dst.identity": "spiffe://cluster.local/ns/bookinfo/sa/bookinfo-details",
        });
        let mut story = Story::default();
        story.add(&harness::Record::parse(&record.to_string()).unwrap());
        story
    }

    #[test]
    fn a_demo_that_shows_what_it_promised_keeps_all_promises() {
        let promises = promises(&story(), &act(9, 0, 90, 9), &act(9, 0, 90, 0));
        assert!(all_kept(&promises), "{promises:?}");
        assert!(!verdict(&promises).contains('\u{2718}'));
    }

    #[test]
    fn every_promise_is_checked() {
        let broken = |story: &Story, plain, meshed| {
            let promises = promises(story, &plain, &meshed);
            assert!(!all_kept(&promises));
            verdict(&promises).matches('\u{2718}').count()
        };
        let (plain, meshed) = (|| act(9, 0, 90, 9), || act(9, 0, 90, 0));
        assert_eq!(broken(&story(), act(9, 0, 90, 0), meshed()), 1, "unreadable without");
        assert_eq!(broken(&story(), plain(), act(9, 0, 90, 1)), 1, "readable with");
        assert_eq!(broken(&story(), plain(), act(9, 0, 0, 0)), 1, "an empty capture");
        assert_eq!(broken(&story(), act(9, 1, 90, 9), meshed()), 1, "a page failed");
        assert_eq!(broken(&story(), plain(), act(0, 0, 90, 0)), 1, "no page");
        assert_eq!(broken(&Story::default(), plain(), meshed()), 1, "nothing tunnelled");
    }
}
