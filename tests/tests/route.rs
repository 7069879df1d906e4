//! Route: services of every shape, and destinations that are not in the mesh.

use std::io::Read as _;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use harness::{Family, Mesh, Pod, PodSpec, Record, Serve, Server, ServiceSpec, exchange, wait};

/// Cluster addresses that no service of the harness has.
const V4: &str = "10.250.0.1";
const V6: &str = "fd4d:616c:6c61:ffff::1";

/// A service without selector at these addresses, one port 80 named `web`.
fn service(name: &str, vips: &[&str]) -> String {
    format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: default}}\n\
         spec:\n  clusterIP: \"{}\"\n  clusterIPs: [\"{}\"]\n  ports: [{{name: web, port: 80, targetPort: http}}]\n",
        vips[0],
        vips.join("\", \"")
    )
}

/// A slice of it that names no pod, as people write them by hand.
fn slice(of: &str, endpoint: SocketAddr) -> String {
    let (ip, port) = (endpoint.ip(), endpoint.port());
    let family = if ip.is_ipv4() { "IPv4" } else { "IPv6" };
    let name = format!("{of}-{}", ip.to_string().replace([':', '.'], "-"));
    format!(
        "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
         metadata:\n  name: {name}\n  namespace: default\n  labels: {{kubernetes.io/service-name: {of}}}\n\
         addressType: {family}\nendpoints: [{{addresses: [\"{ip}\"]}}]\nports: [{{name: web, port: {port}}}]\n"
    )
}

/// Writes the service `by-hand` and waits until the agent of node a has it.
fn by_hand(mesh: &Mesh, vips: &[&str], endpoints: &[SocketAddr]) -> Result<()> {
    let mut text = service("by-hand", vips);
    text.extend(endpoints.iter().map(|endpoint| slice("by-hand", *endpoint)));
    mesh.manifests().write("by-hand", &text)?;
    wait::until(wait::SOON, "the service to be known", || {
        let Ok(services) = mesh.agent("a").ask(&["services"]) else { return false };
        let mut services = services.as_array().into_iter().flatten();
        services.any(|one| one["service"] == "by-hand" && one["endpoints"] == endpoints.len())
    })
}

/// Who greets at `to`.
fn greeting(client: &Pod, to: SocketAddr) -> Result<String> {
    let mut greeting = [0; 2];
    client.connect(to)?.read_exact(&mut greeting).with_context(|| format!("from {to}"))?;
    Ok(String::from_utf8(greeting.into())?)
}

fn vip(text: &str) -> Result<SocketAddr> {
    Ok((text.parse::<std::net::IpAddr>()?, 80).into())
}

#[test]
fn headless_service_is_reached_by_its_pods_addresses() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes_builder()
        .service(ServiceSpec::new("headless").port(80, 8080).pods(&["b1", "b2"]).headless())
        .start()?;
    let _servers = ["b1", "b2"].map(|pod| mesh.pod(pod).serve(8080, Serve::Echo));
    for pod in ["b1", "b2"] {
        for family in Family::BOTH {
            let to = mesh.pod(pod).addr(family, 8080);
            exchange(&mut mesh.pod("a1").connect(to)?, b"hello")?;
        }
        let identity = mesh.pod(pod).identity();
        mesh.agent("a").wait_for_record(&[("way", "tunnel"), ("dst.identity", &identity)])?;
    }
    let services = mesh.agent("a").ask(&["services"])?;
    let mut services = services.as_array().context("a list")?.iter();
    let headless = services.find(|one| one["service"] == "headless").context("not listed")?;
    assert_eq!(headless["vips"].as_array().map(Vec::len), Some(0));
    assert_eq!(headless["endpoints"], 4, "two pods, two families");
    Ok(())
}

#[test]
fn service_without_selector_leads_into_the_mesh_and_out_of_it() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes_builder()
        .pod(PodSpec::new("out", "b").annotation("malla.dev/mesh", "disabled"))
        .start()?;
    let _in = mesh.pod("b1").serve(8080, Serve::Greet("b1"))?;
    let _out = mesh.pod("out").serve(9000, Serve::Greet("no"))?;
    by_hand(&mesh, &[V4], &[mesh.pod("b1").v4(8080), mesh.pod("out").v4(9000)])?;
    for (who, way) in [("b1", "tunnel"), ("no", "passthrough")] {
        wait::until(wait::SOON, who, || {
            vip(V4).and_then(|to| greeting(mesh.pod("a1"), to)).is_ok_and(|greeted| greeted == who)
        })?;
        let service = ("dst.service", "by-hand.default.svc.cluster.local");
        mesh.agent("a").wait_for_record(&[("way", way), service])?;
    }
    Ok(())
}

#[test]
fn named_target_port_is_each_pods_own() -> Result<()> {
    harness::require!();
    // Of two that are far the one that was slow at first would wait for its turn.
    let mesh = Mesh::two_nodes_builder().flag("--balance=random").start()?;
    let _b1 = mesh.pod("b1").serve(8080, Serve::Greet("b1"))?;
    let _b2 = mesh.pod("b2").serve(9090, Serve::Greet("b2"))?;
    by_hand(&mesh, &[V4], &[mesh.pod("b1").v4(8080), mesh.pod("b2").v4(9090)])?;
    for who in ["b1", "b2"] {
        wait::until(wait::SOON, who, || {
            vip(V4).and_then(|to| greeting(mesh.pod("a1"), to)).is_ok_and(|greeted| greeted == who)
        })?;
    }
    Ok(())
}

fn seen_family(server: &Server) -> Option<Family> {
    let local = server.locals().pop()?;
    Some(if local.is_ipv4() { Family::V4 } else { Family::V6 })
}

#[test]
fn family_dialled_is_the_family_delivered_where_there_are_both() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes()?;
    let server = mesh.pod("b1").serve(8080, Serve::Greet("b1"))?;
    let endpoints = [mesh.pod("b1").v4(8080), mesh.pod("b1").v6(8080)];
    by_hand(&mesh, &[V4, V6], &endpoints)?;
    for (to, family) in [(V4, Family::V4), (V6, Family::V6)] {
        assert_eq!(greeting(mesh.pod("a1"), vip(to)?)?, "b1");
        assert_eq!(seen_family(&server), Some(family));
    }
    Ok(())
}

#[test]
fn service_of_one_family_is_carried() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes()?;
    let server = mesh.pod("b1").serve(8080, Serve::Greet("b1"))?;
    by_hand(&mesh, &[V6], &[mesh.pod("b1").v6(8080)])?;
    assert_eq!(greeting(mesh.pod("a1"), vip(V6)?)?, "b1");
    assert_eq!(seen_family(&server), Some(Family::V6));
    // Endpoints of the other family serve where the one that was dialled has none.
    by_hand(&mesh, &[V4], &[mesh.pod("b1").v6(8080)])?;
    wait::until(wait::SOON, "the other address to be carried", || {
        vip(V4).and_then(|to| greeting(mesh.pod("a1"), to)).is_ok_and(|who| who == "b1")
    })?;
    assert_eq!(seen_family(&server), Some(Family::V6));
    Ok(())
}

