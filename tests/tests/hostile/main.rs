//! Tunnel and authorize against a peer that is not an agent of the mesh, or lies.

mod peer;

use std::io::Write as _;

use anyhow::{Context as _, Result, ensure};
use harness::{Carrier, Mesh, Serve, exchange, init_ca, wait};
use peer::{
    Authority, Impostor, Shown, VALID, call, call_early, garble, open, self_signed, server_name,
};

/// Frames that no client may send at the start of a flow: DATA, ANSWER, a reserved type, and a type
/// that nobody knows, of an impossible length.
const BROKEN: [&[u8]; 4] = [
    b"\x03\x00\x00\x04oops",
    b"\x02\x00\x00\x04\x00\x00\x00\x01",
    b"\x10\x00\x00\x01\x00",
    b"\xff\xff\xff\xff\xff\xff\xff\xff",
];

/// Certificates that prove nothing, each with the reason by which it is refused. `identity` is whom
/// the certificate names.
fn forged(mesh: &Mesh, identity: &str) -> Result<Vec<(&'static str, Shown)>> {
    let authority = Authority::of(mesh.ca_dir())?;
    let elsewhere = mesh.state_dir().join("other-ca");
    if !elsewhere.exists() {
        init_ca(&elsewhere, "cluster.local")?;
    }
    let other_root = Authority::of(&elsewhere)?;
    let other_domain = identity.replace("cluster.local", "elsewhere.example");
    Ok(vec![
        ("certificate_expired", authority.issue(identity, (-2, -1))?),
        ("certificate_not_yet_valid", authority.issue(identity, (1, 2))?),
        ("untrusted_domain", authority.issue(&other_domain, VALID)?),
        ("unknown_issuer", self_signed(identity)?),
        ("unknown_issuer", other_root.issue(identity, VALID)?),
    ])
}

fn refusals(mesh: &Mesh, node: &str, side: &str, reason: &str) -> Result<f64> {
    let labels = [("side", side), ("reason", reason)];
    mesh.agent(node).metric("mesh_tunnel_refusals_total", &labels)
}

#[test]
fn caller_who_proves_nothing_is_refused_and_counted() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes()?;
    let server = mesh.pod("b1").serve(8080, Serve::Greet("never"))?;
    let (a, b) = (mesh.node("a"), mesh.node("b"));
    let name = server_name(&mesh.pod("b1").identity());
    let said = open(mesh.pod("b1").v4(8080), mesh.pod("a1").v4(40_000));
    let mut forged = forged(&mesh, &mesh.pod("a1").identity())?;
    forged.push(("certificate_missing", None));
    for (reason, shown) in forged {
        for carrier in Carrier::BOTH {
            let before = refusals(&mesh, "b", "server", reason)?;
            let answer = call(carrier, a, b, &name, &shown, &said);
            ensure!(answer.is_err(), "{reason} on {carrier:?}: answered {answer:?}");
            let labels = [("side", "server"), ("reason", reason)];
            let agent = mesh.agent("b");
            agent.wait_for_metric("mesh_tunnel_refusals_total", &labels, before + 1.0)?;
        }
        let log = mesh.agent("b").log();
        let told = log.lines().any(|line| line.contains("peer refused") && line.contains(reason));
        ensure!(told, "{reason} is not in the log:\n{log}");
    }
    assert!(server.clients().is_empty(), "the application must not hear of it");
    Ok(())
}

fn server_is_refused(carrier: Carrier) -> Result<()> {
    let mut mesh = Mesh::two_nodes_builder().carrier(carrier).start()?;
    mesh.agent_mut("b").kill()?;
    let mut forged = forged(&mesh, &mesh.pod("b1").identity())?;
    let another = Authority::of(mesh.ca_dir())?.issue(&mesh.pod("b2").identity(), VALID)?;
    forged.push(("wrong_workload", another));
    for (reason, shown) in forged {
        let before = refusals(&mesh, "a", "client", reason)?;
        let _impostor = Impostor::new(mesh.node("b"), &shown)?;
        // The last refusal may still hold the next attempt back.
        wait::until(wait::SOON, "the certificate to be refused", || {
            mesh.pod("a1").refused(mesh.pod("b1").v4(8080)).is_ok()
                && refusals(&mesh, "a", "client", reason).is_ok_and(|now| now > before)
        })?;
        let record = mesh.agent("a").wait_for_record(&[("stage", "tunnel"), ("reason", reason)])?;
        ensure!(
            record.text("error").contains("certificate") || reason == "wrong_workload",
            "{record:?}"
        );
    }
    Ok(())
}

