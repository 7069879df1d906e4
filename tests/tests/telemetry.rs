//! Telemetry: what the agents tell of a connection is what happened.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener, UdpSocket};

use anyhow::{Context as _, Result, ensure};
use harness::{Carrier, Mesh, PodSpec, Serve, ServiceSpec, exchange, linger_zero, wait};

/// The labels of Istio's TCP metrics, which dashboards select by.
const LABELS: &[&str] = &[
    "connection_security_policy",
    "destination_app",
    "destination_canonical_revision",
    "destination_canonical_service",
    "destination_principal",
    "destination_service",
    "destination_service_name",
    "destination_service_namespace",
    "destination_version",
    "destination_workload",
    "destination_workload_namespace",
    "reporter",
    "request_protocol",
    "response_flags",
    "source_app",
    "source_canonical_revision",
    "source_canonical_service",
    "source_principal",
    "source_version",
    "source_workload",
    "source_workload_namespace",
];

/// One endpoint of the service is in the mesh, and refuses.
#[test]
fn what_goes_in_plain_text_after_an_attempt_in_the_mesh_is_told_as_plain() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes_builder()
        .pod(PodSpec::new("out", "b").annotation("malla.dev/mesh", "disabled"))
        .service(ServiceSpec::new("both").port(80, 8080).pods(&["a2", "out"]))
        .flag("--balance=round-robin")
        .start()?;
    let _server = mesh.pod("out").serve(8080, Serve::Echo)?;
    for _ in 0..2 {
        exchange(&mut mesh.pod("a1").connect(mesh.service("both").v4(80))?, b"out there?")?;
    }
    let agent = mesh.agent("a");
    agent.wait_for_record(&[("direction", "inbound"), ("reason", "connection_refused")])?;
    let closed = "istio_tcp_connections_closed_total";
    let of = |security| [("reporter", "source"), ("connection_security_policy", security)];
    agent.wait_for_metric(closed, &of("unknown"), 2.0)?;
    ensure!(agent.metric(closed, &of("mutual_tls"))? == 0.0, "nothing was proven");
    Ok(())
}

#[test]
fn metrics_of_a_connection_say_who_spoke_to_whom() -> Result<()> {
    harness::require!();
    for carrier in Carrier::BOTH {
        let mesh = Mesh::two_nodes_builder()
            .carrier(carrier)
            .pod(PodSpec::new("a1", "a").label("app", "shop").label("version", "v7"))
            .start()?;
        let _server = mesh.pod("b1").serve(
            8080,
            Serve::custom(|mut stream| {
                stream.read_exact(&mut [0; 1000])?;
                stream.write_all(&[0; 5000])?;
                Ok(())
            }),
        )?;
        let mut stream = mesh.pod("a1").connect(mesh.service("b").v4(80))?;
        stream.write_all(&[0; 1000])?;
        stream.read_to_end(&mut Vec::new())?;
        drop(stream);

        for (node, reporter) in [("a", "source"), ("b", "destination")] {
            let agent = mesh.agent(node);
            let (a1, b1) = (mesh.pod("a1").identity(), mesh.pod("b1").identity());
            let labels = [
                ("reporter", reporter),
                ("source_workload", "a1"),
                ("source_workload_namespace", "default"),
                ("source_principal", a1.as_str()),
                ("source_app", "shop"),
                ("source_version", "v7"),
                ("destination_workload", "b1"),
                ("destination_principal", b1.as_str()),
                ("connection_security_policy", "mutual_tls"),
                ("request_protocol", "tcp"),
            ];
            agent.wait_for_metric("istio_tcp_connections_closed_total", &labels, 1.0)?;
            let metrics = agent.metrics()?;
            let sum = |name| metrics.sum(name, &labels);
            assert_eq!(sum("istio_tcp_connections_opened_total"), 1.0, "{reporter}");
            // Both are seen from the server, whoever reports.
            assert_eq!(sum("istio_tcp_received_bytes_total"), 1000.0, "{reporter}");
            assert_eq!(sum("istio_tcp_sent_bytes_total"), 5000.0, "{reporter}");
            let has = metrics.labels("istio_tcp_connections_opened_total");
            for label in LABELS {
                ensure!(has.contains(label), "{reporter} has no label {label}: {has:?}");
            }
        }
        let services = mesh.agent("a").metrics()?;
        let services = services.values("istio_tcp_connections_opened_total", "destination_service");
        assert_eq!(services, ["b.default.svc.cluster.local"]);
    }
    Ok(())
}