#[test]
fn setting_that_is_not_understood_is_reported_and_the_safe_one_holds() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes_builder()
        .namespace("default", &[("malla.dev/mode", "permissive")])
        .pod(
            PodSpec::new("b1", "b")
                .annotation("malla.dev/mesh", "on")
                .annotation("malla.dev/mode", "lax")
                .annotation("malla.dev/outbound", "everything")
                .annotation("malla.dev/skip-inbound-ports", "http")
                .annotation("malla.dev/moode", "strict"),
        )
        .start()?;
    let cli = mesh.agent("b").cli(&["status", "-o", "json"])?;
    assert_eq!(cli.code, 1, "{}", cli.stdout);
    let status = cli.json()?;
    let problems = status["problems"].as_array().context("no list")?;
    for key in ["mesh", "mode", "outbound", "skip-inbound-ports", "moode"] {
        let field = format!("metadata.annotations[\"malla.dev/{key}\"]");
        let told = problems.iter().find(|one| one["field"] == field.as_str());
        let told = told.with_context(|| format!("{field} is not among {problems:#?}"))?;
        ensure!(told["place"].as_str().is_some_and(|at| at.contains("b1")), "{told}");
        ensure!(told["remedy"].as_str().is_some_and(|text| !text.is_empty()), "{told}");
    }
    let workloads = mesh.agent("b").ask(&["workloads"])?;
    let mut workloads = workloads.as_array().context("a list")?.iter();
    let b1 = workloads.find(|one| one["pod"] == "b1").context("b1 is not listed")?;
    assert_eq!(b1["enrolled"], true, "what the namespace says holds");
    assert_eq!((&b1["mode"], &b1["outbound"]), (&"strict".into(), &"all".into()));
    Ok(())
}

