//! Pods come into the mesh and leave it, also such as cannot, and take over from others.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::process::Command;
use std::thread;

use anyhow::{Context as _, Result, bail, ensure};
use harness::{Family, Load, Mesh, PodSpec, Serve, exchange, wait};

/// Where agents take tunnels.
const TUNNEL_PORT: u16 = 15019;

#[test]
fn client_enrols_and_leaves_fifty_times_without_a_failed_request() -> Result<()> {
    harness::require!("nft");
    let mesh = Mesh::two_nodes_builder().translated_services().start()?;
    let _server = mesh.pod("b1").serve(8080, Serve::Echo)?;
    let mut held = mesh.pod("a1").connect(mesh.service("b").v4(80))?;
    exchange(&mut held, b"before")?;

    Load::during(mesh.pod("a1"), mesh.service("b").v4(80), |load| {
        for toggle in 0..50 {
            mesh.enrol("a1", toggle % 2 == 1)?;
            load.wait_for(2)?;
            exchange(&mut held, b"an open connection is left as it is")?;
        }
        Ok(())
    })?;
    let opened = |policy| {
        let labels = [("source_workload", "a1"), ("connection_security_policy", policy)];
        mesh.agent("a").metric("istio_tcp_connections_opened_total", &labels)
    };
    ensure!(opened("mutual_tls")? >= 50.0, "some went through the mesh");
    ensure!(
        mesh.agent("b").metric(
            "istio_tcp_connections_opened_total",
            &[("reporter", "destination"), ("connection_security_policy", "unknown"),]
        )? >= 50.0,
        "and some did not"
    );
    Ok(())
}

#[test]
fn server_enrols_and_leaves_fifty_times_without_a_failed_request() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes()?;
    let _server = mesh.pod("b1").serve(8080, Serve::Echo)?;
    let mut held = mesh.pod("a1").connect(mesh.pod("b1").v4(8080))?;
    exchange(&mut held, b"before")?;
    Load::during(mesh.pod("a1"), mesh.pod("b1").v4(8080), |load| {
        for toggle in 0..50 {
            mesh.enrol("b1", toggle % 2 == 1)?;
            load.wait_for(2)?;
            exchange(&mut held, b"an open connection is left as it is")?;
        }
        Ok(())
    })?;
    Ok(())
}

/// Neither a wire nor another agent is between them, and IPv6 goes its own way in the kernel.
#[test]
fn neighbours_enrol_and_leave_in_both_families_without_a_failed_request() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes()?;
    let _server = mesh.pod("a2").serve(8080, Serve::Echo)?;
    for family in Family::BOTH {
        let to = mesh.pod("a2").addr(family, 8080);
        let mut held = mesh.pod("a1").connect(to)?;
        exchange(&mut held, b"before")?;
        Load::during(mesh.pod("a1"), to, |load| {
            for toggle in 0..20 {
                // The client and the server in turn: all four combinations.
                let pod = if toggle % 2 == 0 { "a1" } else { "a2" };
                mesh.enrol(pod, toggle % 4 >= 2)?;
                load.wait_for(2)?;
                exchange(&mut held, b"an open connection is left as it is")?;
            }
            Ok(())
        })?;
        // The first connection had no verdict yet. Those of the load may all have had one: what was decided
        // before a pod left holds again when it comes back.
        let first = held.local_addr()?.to_string();
        drop(held);
        mesh.agent("a").wait_for_record(&[("src.addr", &first), ("way", "local")])?;
        let client = mesh.pod("a1").ip(family).to_string();
        wait::until(wait::SOON, &format!("{family:?}: one from outside"), || {
            mesh.agent("a").access_log().iter().any(|record| {
                record.text("src.addr").contains(&client) && record.has(&[("way", "passthrough")])
            })
        })?;
    }
    Ok(())
}