#[test]
fn own_metrics_are_there() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes()?;
    let _server = mesh.pod("b1").serve(8080, Serve::Echo)?;
    exchange(&mut mesh.pod("a1").connect(mesh.service("b").v4(80))?, b"hello")?;
    mesh.agent("a").wait_for_metric("istio_tcp_connections_closed_total", &[], 1.0)?;
    let metrics = mesh.agent("a").metrics()?;
    for family in [
        "istio_build",
        "mesh_capture_total",
        "mesh_certificate_expiry_seconds",
        "mesh_manifest_problems",
        "mesh_problems",
        "mesh_snapshot_age_seconds",
        "mesh_stage_duration_seconds_count",
        "mesh_tunnel_handshakes_total",
        "mesh_tunnels",
    ] {
        ensure!(metrics.count(family, &[]) > 0, "no {family}");
    }
    for stage in ["orig_dst", "route", "balance", "tunnel"] {
        let measured = metrics.sum("mesh_stage_duration_seconds_count", &[("stage", stage)]);
        ensure!(measured >= 1.0, "the stage {stage} was not measured");
    }
    Ok(())
}

#[test]
fn access_log_has_one_record_on_each_side() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes()?;
    let _server = mesh.pod("b1").serve(8080, Serve::Count)?;
    let mut stream = mesh.pod("a1").connect(mesh.service("b").v4(80))?;
    let client = stream.local_addr()?.to_string();
    stream.write_all(&[0; 321])?;
    stream.shutdown(Shutdown::Write)?;
    stream.read_to_end(&mut Vec::new())?;
    drop(stream);

    let target = mesh.pod("b1").v4(8080).to_string();
    let (a1, b1) = (mesh.pod("a1").identity(), mesh.pod("b1").identity());
    let mut traces = Vec::new();
    for (node, direction, sent, received) in [("a", "outbound", 321, 3), ("b", "inbound", 3, 321)] {
        let record = mesh.agent(node).wait_for_record(&[
            ("direction", direction),
            ("src.addr", &client),
            ("src.workload", "a1"),
            ("src.namespace", "default"),
            ("src.identity", &a1),
            ("dst.addr", &target),
            ("dst.workload", "b1"),
            ("dst.identity", &b1),
            ("message", "connection complete"),
            ("response_flags", "-"),
        ])?;
        assert_eq!(record.number("bytes_sent"), sent, "{direction}");
        assert_eq!(record.number("bytes_recv"), received, "{direction}");
        traces.push(record.text("trace.id").to_owned());
        let records = mesh.agent(node).access_log();
        let same = records.iter().filter(|one| one.text("src.addr") == client).count();
        assert_eq!(same, 1, "{direction}");
    }
    ensure!(!traces[0].is_empty() && traces[0] == traces[1], "{traces:?} do not match");
    Ok(())
}

/// How it chose to end: nothing failed, and nobody is to be woken.
#[test]
fn reset_of_an_application_is_no_failure() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes()?;
    let _server = mesh.pod("b1").serve(8080, Serve::Echo)?;
    let mut stream = mesh.pod("a1").connect(mesh.service("b").v4(80))?;
    exchange(&mut stream, b"hello")?;
    linger_zero(&stream)?;
    drop(stream);
    for (node, reason) in [("a", "application_reset"), ("b", "peer_reset")] {
        let agent = mesh.agent(node);
        let record = agent.wait_for_record(&[
            ("reason", reason),
            ("message", "connection complete"),
            ("level", "info"),
            ("response_flags", "-"),
        ])?;
        assert_eq!(record.text("stage"), "", "nobody is to blame");
        let metrics = agent.metrics()?;
        for family in ["istio_tcp_connections_failed_total", "mesh_refusals_total"] {
            assert_eq!(metrics.sum(family, &[]), 0.0, "{node}: {family}");
        }
        assert_eq!(metrics.sum("istio_tcp_connections_closed_total", &[]), 1.0, "{node}");
    }
    // A connection that could not be made is a failure, on the same counters.
    mesh.pod("a1").refused(mesh.pod("b1").v4(8081))?;
    for node in ["a", "b"] {
        let failed = [("response_flags", "CONNECT")];
        mesh.agent(node).wait_for_metric("istio_tcp_connections_failed_total", &failed, 1.0)?;
    }
    Ok(())
}