/// Two pods beside the mesh at node b, and everything of a1 and a2 captured.
fn all_outbound() -> Result<Mesh> {
    let outsider = PodSpec::new("out", "b").annotation("malla.dev/mesh", "disabled");
    Mesh::two_nodes_builder()
        .namespace(
            "default",
            &[("malla.dev/outbound", "all"), ("malla.dev/skip-outbound-ports", "9001")],
        )
        .pod(PodSpec::new("a2", "a").annotation("malla.dev/skip-outbound-ports", "9002"))
        .pod(outsider)
        .start()
}

fn passed(mesh: &Mesh, stream: &std::net::TcpStream) -> Result<Record> {
    let from = stream.local_addr()?.to_string();
    mesh.agent("a").wait_for_record(&[
        ("src.addr", &from),
        ("way", "passthrough"),
        ("carrier", "passthrough"),
        ("response_flags", "-"),
    ])
}

#[test]
fn unknown_destination_is_passed_through_from_inside_the_pod() -> Result<()> {
    harness::require!();
    let mesh = all_outbound()?;
    let server = mesh.pod("out").serve(9000, Serve::Echo)?;
    for family in Family::BOTH {
        let to = mesh.pod("out").addr(family, 9000);
        let mut stream = mesh.pod("a1").connect(to)?;
        exchange(&mut stream, b"out")?;
        assert_eq!(stream.peer_addr()?, to, "the program sees whom it dialled");
        let seen = server.clients().pop().map(|client| client.ip());
        assert_eq!(seen, Some(mesh.pod("a1").ip(family)), "it leaves from inside the pod");
        let stream = {
            stream.shutdown(std::net::Shutdown::Write)?;
            stream
        };
        let record = passed(&mesh, &stream)?;
        assert_eq!(record.text("dst.addr"), to.to_string());
        assert_eq!((record.number("bytes_sent"), record.number("bytes_recv")), (3, 3));
        assert_eq!(record.text("dst.identity"), "", "nobody has proven anything");
    }
    mesh.agent("a").wait_for_metric(
        "istio_tcp_connections_closed_total",
        &[("reporter", "source"), ("connection_security_policy", "unknown")],
        2.0,
    )
}

#[test]
fn unknown_destination_that_refuses_is_refused_at_once() -> Result<()> {
    harness::require!();
    let mesh = all_outbound()?;
    for family in Family::BOTH {
        let took = mesh.pod("a1").refused(mesh.pod("out").addr(family, 9000))?;
        ensure!(took < Duration::from_secs(1), "refused after {took:?}");
    }
    let record = mesh
        .agent("a")
        .wait_for_record(&[("reason", "connection_refused"), ("carrier", "passthrough")])?;
    assert_ne!(record.text("response_flags"), "-");
    Ok(())
}

#[test]
fn skip_lists_hold_where_everything_is_captured() -> Result<()> {
    harness::require!();
    let mesh = all_outbound()?;
    let opened = || mesh.agent("a").metric("istio_tcp_connections_opened_total", &[]);
    // The pod's own list takes the place of its namespace's.
    for (pod, port, captured) in
        [("a1", 9001, false), ("a1", 9002, true), ("a2", 9001, true), ("a2", 9002, false)]
    {
        let _server = mesh.pod("out").serve(port, Serve::Echo)?;
        for family in Family::BOTH {
            let before = opened()?;
            let mut stream = mesh.pod(pod).connect(mesh.pod("out").addr(family, port))?;
            exchange(&mut stream, b"hello")?;
            assert_eq!(opened()? > before, captured, "{pod} to {port}");
        }
    }
    Ok(())
}