#[test]
fn server_that_proves_nothing_is_refused_on_lanes() -> Result<()> {
    harness::require!();
    server_is_refused(Carrier::Lane)
}

#[test]
fn server_that_proves_nothing_is_refused_on_quic() -> Result<()> {
    harness::require!();
    server_is_refused(Carrier::Quic)
}

/// A peer that never answers hears the payload all the same: it is not waited for.
#[test]
fn payload_leaves_before_the_answer() -> Result<()> {
    harness::require!();
    const PAYLOAD: &[u8] = b"no round trip before this";
    for carrier in Carrier::BOTH {
        let mut mesh = Mesh::two_nodes_builder().carrier(carrier).start()?;
        mesh.agent_mut("b").kill()?;
        let shown = Authority::of(mesh.ca_dir())?.issue(&mesh.pod("b1").identity(), VALID)?;
        let peer = Impostor::new(mesh.node("b"), &shown)?;
        let (from, to) = (mesh.pod("a1"), mesh.pod("b1").v4(8080));
        let mut stream = from.connect(to)?;
        stream.write_all(PAYLOAD)?;
        wait::until(wait::SOON, "the payload", || peer.heard().ends_with(PAYLOAD))?;
        let heard = peer.heard();
        let mut expected = open(to, stream.local_addr()?);
        // Flow and trace id are the agent's to choose.
        expected[6..30].copy_from_slice(&heard[6..30]);
        if carrier == Carrier::Lane {
            expected.extend([3, 0, 0, u8::try_from(PAYLOAD.len())?]);
        }
        expected.extend(PAYLOAD);
        assert_eq!(heard, expected, "{carrier:?}");
    }
    Ok(())
}

#[test]
fn proven_caller_reaches_only_whom_it_asked_for() -> Result<()> {
    harness::require!();
    const TUNNEL: u8 = 5;
    const AUTHORIZE: u8 = 6;
    let mesh = Mesh::two_nodes()?;
    let b1 = mesh.pod("b1").serve(8080, Serve::Greet("b1"))?;
    let b2 = mesh.pod("b2").serve(8080, Serve::Greet("b2"))?;
    let (a, b) = (mesh.node("a"), mesh.node("b"));
    let shown = Authority::of(mesh.ca_dir())?.issue(&mesh.pod("a1").identity(), VALID)?;
    let source = mesh.pod("a1").v4(40_000);
    let asked = |carrier, pod: &str, said: &[u8]| {
        call(carrier, a, b, &server_name(&mesh.pod(pod).identity()), &shown, said)
    };
    let mut version = open(mesh.pod("b1").v4(8080), source);
    version[4] = 99;
    let mut flag = open(mesh.pod("b1").v4(8080), source);
    flag[5] = 1;
    for carrier in Carrier::BOTH {
        for (said, answer) in [
            (open(mesh.pod("b2").v4(8080), source), [1, AUTHORIZE, 7, 1]), // wrong_workload
            (open(mesh.pod("a2").v4(8080), source), [1, AUTHORIZE, 6, 1]), // unknown_workload
            (version.clone(), [1, TUNNEL, 2, 1]),
            (flag.clone(), [1, TUNNEL, 2, 1]),
        ] {
            let answered = asked(carrier, "b1", &said).with_context(|| format!("{carrier:?}"))?;
            assert_eq!(answered[..4], [2, 0, 0, 4]);
            assert_eq!(answered[4..], answer, "{carrier:?}: {said:?}");
        }
        // A workload of another node is not served here, whatever is proven.
        let before = refusals(&mesh, "b", "server", "unknown_workload")?;
        let elsewhere = asked(carrier, "a2", &open(mesh.pod("a2").v4(8080), source));
        ensure!(elsewhere.is_err(), "{carrier:?}: answered {elsewhere:?}");
        let labels = [("side", "server"), ("reason", "unknown_workload")];
        mesh.agent("b").wait_for_metric("mesh_tunnel_refusals_total", &labels, before + 1.0)?;
    }
    let refused = [("stage", "authorize"), ("reason", "wrong_workload")];
    let record = mesh.agent("b").wait_for_record(&refused)?;
    assert_eq!(record.text("dst.workload"), "b2", "whose address it is");
    assert_eq!(record.text("dst.identity"), "", "which has proven nothing: b1 was served");
    assert!(b1.clients().is_empty() && b2.clients().is_empty());
    Ok(())
}