#[test]
fn pod_whose_own_agent_hears_of_it_last_is_reached_all_the_same() -> Result<()> {
    harness::require!();
    let late = PodSpec::new("late", "b").annotation("malla.dev/mesh", "disabled");
    let mesh = Mesh::two_nodes_builder().pod(late).start()?;
    let _server = mesh.pod("late").serve(8080, Serve::Echo)?;
    let agent_b = mesh.agent("b").pid().to_string();
    let signal = |name: &str| -> Result<()> {
        let status = Command::new("kill").args([name, &agent_b]).status()?;
        ensure!(status.success(), "kill {name}: {status}");
        Ok(())
    };
    let refused = [("side", "server"), ("reason", "unknown_workload")];
    // Which of the two agent b looks at first is the kernel's choice: where it is the enrolment, nothing is shown.
    for _ in 0..40 {
        thread::scope(|scope| {
            signal("-STOP")?;
            let enrolling = scope.spawn(|| mesh.enrol("late", true));
            wait::until(wait::SOON, "node a to know the pod", || {
                mesh.agent("a").is_enrolled(mesh.pod("late")) == Some(true)
            })?;
            let client = scope.spawn(|| {
                exchange(&mut mesh.pod("a1").connect(mesh.pod("late").v4(8080))?, b"early")
            });
            wait::until(wait::SOON, "agent b to have something to read", || {
                has_unread(&agent_b, TUNNEL_PORT).unwrap_or(false)
            })?;
            signal("-CONT")?;
            client.join().expect("the client panicked")?;
            enrolling.join().expect("the enrolment panicked")
        })?;
        if mesh.agent("b").metric("mesh_tunnel_refusals_total", &refused)? > 0.0 {
            return Ok(());
        }
        mesh.enrol("late", false)?;
    }
    bail!("agent b was always quicker")
}

