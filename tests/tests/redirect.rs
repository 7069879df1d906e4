//! `--redirect-peer on`: packets between two pods of a node skip it; and, without, do not.

use std::collections::HashSet;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Shutdown, UdpSocket};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use harness::wait::{SOON, until};
use harness::{
    Builder, Family, Mesh, Pattern, Pod, PodSpec, Serve, ServiceSpec, exchange, exchange_patterns,
    is_reset, linger_zero,
};

const ON: &str = "--redirect-peer=on";
/// What it is done with.
const TCX: (&str, (u32, u32)) = ("TCX", (6, 6));

/// A node with two pods that talk without the agent at the ports 8080 to 8089, so that what is seen
/// there is theirs.
fn one_node() -> Builder {
    let pod = |name| {
        PodSpec::new(name, "a")
            .annotation("malla.dev/skip-outbound-ports", "8080-8089")
            .annotation("malla.dev/skip-inbound-ports", "8080-8089")
    };
    Mesh::builder()
        .node("a")
        .namespace("default", &[("malla.dev/mesh", "enabled")])
        .pod(pod("a1"))
        .pod(pod("a2"))
}

fn redirected() -> Result<Mesh> {
    let mesh = one_node().flag(ON).start()?;
    wait_for(&mesh, &["a1", "a2"], "on")?;
    Ok(mesh)
}

/// Waits until `status` says this, or a sentence with it, of the pods.
fn wait_for(mesh: &Mesh, pods: &[&str], how: &str) -> Result<()> {
    let mut last = serde_json::Value::Null;
    until(SOON, "the pods' cables to be looked at", || {
        let status = mesh.agent("a").cli(&["status", "-o", "json"]);
        last = status.and_then(|cli| cli.json()).unwrap_or_default()["redirect_peer"].take();
        let is_so = |said: &str| if how == "on" { said == how } else { said.contains(how) };
        pods.iter().all(|pod| last[format!("default/{pod}")].as_str().is_some_and(is_so))
    })
    .with_context(|| format!("{pods:?} to be {how:?}: {last}"))
}

fn kernel(mesh: &Mesh, event: &str) -> Result<f64> {
    mesh.agent("a").metric("mesh_capture_total", &[("event", event)])
}

/// Gives the node nftables rules for what it forwards between the two pods.
fn rules(mesh: &Mesh, rules: &[&str]) -> Result<()> {
    let mut all = String::new();
    for (from, to) in [("a1", "a2"), ("a2", "a1")] {
        let (from, to) = (mesh.pod(from), mesh.pod(to));
        for rule in rules {
            all += &format!("ip saddr {} ip daddr {} {rule}\n", from.v4_ip(), to.v4_ip());
            all += &format!("ip6 saddr {} ip6 daddr {} {rule}\n", from.v6_ip(), to.v6_ip());
        }
    }
    let table = format!(
        "table inet seen {{\n counter pods_tcp {{}}\n counter pods_other {{}}\n chain forward {{\n \
         type filter hook forward priority filter; policy accept;\n{all} }}\n}}\n"
    );
    let file = mesh.state_dir().join("seen.nft");
    fs::write(&file, table)?;
    on_node(mesh, "nft", &["-f", &file.display().to_string()]).map(drop)
}

/// Counts what the node forwards between the two pods.
fn watch(mesh: &Mesh) -> Result<()> {
    rules(
        mesh,
        &["meta l4proto tcp counter name pods_tcp", "meta l4proto != tcp counter name pods_other"],
    )
}

/// How many packets the node has forwarded between the two pods.
fn forwarded(mesh: &Mesh, counter: &str) -> Result<u64> {
    let said = on_node(mesh, "nft", &["-j", "list", "counter", "inet", "seen", counter])?;
    let said: serde_json::Value = serde_json::from_str(&said)?;
    let all = said["nftables"].as_array().context("no list")?;
    let found = all.iter().find_map(|one| one["counter"]["packets"].as_u64());
    found.with_context(|| format!("no counter {counter}: {said}"))
}

/// Runs a program in the node's namespace.
fn on_node(mesh: &Mesh, program: &str, args: &[&str]) -> Result<String> {
    let mut command = Command::new(program);
    command.args(args);
    let output = mesh.node("a").netns().run(|| command.output().context("run"))?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "{program} {args:?}: {said}");
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The pins of the agent whose names begin like this.
fn pins(mesh: &Mesh, prefix: &str) -> Result<HashSet<String>> {
    let mut found = HashSet::new();
    for layout in fs::read_dir(mesh.agent("a").bpffs())? {
        for link in fs::read_dir(layout?.path().join("links"))? {
            let name = link?.file_name().to_string_lossy().into_owned();
            if name.starts_with(prefix) {
                found.insert(name);
            }
        }
    }
    Ok(found)
}