#[test]
fn reset_within_a_node_is_told_by_the_end_at_which_it_was() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes()?;
    let _server = mesh.pod("a2").serve(8080, Serve::Echo)?;
    let mut stream = mesh.pod("a1").connect(mesh.pod("a2").v4(8080))?;
    exchange(&mut stream, b"hello")?;
    linger_zero(&stream)?;
    drop(stream);
    for (direction, reason) in [("outbound", "application_reset"), ("inbound", "peer_reset")] {
        let told = [("direction", direction), ("way", "local"), ("reason", reason)];
        mesh.agent("a").wait_for_record(&told)?;
    }
    Ok(())
}

#[test]
fn access_log_as_text_has_the_same_keys() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes_builder().flag("--access-log=text").start()?;
    let _server = mesh.pod("b1").serve(8080, Serve::Echo)?;
    exchange(&mut mesh.pod("a1").connect(mesh.service("b").v4(80))?, b"hello")?;
    wait::until(wait::SOON, "the record", || {
        let log = mesh.agent("a").output();
        log.lines().any(|line| {
            line.contains("access: connection complete")
                && line.contains("bytes_sent=5 bytes_recv=5")
                && line.contains("dst.workload=\"b1\"")
                && line.contains("direction=\"outbound\"")
        })
    })
}

#[test]
fn series_of_a_deleted_pod_go_away() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes_builder().flag("--metrics-linger-s=0").start()?;
    let _server = mesh.pod("b1").serve(8080, Serve::Echo)?;
    for pod in ["a1", "a2"] {
        exchange(&mut mesh.pod(pod).connect(mesh.service("b").v4(80))?, b"hello")?;
    }
    let series = |node: &str, pod: &str| -> Result<usize> {
        let labels = [("source_workload", pod)];
        Ok(mesh.agent(node).metrics()?.count("istio_tcp_connections_opened_total", &labels))
    };
    for node in ["a", "b"] {
        for pod in ["a1", "a2"] {
            wait::until(wait::SOON, "the series", || series(node, pod).is_ok_and(|n| n > 0))?;
        }
    }
    mesh.delete_pod_manifest("a2")?;
    for node in ["a", "b"] {
        wait::until(wait::SOON, "the series to go", || series(node, "a2").is_ok_and(|n| n == 0))?;
        ensure!(series(node, "a1")? > 0, "the other pod's series stay");
    }
    Ok(())
}

#[test]
fn open_connection_is_listed_with_what_it_carried() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes()?;
    let _server = mesh.pod("b1").serve(8080, Serve::Echo)?;
    let mut stream = mesh.pod("a1").connect(mesh.service("b").v4(80))?;
    exchange(&mut stream, &[7; 4096])?;
    let client = stream.local_addr()?.to_string();
    for (node, direction, peer) in [("a", "outbound", "b1"), ("b", "inbound", "a1")] {
        let connections = mesh.agent(node).ask(&["connections"])?;
        let connections = connections.as_array().context("a list")?;
        let ours = connections.iter().find(|one| one["source"] == client.as_str());
        let ours = ours.with_context(|| format!("{client} is not among {connections:?}"))?;
        assert_eq!(ours["direction"], direction);
        assert_eq!(ours["peer_identity"], mesh.pod(peer).identity());
        assert_eq!(ours["bytes_sent"], 4096);
        assert_eq!(ours["bytes_received"], 4096);
        assert_eq!(ours["way"], "tunnel");
    }
    drop(stream);
    wait::until(wait::SOON, "the connection to be gone", || {
        let listed = mesh.agent("a").ask(&["connections"]);
        listed.is_ok_and(|list| list.as_array().is_some_and(Vec::is_empty))
    })
}