/// Whether a socket at this port, in the namespace of this process, has bytes that nobody has read.
fn has_unread(pid: &str, port: u16) -> Result<bool> {
    for table in ["tcp", "tcp6", "udp", "udp6"] {
        let text = fs::read_to_string(format!("/proc/{pid}/net/{table}"))?;
        for line in text.lines().skip(1) {
            let fields: Vec<&str> = line.split_whitespace().collect();
            // ADDRESS:PORT and SENT:RECEIVED, all in hexadecimal (proc_pid_net(5)).
            let (local, queues) = (fields[1], fields[4]);
            let received = queues.split_once(':').map_or("", |(_, received)| received);
            if local.ends_with(&format!(":{port:04X}")) && received.contains(|c| c != '0') {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

/// As when a machine's own scripts restart a pod: the manifest says nothing of it.
#[test]
fn pod_whose_namespace_is_made_anew_is_enrolled_again() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes()?;
    let _server = mesh.pod("b1").serve(8080, Serve::Echo)?;
    let (a1, to) = (mesh.pod("a1"), mesh.service("b").v4(80));
    exchange(&mut a1.connect(to)?, b"before")?;

    let (name, node) = (a1.netns().name(), mesh.node("a").netns());
    let old = fs::metadata(a1.netns().path())?.ino();
    a1.netns().ip(&format!("link set eth0 netns {}\n", node.name()))?;
    node.ip("link set eth0 name kept\n")?;
    let ip = |args: &[&str]| -> Result<()> {
        let status = Command::new("ip").args(args).status()?;
        ensure!(status.success(), "ip {args:?}: {status}");
        Ok(())
    };
    ip(&["netns", "delete", name])?;
    ip(&["netns", "add", name])?;
    ensure!(fs::metadata(a1.netns().path())?.ino() != old, "it is another namespace");
    node.ip(&format!("link set kept netns {name}\n"))?;
    let v4 = a1.v4_ip();
    a1.netns().ip(&format!(
        "link set lo up\nlink set kept name eth0\naddr add {v4}/32 dev eth0\nlink set eth0 up\n"
    ))?;
    // The service's address leads nowhere but through the agent.
    wait::until(wait::SOON, "the new namespace to be captured", || {
        a1.try_connect(to).is_ok_and(|mut stream| exchange(&mut stream, b"after").is_ok())
    })?;
    Ok(())
}

#[test]
fn pod_that_cannot_be_enrolled_is_told_and_harms_nobody_else() -> Result<()> {
    harness::require!();
    let late = PodSpec::new("late", "a").annotation("malla.dev/mesh", "disabled");
    let mut mesh = Mesh::two_nodes_builder().pod(late).start()?;
    let _server = mesh.pod("b1").serve(8080, Serve::Echo)?;
    let to = mesh.service("b").v4(80);
    let right = fs::read_to_string(mesh.manifests().dir().join("pod-default-late.yaml"))?
        .replace("disabled", "enabled");
    let netns = mesh.pod("late").netns().path().display().to_string();
    let wrong = right.replace(&netns, "/run/netns/malla-none");
    mesh.manifests().write("pod-default-late", &wrong)?;
    let reason = [("reason", "netns")];
    mesh.agent("a").wait_for_metric("mesh_pods_not_enrolled", &reason, 1.0)?;

    // Also for an agent that starts with it.
    for _ in 0..2 {
        let agent = mesh.agent("a");
        ensure!(agent.is_ready(), "one pod must not take the node out of service");
        let cli = agent.cli(&["status"])?;
        ensure!(cli.code == 1, "{}{}", cli.stdout, cli.stderr);
        let told = ["Pod default/late", "not enrolled", "malla-none", "No such file"];
        ensure!(told.iter().all(|word| cli.stdout.contains(word)), "{}", cli.stdout);
        exchange(&mut mesh.pod("a1").connect(to)?, b"beside it")?;
        mesh.agent_mut("a").kill()?;
        mesh.agent_mut("a").restart()?;
    }

    mesh.manifests().write("pod-default-late", &right)?;
    wait::until(wait::SOON, "the pod to be enrolled", || {
        mesh.agent("a").cli(&["status"]).is_ok_and(|cli| cli.code == 0)
    })?;
    ensure!(mesh.agent("a").metric("mesh_pods_not_enrolled", &[])? == 0.0, "still counted");
    exchange(&mut mesh.pod("late").connect(to)?, b"in the mesh")?;
    mesh.agent("a").wait_for_record(&[("src.identity", &mesh.pod("late").identity())])?;
    Ok(())
}

#[test]
fn namespace_is_as_it_was_when_its_pod_has_left() -> Result<()> {
    harness::require!();
    let late = PodSpec::new("late", "b").annotation("malla.dev/mesh", "disabled");
    let mesh = Mesh::two_nodes_builder().pod(late).start()?;
    let _server = mesh.pod("late").serve(8080, Serve::Echo)?;
    // Without link-local addresses, which turn up some time after the rest.
    let script = "{ ip rule; ip -6 rule; ip route show table all; ip -6 route show table all; } \
                  | grep -v fe80; \
                  cat /proc/sys/net/ipv4/tcp_fwmark_accept /proc/sys/net/ipv*/fwmark_reflect";
    let routing = || mesh.pod("late").succeed("sh", &["-c", script]);
    let before = routing()?;
    mesh.enrol("late", true)?;
    let held =
        Family::BOTH.map(|family| mesh.pod("a1").connect(mesh.pod("late").addr(family, 8080)));
    let mut held = held.into_iter().collect::<Result<Vec<_>>>()?;
    held.iter_mut().try_for_each(|held| exchange(held, b"shown as a1"))?;
    let prepared = routing()?;
    ensure!(prepared.contains("fwmark 0x6d616c6c"), "{prepared}");

    mesh.enrol("late", false)?;
    // Out and in and out again, while a connection lives by them.
    mesh.enrol("late", true)?;
    mesh.enrol("late", false)?;
    held.iter_mut().try_for_each(|held| exchange(held, b"left as it is"))?;
    assert_eq!(routing()?, prepared);
    // That of IPv4 ends first, and the other one still lives by what is there.
    held.remove(0);
    exchange(&mut held[0], b"left as it is")?;
    drop(held);
    wait::until(wait::SOON, "the routes to go", || routing().is_ok_and(|now| now == before))
}

/// What takes over an address and a namespace does not talk in plain text while its certificate is made.
#[test]
fn successor_waits_for_its_certificate_under_its_predecessors_capture() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes()?;
    let _server = mesh.pod("b1").serve(8080, Serve::Echo)?;
    let to = Family::BOTH.map(|family| mesh.pod("b1").addr(family, 8080));
    let manifest = fs::read_to_string(mesh.manifests().dir().join("pod-default-a1.yaml"))?
        .replace(mesh.pod("a1").uid(), "successor")
        .replace("serviceAccountName: \"a1\"", "serviceAccountName: \"successor\"");
    // It never comes: the agent gives up waiting after two seconds.
    fs::rename(mesh.ca_dir().join("root.key"), mesh.ca_dir().join("away.key"))?;
    mesh.manifests().write("pod-default-a1", &manifest)?;
    let enrolled = || mesh.agent("a").log().contains("enrolled without a certificate");
    wait::until(wait::SOON, "the successor to be enrolled", || {
        // Refused by its agent, as it should be; what counts is what never comes to node b.
        for to in to {
            drop(
                mesh.pod("a1").connect(to).and_then(|mut stream| exchange(&mut stream, b"plain?")),
            );
        }
        enrolled()
    })?;
    let plain = [("reporter", "destination"), ("connection_security_policy", "unknown")];
    let opened = mesh.agent("b").metric("istio_tcp_connections_opened_total", &plain)?;
    ensure!(opened == 0.0, "{opened} connections in plain text");
    Ok(())
}

#[test]
fn pod_that_the_kernel_would_not_let_go_of_is_captured_when_it_comes_back() -> Result<()> {
    harness::require!();
    let a1 = PodSpec::new("a1", "a").annotation("malla.dev/mesh", "enabled");
    let mesh = Mesh::two_nodes_builder().pod(a1).start()?;
    let _server = mesh.pod("b1").serve(8080, Serve::Echo)?;
    let (to, agent) = (mesh.service("b").v4(80), mesh.agent("a"));
    let layout = fs::read_dir(agent.bpffs())?.next().context("no layout")??.path();
    let (pin, aside) = (
        layout.join("links").join(format!("lookup_{}", mesh.pod("a1").uid())),
        layout.join("aside"),
    );
    // Nothing that can be let go of.
    fs::rename(&pin, &aside)?;
    fs::create_dir(&pin)?;
    let enabled = fs::read_to_string(mesh.manifests().dir().join("pod-default-a1.yaml"))?;
    let disabled = enabled.replace("mesh: \"enabled\"", "mesh: \"disabled\"");
    mesh.manifests().write("pod-default-a1", &disabled)?;
    wait::until(wait::SOON, "the agent to fail", || agent.log().contains("not released"))?;
    mesh.manifests().write("pod-default-a1", &enabled)?;
    fs::remove_dir(&pin)?;
    fs::rename(&aside, &pin)?;
    // A service's address leads nowhere without the mesh.
    wait::until(wait::SOON, "the pod to be captured", || {
        mesh.pod("a1").try_connect(to).is_ok_and(|mut s| exchange(&mut s, b"back").is_ok())
    })
}

/// What could not be removed of what is gone is tried again, though nobody changes anything; and it is told.
#[test]
fn leftovers_that_could_not_be_removed_are_tried_again() -> Result<()> {
    harness::require!();
    let a2 = PodSpec::new("a2", "a").annotation("malla.dev/mesh", "enabled");
    let mesh = Mesh::two_nodes_builder().pod(a2).start()?;
    let agent = mesh.agent("a");
    let layout = fs::read_dir(agent.bpffs())?.next().context("no layout")??.path();
    // Of a pod that is gone, and nothing that can be let go of.
    let pin = layout.join("links/lookup_gone");
    fs::create_dir(&pin)?;
    let enabled = fs::read_to_string(mesh.manifests().dir().join("pod-default-a2.yaml"))?;
    let disabled = enabled.replace("mesh: \"enabled\"", "mesh: \"disabled\"");
    ensure!(disabled != enabled, "{enabled}");
    mesh.manifests().write("pod-default-a2", &disabled)?;
    let has = |told: bool| {
        let status = agent.cli(&["status"]);
        status.is_ok_and(|status| status.stdout.contains("lookup_gone is not ours") == told)
    };
    wait::until(wait::SOON, "the agent to say so", || has(true))?;
    fs::remove_dir(&pin)?;
    wait::until(wait::SOON, "the problem to be over", || has(false))
}

/// A namespace that a descriptor of the agent names lives as long as that, whatever becomes of its sandbox.
#[test]
fn namespace_of_a_pod_that_has_completed_is_let_go() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes()?;
    let _server = mesh.pod("b1").serve(8080, Serve::Echo)?;
    exchange(&mut mesh.pod("a1").connect(mesh.service("b").v4(80))?, b"hello")?;
    let agent = mesh.agent("a");
    let netns = fs::metadata(mesh.pod("a1").netns().path())?;
    let netns = (netns.dev(), netns.ino());
    let held = || -> Result<usize> {
        let open = fs::read_dir(format!("/proc/{}/fd", agent.pid()))?.flatten();
        let open = open.filter_map(|fd| fs::metadata(fd.path()).ok());
        Ok(open.filter(|open| (open.dev(), open.ino()) == netns).count())
    };
    ensure!(held()? > 0, "otherwise nothing is looked for");
    let running = fs::read_to_string(mesh.manifests().dir().join("pod-default-a1.yaml"))?;
    let completed = running.replace("\"Running\"", "\"Succeeded\"");
    ensure!(completed != running, "{running}");
    mesh.manifests().write("pod-default-a1", &completed)?;
    wait::until(wait::SOON, "its namespace to be let go", || held().is_ok_and(|held| held == 0))
}