#[test]
fn connections_between_pods_of_a_node_skip_it_when_asked() -> Result<()> {
    harness::require!("nft");
    harness::require_kernel!(TCX);
    let mesh = redirected()?;
    watch(&mesh)?;
    let (client, server) = (mesh.pod("a1"), mesh.pod("a2"));
    let _bulk = server.serve(8080, Serve::Exchange(32 << 20))?;
    let _count = server.serve(8081, Serve::Count)?;
    let reset = server.serve(8082, Serve::ResetAfter(5))?;
    let echo = server.serve(8083, Serve::Echo)?;
    for family in Family::BOTH {
        let before = kernel(&mesh, "redirected")?;
        let stream = client.connect(server.addr(family, 8080))?;
        exchange_patterns(&stream, 32 << 20, Pattern::CLIENT, Pattern::SERVER)?;

        let mut stream = client.connect(server.addr(family, 8081))?;
        stream.write_all(b"seven b")?;
        stream.shutdown(Shutdown::Write)?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        assert_eq!(answer, "7", "the other direction stays open");

        let mut stream = client.connect(server.addr(family, 8082))?;
        stream.write_all(b"reset")?;
        assert!(is_reset(&mut stream), "a reset arrives as one");

        let mut stream = client.connect(server.addr(family, 8083))?;
        exchange(&mut stream, b"hello")?;
        assert_eq!(echo.clients().pop(), Some(stream.local_addr()?));
        linger_zero(&stream)?;
        drop(stream);
        until(SOON, "the server to see the client's reset", || {
            echo.outcomes().last().is_some_and(Result::is_err)
        })?;
        let took = client.refused(server.addr(family, 8089))?;
        ensure!(took < Duration::from_secs(1), "refused after {took:?}");

        let packets = kernel(&mesh, "redirected")? - before;
        ensure!(packets > 64.0, "{family:?}: only {packets} packets of 64 MiB were redirected");
    }
    drop(reset);
    assert_eq!(forwarded(&mesh, "pods_tcp")?, 0, "nothing went through the node");
    Ok(())
}

#[test]
fn direct_connections_skip_the_node_too() -> Result<()> {
    harness::require!("nft");
    harness::require_kernel!(TCX);
    let mesh = Mesh::builder()
        .node("a")
        .namespace("default", &[("malla.dev/mesh", "enabled")])
        .pod(PodSpec::new("a1", "a"))
        .pod(PodSpec::new("a2", "a"))
        .service(ServiceSpec::new("a").port(80, 8080).pods(&["a2"]))
        .flag(ON)
        .start()?;
    wait_for(&mesh, &["a1", "a2"], "on")?;
    watch(&mesh)?;
    let _server = mesh.pod("a2").serve(8080, Serve::Echo)?;
    for family in Family::BOTH {
        let (taken, before) = (kernel(&mesh, "direct_taken")?, kernel(&mesh, "redirected")?);
        let to = mesh.service("a").addr(family, 80);
        until(SOON, "a direct connection", || {
            let reached =
                mesh.pod("a1").connect(to).and_then(|mut stream| exchange(&mut stream, b"hello"));
            reached.is_ok() && kernel(&mesh, "direct_taken").is_ok_and(|now| now > taken)
        })?;
        ensure!(kernel(&mesh, "redirected")? > before, "{family:?}");
    }
    assert_eq!(forwarded(&mesh, "pods_tcp")?, 0);
    Ok(())
}

#[test]
fn rule_of_the_node_between_two_pods_holds_unless_asked_otherwise() -> Result<()> {
    harness::require!("nft");
    harness::require_kernel!(TCX);
    let mut mesh = one_node().start()?;
    let _server = mesh.pod("a2").serve(8080, Serve::Echo)?;
    let reach = |mesh: &Mesh, family| -> Result<()> {
        exchange(&mut mesh.pod("a1").connect(mesh.pod("a2").addr(family, 8080))?, b"hello")
    };
    for family in Family::BOTH {
        reach(&mesh, family)?;
    }
    rules(&mesh, &["tcp flags & (syn | ack) == syn reject with tcp reset"])?;
    for family in Family::BOTH {
        mesh.pod("a1").refused(mesh.pod("a2").addr(family, 8080))?;
    }
    assert_eq!(kernel(&mesh, "redirected")?, 0.0);

    // What the flag's first sentence says.
    mesh.agent_mut("a").kill()?;
    mesh.agent_mut("a").set_flag(ON);
    mesh.agent_mut("a").restart()?;
    wait_for(&mesh, &["a1", "a2"], "on")?;
    for family in Family::BOTH {
        reach(&mesh, family)?;
    }
    Ok(())
}