#[test]
fn claimed_client_address_is_shown_only_if_it_is_the_callers() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes()?;
    let server = mesh.pod("b1").serve(8080, Serve::Greet("hello"))?;
    let shown = Authority::of(mesh.ca_dir())?.issue(&mesh.pod("a1").identity(), VALID)?;
    let name = server_name(&mesh.pod("b1").identity());
    let (own, of_another) = (mesh.pod("a1").v4(40_000), mesh.pod("a2").v4(40_000));
    let mut connections = 0;
    let of_nobody = "192.0.2.1:40000".parse()?;
    for carrier in Carrier::BOTH {
        for (claimed, seen) in [
            (own, mesh.pod("a1").v4_ip()),
            (of_another, mesh.pod("b1").v4_ip()),
            (of_nobody, mesh.pod("b1").v4_ip()),
        ] {
            let said = open(mesh.pod("b1").v4(8080), claimed);
            let answer = call(carrier, mesh.node("a"), mesh.node("b"), &name, &shown, &said)?;
            assert_eq!(answer[4], 0, "{carrier:?}: {claimed} is delivered: {answer:?}");
            // An answer says that the kernel has connected, not that the application has accepted.
            let came = || server.clients().get(connections).copied();
            let client = wait::until_some(wait::SOON, "the application to be called", came)?;
            assert_eq!(client.ip(), seen, "{carrier:?}: {claimed}");
            connections += 1;
        }
    }
    Ok(())
}

/// Early data may be replayed by whoever has seen it: a connection must never begin with it.
#[test]
fn what_is_said_before_the_handshake_does_not_count() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes()?;
    let server = mesh.pod("b1").serve(8080, Serve::Greet("hello"))?;
    let shown = Authority::of(mesh.ca_dir())?.issue(&mesh.pod("a1").identity(), VALID)?;
    let name = server_name(&mesh.pod("b1").identity());
    let said = open(mesh.pod("b1").v4(8080), mesh.pod("a1").v4(40_000));
    let mut called = 0;
    let early = call_early(mesh.node("a"), mesh.node("b"), &name, &shown, &said, || {
        called = server.clients().len();
    })?;
    ensure!(early.is_resumed, "otherwise this shows nothing: {early:?}");
    ensure!(!early.is_accepted, "{early:?}");
    assert_eq!(early.answer[4], 0, "what is said in time is delivered");
    wait::until(wait::SOON, "both calls to arrive", || server.clients().len() >= 2)?;
    assert_eq!(server.clients().len(), 2, "{called} of them before the words were said again");
    Ok(())
}

#[test]
fn peer_that_talks_nonsense_disturbs_nobody() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes()?;
    let _server = mesh.pod("b1").serve(8080, Serve::Echo)?;
    let (a, b) = (mesh.node("a"), mesh.node("b"));
    let mut held = mesh.pod("a1").connect(mesh.service("b").v4(80))?;
    for said in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0; 1400], &[0xff; 1400]] {
        garble(a, b, said)?;
    }
    let labels = [("side", "server"), ("reason", "tls")];
    mesh.agent("b").wait_for_metric("mesh_tunnel_refusals_total", &labels, 3.0)?;

    let shown = Authority::of(mesh.ca_dir())?.issue(&mesh.pod("a1").identity(), VALID)?;
    let name = server_name(&mesh.pod("b1").identity());
    for (done, carrier) in [0.0, 1.0].into_iter().zip(Carrier::BOTH) {
        for said in BROKEN {
            let answer = call(carrier, a, b, &name, &shown, said);
            ensure!(answer.is_err(), "{carrier:?}: {said:?} was answered {answer:?}");
        }
        let labels = [("side", "server"), ("reason", "protocol")];
        let agent = mesh.agent("b");
        agent.wait_for_metric("mesh_tunnel_refusals_total", &labels, (done + 1.0) * 4.0)?;
        ensure!(agent.log().contains("reason=\"protocol\""), "nobody is told:\n{}", agent.log());
    }
    exchange(&mut held, b"still there")?;
    exchange(&mut mesh.pod("a1").connect(mesh.service("b").v4(80))?, b"and for others")
}
