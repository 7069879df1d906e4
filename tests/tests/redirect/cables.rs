//! Which cables the programs hang on, and for how long.

use std::collections::HashSet;
use std::fs;

use anyhow::{Result, ensure};
use harness::wait::{SOON, until};
use harness::{Family, Mesh, Serve, exchange};

use super::{TCX, forwarded, kernel, on_node, redirected, wait_for, watch};

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