#[test]
fn agent_says_whether_it_is_ready() -> Result<()> {
    harness::require!();
    let mut mesh = Mesh::two_nodes()?;
    let agent = mesh.agent("a");
    assert_eq!(agent.http(15_021, "/healthz/ready")?.0, 200);
    assert_eq!(agent.http(15_021, "/healthz/live")?.0, 200);
    assert_eq!(agent.http(15_021, "/other")?.0, 404);
    let status = agent.ask(&["status"])?;
    assert_eq!((&status["node"], &status["ready"]), (&"a".into(), &true.into()));
    mesh.agent_mut("a").kill()?;
    assert!(!mesh.agent("a").is_ready());
    Ok(())
}

#[test]
fn command_line_tells_by_its_exit_code() -> Result<()> {
    harness::require!();
    let mut mesh = Mesh::two_nodes()?;
    let agent = mesh.agent("a");
    const PARTS: [&str; 6] = ["status", "workloads", "services", "certs", "connections", "tunnels"];
    for command in PARTS.into_iter().chain(["version", "dump"]) {
        for format in ["table", "json", "yaml"] {
            let cli = agent.cli(&[command, "-o", format])?;
            ensure!(cli.code == 0, "{command} -o {format}: {}: {}", cli.code, cli.stderr);
            ensure!(!cli.stdout.trim().is_empty(), "{command} -o {format} prints nothing");
        }
        agent.ask(&[command])?;
    }
    let dump = agent.ask(&["dump"])?;
    assert_eq!(dump["config"]["node"], "a", "{dump}");
    ensure!(PARTS.iter().all(|part| !dump[part].is_null()), "{dump}");
    assert_eq!(agent.ask(&["log"])?["level"], "mesh_agent=debug,info");
    assert_eq!(agent.ask(&["log", "debug"])?["level"], "debug");
    let dir = agent.ca_dir().display().to_string();
    let authority = agent.ask(&["ca", "show", "--dir", &dir])?;
    assert_eq!(authority["trust_domain"], "cluster.local");
    assert_eq!(authority["roots"][0]["kind"], "Root");
    assert_eq!(agent.cli(&["ca", "show", "--dir", "/proc/self"])?.code, 1, "there is none");
    assert_eq!(agent.cli(&["ca", "init", "--dir", &dir])?.code, 1, "it is never overwritten");
    assert_eq!(agent.cli(&["log", "loud"])?.code, 2);
    assert_eq!(agent.cli(&["status", "--no-such-flag"])?.code, 2);
    assert_eq!(agent.cli(&["completion", "bash"])?.code, 0);
    let check = agent.cli(&["check"])?;
    assert_eq!(check.code, 0, "{}{}", check.stdout, check.stderr);
    mesh.agent_mut("a").kill()?;
    assert_eq!(mesh.agent("a").cli(&["status"])?.code, 3, "nobody is there to answer");
    let detached = mesh.agent("a").ask(&["detach"])?;
    ensure!(detached["removed"].as_array().is_some_and(|all| !all.is_empty()), "{detached}");
    Ok(())
}

#[test]
fn log_level_may_change_while_it_runs() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes()?;
    let agent = mesh.agent("a");
    let told = || agent.log().matches("new snapshot").count();
    // A service more is a new snapshot, which the agent tells of at the level `info`.
    let provoke = |name: &str| -> Result<()> {
        let service = format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: default}}\n\
             spec: {{clusterIP: None, ports: [{{port: 80}}]}}\n"
        );
        mesh.manifests().write(name, &service)?;
        wait::until(wait::SOON, "the new snapshot", || {
            agent.cli(&["services"]).is_ok_and(|cli| cli.stdout.contains(name))
        })
    };
    assert_eq!(agent.cli(&["log", "warn"])?.code, 0);
    assert_eq!(agent.cli(&["log"])?.stdout.trim(), "warn");
    let before = told();
    provoke("unheard")?;
    assert_eq!(told(), before);
    assert_eq!(agent.cli(&["log", "mesh_agent=info"])?.code, 0);
    provoke("heard")?;
    wait::until(wait::SOON, "a line at the new level", || told() > before)
}