#[test]
fn what_is_not_tcp_goes_through_the_node() -> Result<()> {
    harness::require!("nft");
    harness::require_kernel!(TCX);
    let mesh = redirected()?;
    watch(&mesh)?;
    let (client, server) = (mesh.pod("a1"), mesh.pod("a2"));
    for family in Family::BOTH {
        let bound = |pod: &Pod| {
            pod.run(|| {
                let socket = UdpSocket::bind(pod.addr(family, 0))?;
                socket.set_read_timeout(Some(SOON))?;
                Ok(socket)
            })
        };
        let (from, to) = (bound(client)?, bound(server)?);
        let before = forwarded(&mesh, "pods_other")?;
        let mut buffer = [0; 8];
        from.send_to(b"datagram", to.local_addr()?)?;
        assert_eq!(to.recv_from(&mut buffer)?, (8, from.local_addr()?));
        // Nobody there: the answer is ICMP.
        from.connect(server.addr(family, 9))?;
        from.send(b"nobody")?;
        let error = from.recv(&mut buffer).expect_err("an answer of nobody");
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);
        ensure!(forwarded(&mesh, "pods_other")? >= before + 3, "two datagrams, one ICMP");
    }
    assert_eq!(kernel(&mesh, "redirected")?, 0.0);
    Ok(())
}

/// kube-proxy translates a service's address on the node, and the answer back: an answer that went
/// another way would come from an address that the client never dialled.
#[test]
fn connection_by_a_translated_address_stays_with_the_node() -> Result<()> {
    harness::require!("nft");
    harness::require_kernel!(TCX);
    let pod = |name| PodSpec::new(name, "a").annotation("malla.dev/mesh", "disabled");
    let mesh = one_node()
        .pod(pod("a1").annotation("malla.dev/skip-outbound-ports", "80,8080"))
        .pod(pod("a2").annotation("malla.dev/skip-inbound-ports", "8080"))
        .service(ServiceSpec::new("a").port(80, 8080).pods(&["a2"]))
        .translated_services()
        .flag(ON)
        .start()?;
    let client = mesh.pod("a1");
    let server = mesh.pod("a2").serve(8080, Serve::Echo)?;
    for family in Family::BOTH {
        let (service, endpoint) =
            (mesh.service("a").addr(family, 80), mesh.pod("a2").addr(family, 8080));
        let mut before_enrolment = client.connect(service)?;
        exchange(&mut before_enrolment, b"before")?;
        let mut straight = client.connect(endpoint)?;
        exchange(&mut straight, b"before")?;

        mesh.enrol("a1", true)?;
        mesh.enrol("a2", true)?;
        wait_for(&mesh, &["a1", "a2"], "on")?;
        let before = kernel(&mesh, "redirected")?;
        exchange(&mut before_enrolment, b"after")?;
        exchange(&mut straight, b"after")?;
        let mut after_enrolment = client.connect(service)?;
        exchange(&mut after_enrolment, b"new")?;
        assert_eq!(
            kernel(&mesh, "redirected")?,
            before,
            "{family:?}: all of it went through the node"
        );
        ensure!(kernel(&mesh, "redirect_unknown")? > 0.0, "and was seen");

        // One source port, straight and then by the service's address: the same two ends to the server.
        let from = pick_port(client, family)?;
        exchange(&mut connect_from(client, from, endpoint)?, b"straight")?;
        ensure!(kernel(&mesh, "redirected")? > before, "this one was redirected");
        exchange(&mut connect_from(client, from, service)?, b"translated")?;
        let seen = server.clients();
        assert_eq!(
            seen[seen.len() - 2..].iter().map(|addr| addr.port()).collect::<Vec<_>>(),
            [from.port(); 2]
        );

        mesh.enrol("a1", false)?;
        mesh.enrol("a2", false)?;
        exchange(&mut before_enrolment, b"left")?;
        exchange(&mut straight, b"left")?;
        exchange(&mut after_enrolment, b"left")?;
    }
    Ok(())
}

/// An address of the pod with a port that nothing uses.
fn pick_port(pod: &Pod, family: Family) -> Result<std::net::SocketAddr> {
    pod.run(|| Ok(std::net::TcpListener::bind(pod.addr(family, 0))?.local_addr()?))
}

/// Connects from this very port; its end is a reset, so that the port is free again at once.
fn connect_from(
    pod: &Pod,
    from: std::net::SocketAddr,
    to: std::net::SocketAddr,
) -> Result<std::net::TcpStream> {
    pod.run(|| {
        let domain = socket2::Domain::for_address(from);
        let socket = socket2::Socket::new(domain, socket2::Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        socket.set_linger(Some(Duration::ZERO))?;
        socket.set_read_timeout(Some(SOON))?;
        socket.bind(&from.into())?;
        socket.connect_timeout(&to.into(), SOON).with_context(|| format!("{from} to {to}"))?;
        Ok(socket.into())
    })
}

/// Does something to a cable, or undoes it.
type Act<'a> = &'a dyn Fn() -> Result<()>;

#[test]
fn cable_that_is_not_a_plain_one_is_left_alone_and_works() -> Result<()> {
    harness::require!("nft", "tc");
    harness::require_kernel!(TCX);
    let mesh = redirected()?;
    let _server = mesh.pod("a2").serve(8080, Serve::Echo)?;
    let node = mesh.node("a");
    let (v4, v6) = (mesh.pod("a2").v4_ip(), mesh.pod("a2").v6_ip());
    let tc = |args: &str| on_node(&mesh, "tc", &args.split(' ').collect::<Vec<_>>()).map(drop);
    let filter = |hook| {
        tc("qdisc add dev p1 clsact")?;
        // One instruction of classic BPF: "no match".
        let filter = ["filter", "add", "dev", "p1", hook, "bpf", "bytecode", "1,6 0 0 0"];
        on_node(&mesh, "tc", &filter).map(drop)
    };
    let bends: [(&str, Act<'_>, Act<'_>); 4] = [
        ("filters", &|| filter("ingress"), &|| tc("qdisc del dev p1 clsact")),
        ("filters", &|| filter("egress"), &|| tc("qdisc del dev p1 clsact")),
        ("tbf", &|| tc("qdisc add dev p1 root tbf rate 1gbit burst 1mb latency 50ms"), &|| {
            tc("qdisc del dev p1 root")
        }),
        (
            "bridge",
            &|| {
                node.netns().ip(&format!(
                    "link add br0 type bridge\nlink set br0 up\nlink set p1 master br0\n\
                     addr add 169.254.1.1/32 dev br0\naddr add fe80::1/64 dev br0 nodad\n\
                     route replace {v4}/32 dev br0\nroute replace {v6}/128 dev br0\n"
                ))
            },
            &|| {
                node.netns().ip(&format!(
                    "link set p1 nomaster\nlink del br0\n\
                     route replace {v4}/32 dev p1\nroute replace {v6}/128 dev p1\n"
                ))
            },
        ),
    ];
    for (how, bend, straighten) in bends {
        bend()?;
        wait_for(&mesh, &["a2"], how)?;
        wait_for(&mesh, &["a1"], "on")?;
        assert_eq!(pins(&mesh, "redirect_")?.len(), 1, "{how}");
        let before = kernel(&mesh, "redirected")?;
        for family in Family::BOTH {
            let mut stream = mesh.pod("a1").connect(mesh.pod("a2").addr(family, 8080))?;
            exchange(&mut stream, b"by the node")?;
        }
        assert_eq!(kernel(&mesh, "redirected")?, before, "{how}");
        straighten()?;
        wait_for(&mesh, &["a1", "a2"], "on")?;
        let mut stream = mesh.pod("a1").connect(mesh.pod("a2").v4(8080))?;
        exchange(&mut stream, b"straight again")?;
        ensure!(kernel(&mesh, "redirected")? > before, "{how}: after it was undone");
    }
    let log = mesh.agent("a").log();
    assert_eq!(log.matches("tbf").count(), 1, "told once: {log}");
    Ok(())
}

#[test]
fn killed_agent_leaves_it_in_place_and_leaving_ends_it_without_a_gap() -> Result<()> {
    harness::require!("nft");
    harness::require_kernel!(TCX);
    let mut mesh = redirected()?;
    watch(&mesh)?;
    let _server = mesh.pod("a2").serve(8080, Serve::Echo)?;
    let to = mesh.pod("a2").v4(8080);
    let mut held = mesh.pod("a1").connect(to)?;
    let links = pins(&mesh, "redirect_")?;
    assert_eq!(links.len(), 2);
    for _ in 0..3 {
        exchange(&mut held, b"with an agent")?;
        mesh.agent_mut("a").kill()?;
        exchange(&mut held, b"without")?;
        exchange(&mut mesh.pod("a1").connect(to)?, b"a new one")?;
        mesh.agent_mut("a").restart()?;
        wait_for(&mesh, &["a1", "a2"], "on")?;
        assert_eq!(pins(&mesh, "redirect_")?, links);
    }
    assert_eq!(forwarded(&mesh, "pods_tcp")?, 0, "nothing of it went through the node");

    mesh.enrol("a2", false)?;
    until(SOON, "the pod's link to go", || {
        pins(&mesh, "redirect_").is_ok_and(|links| links.len() == 1)
    })?;
    exchange(&mut held, b"by the node")?;
    exchange(&mut mesh.pod("a1").connect(to)?, b"a new one")?;
    ensure!(forwarded(&mesh, "pods_tcp")? > 0);

    mesh.enrol("a2", true)?;
    wait_for(&mesh, &["a1", "a2"], "on")?;
    let before = kernel(&mesh, "redirected")?;
    exchange(&mut held, b"stays with the node")?;
    assert_eq!(kernel(&mesh, "redirected")?, before);
    exchange(&mut mesh.pod("a1").connect(to)?, b"a new one")?;
    ensure!(kernel(&mesh, "redirected")? > before);

    mesh.agent_mut("a").kill()?;
    let mut held = mesh.pod("a1").connect(to)?;
    let cli = mesh.agent("a").cli(&["detach"])?;
    ensure!(cli.code == 0, "detach: {}{}", cli.stdout, cli.stderr);
    let before = forwarded(&mesh, "pods_tcp")?;
    exchange(&mut held, b"detached")?;
    ensure!(forwarded(&mesh, "pods_tcp")? > before, "the program is gone");
    Ok(())
}

#[test]
fn pod_that_is_plugged_in_anew_is_redirected_again() -> Result<()> {
    harness::require!("nft");
    harness::require_kernel!(TCX);
    let mesh = redirected()?;
    let _server = mesh.pod("a2").serve(8080, Serve::Echo)?;
    let (node, pod) = (mesh.node("a"), mesh.pod("a2"));
    let (v4, v6) = (pod.v4_ip(), pod.v6_ip());
    node.netns().ip("link del p1\n")?;
    wait_for(&mesh, &["a2"], "no device of the pod")?;
    assert_eq!(pins(&mesh, "redirect_")?.len(), 1, "what hung on it is collected");
    node.netns().ip(&format!(
        "link add p1 type veth peer name eth0 netns {}\nlink set p1 up\n\
         addr add 169.254.1.1/32 dev p1\naddr add fe80::1/64 dev p1 nodad\n\
         route add {v4}/32 dev p1\nroute add {v6}/128 dev p1\n",
        pod.netns().name()
    ))?;
    pod.netns().ip(&format!(
        "link set eth0 up\naddr add {v4}/32 dev eth0\naddr add {v6}/128 dev eth0 nodad\n\
         route add 169.254.1.1/32 dev eth0 scope link\nroute add default via 169.254.1.1 dev eth0\n\
         route add default via fe80::1 dev eth0\n"
    ))?;
    wait_for(&mesh, &["a1", "a2"], "on")?;
    watch(&mesh)?;
    for family in Family::BOTH {
        exchange(&mut mesh.pod("a1").connect(pod.addr(family, 8080))?, b"hello")?;
    }
    assert_eq!(forwarded(&mesh, "pods_tcp")?, 0);
    Ok(())
}

#[test]
fn network_policies_that_would_be_skipped_are_warned_of() -> Result<()> {
    harness::require!();
    harness::require_kernel!(TCX);
    let mesh = redirected()?;
    let dir = mesh.manifests().dir().display().to_string();
    let check = |args: &[&str]| -> Result<String> {
        let cli = mesh.agent("a").cli(&[&["check", "--manifests", &dir], args].concat())?;
        ensure!(cli.code == 0, "a warning is no error: {}{}", cli.stdout, cli.stderr);
        Ok(cli.stdout)
    };
    let warning = "NetworkPolicies";
    ensure!(!check(&[ON])?.contains("‼ NetworkPol"));
    ensure!(!mesh.agent("a").log().contains(warning));
    mesh.manifests().write(
        "policy",
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\n\
         metadata: {name: deny, namespace: default}\nspec: {podSelector: {}}\n",
    )?;
    until(SOON, "the agent to warn", || mesh.agent("a").log().contains(warning))?;
    let said = check(&[ON])?;
    ensure!(said.contains("‼ NetworkPol"), "{said}");
    ensure!(!check(&[])?.contains("‼ NetworkPol"), "only with the flag");
    Ok(())
}