#[test]
fn check_tells_feature_by_feature_what_the_kernel_has() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes()?;
    let agent = mesh.agent("a");
    let report = agent.ask(&["check"])?;
    assert_eq!(report["success"], true, "{report:#}");
    let checks = report["categories"][0]["checks"].as_array().context("no checks")?;
    for feature in ["sk_lookup", "connect4", "sock_ops"] {
        let told = checks.iter().filter_map(|one| one["description"].as_str());
        ensure!(told.clone().any(|one| one.contains(feature)), "no {feature} in {report:#}");
    }
    ensure!(agent.cli(&["check"])?.stdout.contains('√'));
    let broken = agent.cli(&["check", "--cgroup", "/proc/self"])?;
    assert_eq!(broken.code, 1, "{}", broken.stdout);
    ensure!(broken.stdout.contains('×'), "{}", broken.stdout);
    Ok(())
}

#[test]
fn check_tells_of_ports_that_another_program_has_and_not_of_the_agents_own() -> Result<()> {
    harness::require!();
    let mut mesh = Mesh::two_nodes()?;
    // The one shares its port for metrics with nobody, the other with a successor.
    for flag in ["--standby=off", "--standby=on"] {
        mesh.agent_mut("a").kill()?;
        mesh.agent_mut("a").set_flag(flag);
        mesh.agent_mut("a").restart()?;
        let beside = mesh.agent("a").cli(&["check"])?;
        ensure!(beside.code == 0, "beside {flag}: {}{}", beside.stdout, beside.stderr);
    }
    mesh.agent_mut("a").kill()?;
    let node = mesh.node("a").netns();
    let metrics = node.run(|| Ok(TcpListener::bind("[::]:15020")?))?;
    let tunnels = node.run(|| Ok(UdpSocket::bind("[::]:15019")?))?;
    let found = mesh.agent("a").cli(&["check"])?;
    assert_eq!(found.code, 1, "{}{}", found.stdout, found.stderr);
    for told in [
        "× TCP [::]:15020 (--metrics-addr)\n    another program has TCP port 15020\n",
        "× UDP [::]:15019 (--tunnel-port)\n    another program has UDP port 15019\n",
        "√ TCP [::]:15019 (--tunnel-port)\n",
        "√ TCP 127.0.0.1:15021 (--ready-addr)\n",
    ] {
        ensure!(found.stdout.contains(told), "no {told:?} in {}", found.stdout);
    }
    drop((metrics, tunnels));
    assert_eq!(mesh.agent("a").cli(&["check"])?.code, 0, "they are free again");
    Ok(())
}

#[test]
fn command_line_needs_no_agent_to_tell_of_itself() -> Result<()> {
    harness::require!();
    let mut mesh = Mesh::two_nodes()?;
    let versions = mesh.agent("a").ask(&["version"])?;
    assert_eq!(versions["program"], versions["agent"], "both are of one build");
    mesh.agent_mut("a").kill()?;
    let agent = mesh.agent("a");
    assert_eq!(agent.ask(&["version"])?["program"], versions["program"]);
    for shell in ["bash", "zsh", "fish"] {
        let script = agent.cli(&["completion", shell])?;
        ensure!(script.code == 0 && script.stdout.contains("workloads"), "{shell}");
    }
    for wrong in [&["completion", "tcsh"][..], &["nonsense"], &["run"], &["status", "-o", "xml"]] {
        let cli = agent.cli(wrong)?;
        ensure!(cli.code == 2 && !cli.stderr.is_empty(), "{wrong:?}: {}", cli.code);
    }
    for question in ["status", "workloads", "services", "certs", "connections", "tunnels", "log"] {
        let cli = agent.cli(&[question])?;
        ensure!(cli.code == 3 && cli.stderr.contains("no agent"), "{question}: {}", cli.stderr);
    }
    Ok(())
}
