//! Agents end, are killed and start again; what they leave in the kernel goes on, or is taken away.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use harness::{Carrier, Family, Mesh, PodSpec, Serve, exchange, is_reset};

const AT_ONCE: Duration = Duration::from_secs(1);

#[test]
fn agent_that_is_asked_to_end_lets_connections_finish() -> Result<()> {
    harness::require!();
    let mut mesh = Mesh::two_nodes_builder().flag("--drain-s=20").start()?;
    let _server = mesh.pod("b1").serve(8080, Serve::Echo)?;
    let to = mesh.service("b").v4(80);
    let mut held = mesh.pod("a1").connect(to)?;
    exchange(&mut held, b"before")?;

    mesh.agent_mut("a").terminate()?;
    harness::wait::until(harness::wait::SOON, "the agent to be no longer ready", || {
        !mesh.agent("a").is_ready()
    })?;
    for _ in 0..10 {
        exchange(&mut held, b"while it drains")?;
    }
    let took = mesh.pod("a1").refused(to)?;
    ensure!(took < AT_ONCE, "a new connection was refused after {took:?}");
    drop(held);

    let started = Instant::now();
    let status = mesh.agent_mut("a").wait_until_gone(Duration::from_secs(10))?;
    ensure!(status.success(), "{status}");
    ensure!(started.elapsed() < Duration::from_secs(5), "nothing was open any more");
    mesh.agent_mut("a").restart()?;
    exchange(&mut mesh.pod("a1").connect(to)?, b"after")
}

/// The other end of the tunnel: the clients' agent lives, and learns why.
#[test]
fn servers_agent_that_is_asked_to_end_lets_connections_finish() -> Result<()> {
    harness::require!();
    for carrier in Carrier::BOTH {
        let mut mesh = Mesh::two_nodes_builder()
            .pod(PodSpec::new("far", "a").annotation("malla.dev/mesh", "disabled"))
            .carrier(carrier)
            .flag("--drain-s=20")
            .start()?;
        let _server = mesh.pod("b1").serve(8080, Serve::Echo)?;
        let to = mesh.service("b").v4(80);
        let mut held = mesh.pod("a1").connect(to)?;
        exchange(&mut held, b"before")?;

        mesh.agent_mut("b").terminate()?;
        harness::wait::until(harness::wait::SOON, "the agent to be no longer ready", || {
            !mesh.agent("b").is_ready()
        })?;
        let took = mesh.pod("a1").refused(to)?;
        ensure!(took < Duration::from_secs(3), "{carrier:?}: refused after {took:?}");
        // And so is whoever comes in plain text.
        let took = mesh.pod("far").refused(mesh.pod("b1").v4(8080))?;
        ensure!(took < AT_ONCE, "{carrier:?}: refused after {took:?}");
        for _ in 0..10 {
            exchange(&mut held, b"while it drains")?;
        }
        drop(held);

        let started = Instant::now();
        let status = mesh.agent_mut("b").wait_until_gone(Duration::from_secs(10))?;
        ensure!(status.success(), "{carrier:?}: {status}");
        ensure!(started.elapsed() < Duration::from_secs(5), "nothing was open any more");
        mesh.agent_mut("b").restart()?;
        harness::wait::until(harness::wait::SOON, "the mesh to work again", || {
            mesh.pod("a1").connect(to).and_then(|mut s| exchange(&mut s, b"after")).is_ok()
        })?;
    }
    Ok(())
}

#[test]
fn connections_that_do_not_finish_are_cut_when_the_drain_ends() -> Result<()> {
    harness::require!();
    for carrier in Carrier::BOTH {
        for node in ["a", "b"] {
            let builder = Mesh::two_nodes_builder().flag("--drain-s=2").carrier(carrier);
            let mut mesh = builder.start()?;
            let server = mesh.pod("b1").serve(8080, Serve::Echo)?;
            let mut held = mesh.pod("a1").connect(mesh.service("b").v4(80))?;
            exchange(&mut held, b"before")?;
            mesh.agent_mut(node).terminate()?;
            mesh.agent_mut(node).wait_until_gone(Duration::from_secs(10))?;
            // At either end, and not when one of them has waited in vain for the other one's agent.
            let gone = Instant::now();
            assert!(is_reset(&mut held), "{carrier:?}, {node}: cut off must not look like an end");
            harness::wait::until(harness::wait::SOON, "the server to see an error", || {
                server.outcomes().iter().any(Result::is_err)
            })?;
            let took = gone.elapsed();
            ensure!(took < Duration::from_secs(5), "{carrier:?}, {node}: known after {took:?}");
        }
    }
    Ok(())
}

#[test]
fn killed_agent_is_an_error_to_both_programs_and_comes_back() -> Result<()> {
    harness::require!();
    let mut mesh = Mesh::two_nodes()?;
    let server = mesh.pod("b1").serve(8080, Serve::Echo)?;
    let to = mesh.service("b").v4(80);
    for node in ["a", "b"] {
        let before = server.outcomes().len();
        let mut held = mesh.pod("a1").connect(to)?;
        exchange(&mut held, b"before")?;
        mesh.agent_mut(node).kill()?;
        assert!(is_reset(&mut held), "{node}: the client must see an error");
        // The one before it may end only now, and cleanly.
        harness::wait::until(harness::wait::SOON, "the server to see an error", || {
            server.outcomes()[before..].iter().any(Result::is_err)
        })?;

        let took = mesh.pod("a1").refused(to)?;
        ensure!(took < Duration::from_secs(6), "{node}: refused after {took:?}");
        if node == "a" {
            ensure!(took < AT_ONCE, "nobody listens: refused after {took:?}");
        }
        mesh.agent_mut(node).restart()?;
        harness::wait::until(harness::wait::SOON, "the mesh to work again", || {
            mesh.pod("a1").connect(to).and_then(|mut s| exchange(&mut s, b"after")).is_ok()
        })?;
    }
    Ok(())
}

#[test]
fn agent_that_is_killed_again_and_again_starts_every_time() -> Result<()> {
    harness::require!();
    let mut mesh = Mesh::two_nodes()?;
    let _server = mesh.pod("b1").serve(8080, Serve::Echo)?;
    let pins = |mesh: &Mesh| -> Result<usize> {
        let mut pending = vec![mesh.agent("a").bpffs()];
        let mut files = 0;
        while let Some(path) = pending.pop() {
            for entry in fs::read_dir(&path)? {
                let path = entry?.path();
                if path.is_dir() { pending.push(path) } else { files += 1 }
            }
        }
        Ok(files)
    };
    let before = pins(&mesh)?;
    for _ in 0..5 {
        mesh.agent_mut("a").kill()?;
        mesh.agent_mut("a").restart()?;
        exchange(&mut mesh.pod("a1").connect(mesh.service("b").v4(80))?, b"again")?;
        assert_eq!(pins(&mesh)?, before, "a restart takes the pins over and adds none");
    }
    Ok(())
}

#[test]
fn detach_leaves_no_trace() -> Result<()> {
    harness::require!();
    let mut mesh = Mesh::two_nodes()?;
    let server = mesh.pod("b1").serve(8080, Serve::Echo)?;
    let to = Family::BOTH.map(|family| mesh.pod("b1").addr(family, 8080));
    for to in to {
        exchange(&mut mesh.pod("a1").connect(to)?, b"through the mesh")?;
    }
    for node in ["a", "b"] {
        mesh.agent_mut(node).kill()?;
    }
    // What is pinned goes on capturing, and nobody listens.
    for to in to {
        mesh.pod("a1").refused(to)?;
    }
    for node in ["a", "b"] {
        let cli = mesh.agent(node).cli(&["detach"])?;
        ensure!(cli.code == 0, "detach: {}{}", cli.stdout, cli.stderr);
        let dir = mesh.agent(node).bpffs();
        let left = fs::read_dir(&dir).map_or(0, Iterator::count);
        assert_eq!(left, 0, "{} is not empty", dir.display());
        for file in ["admin.sock", "quic-reset.key"] {
            let path = mesh.agent(node).admin_socket().with_file_name(file);
            ensure!(cli.stdout.contains(&path.display().to_string()), "{}", cli.stdout);
            ensure!(!path.exists(), "{} is left", path.display());
        }
    }
    for to in to {
        let mut stream = mesh.pod("a1").connect(to)?;
        exchange(&mut stream, b"plain")?;
        assert_eq!(server.clients().pop(), Some(stream.local_addr()?));
    }
    Ok(())
}

/// What a container has mounted is removed where it lies, and only if nobody else has something there.
#[test]
fn detach_in_a_container_removes_the_nodes_directories() -> Result<()> {
    harness::require!("unshare");
    let mut mesh = Mesh::two_nodes()?;
    mesh.agent_mut("a").kill()?;
    let agent = mesh.agent("a");
    let bpffs = agent.bpffs();
    let [run, inside] = ["run", "inside"].map(|name| agent.admin_socket().with_file_name(name));
    let [inside_bpf, inside_run] = ["bpf", "run"].map(|name| inside.join(name));
    for dir in [&run, &inside_bpf, &inside_run] {
        fs::create_dir_all(dir)?;
    }
    let theirs = run.join("theirs");
    fs::write(&theirs, "")?;
    fs::write(run.join("admin.lock"), "")?;
    let detach = || -> Result<Vec<PathBuf>> {
        let mounts = [(&*bpffs, &*inside_bpf), (&*run, &*inside_run)];
        let socket = inside_run.join("admin.sock");
        let flags = [("--bpffs", &inside_bpf), ("--admin-socket", &socket)];
        let flags = flags.map(|(flag, value)| format!("{flag}={}", value.display()));
        let args = ["detach", &flags[0], &flags[1], "-o", "json"];
        let cli = agent.cli_in_container(&inside, mounts, &args)?;
        ensure!(cli.code == 0, "detach: {}{}", cli.stdout, cli.stderr);
        let said: serde_json::Value = serde_json::from_str(&cli.stdout)?;
        Ok(serde_json::from_value(said["removed"].clone())?)
    };
    let removed = detach()?;
    ensure!(removed.contains(&inside_bpf) && !removed.contains(&inside_run), "{removed:?}");
    ensure!(!bpffs.exists(), "{} is left", bpffs.display());
    let left: Vec<_> = fs::read_dir(&run)?.collect::<Result<Vec<_>, _>>()?;
    assert_eq!(left.iter().map(fs::DirEntry::path).collect::<Vec<_>>(), [&*theirs]);

    fs::remove_file(&theirs)?;
    fs::create_dir(&bpffs)?;
    assert_eq!(detach()?, [&*inside_bpf, &*inside_run]);
    for dir in [&bpffs, &run] {
        ensure!(!dir.exists(), "{} is left", dir.display());
    }
    Ok(())
}

#[test]
fn detach_removes_nothing_beside_an_agent_that_runs() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes()?;
    let _server = mesh.pod("b1").serve(8080, Serve::Echo)?;
    let agent = mesh.agent("a");
    let cli = agent.cli(&["detach"])?;
    ensure!(cli.code == 1 && cli.stdout.is_empty(), "{}: {}", cli.code, cli.stdout);
    let socket = agent.admin_socket().display().to_string();
    ensure!(cli.stderr.contains(&socket), "{}", cli.stderr);
    // Who runs it elsewhere, where the agent's socket is not: in a container to look around in.
    let cli = agent.cli(&["detach", "--admin-socket", "/nowhere/admin.sock"])?;
    ensure!(cli.code == 1 && cli.stdout.is_empty(), "{}: {}", cli.code, cli.stdout);
    ensure!(cli.stderr.contains(&agent.bpffs().display().to_string()), "{}", cli.stderr);

    let before = agent.metric("istio_tcp_connections_opened_total", &[])?;
    exchange(&mut mesh.pod("a1").connect(mesh.pod("b1").v4(8080))?, b"still in the mesh")?;
    agent.wait_for_metric("istio_tcp_connections_opened_total", &[], before + 1.0)
}

#[test]
fn pod_that_fails_open_goes_on_without_its_agent() -> Result<()> {
    harness::require!();
    let mut mesh = Mesh::two_nodes_builder()
        .pod(PodSpec::new("a1", "a").annotation("malla.dev/fail-open", "true"))
        .start()?;
    let _server = mesh.pod("b1").serve(8080, Serve::Echo)?;
    let to = mesh.pod("b1").v4(8080);
    exchange(&mut mesh.pod("a1").connect(to)?, b"through the mesh")?;
    mesh.agent_mut("a").kill()?;
    // The agent's heartbeat counts as missing after five seconds.
    harness::wait::until(Duration::from_secs(20), "the pod to bypass the mesh", || {
        mesh.pod("a1").connect(to).and_then(|mut s| exchange(&mut s, b"plain")).is_ok()
    })?;
    mesh.pod("a2").refused(to)?;

    mesh.agent_mut("a").restart()?;
    let before = mesh.agent("a").metric("istio_tcp_connections_opened_total", &[])?;
    exchange(&mut mesh.pod("a1").connect(to)?, b"back in the mesh")?;
    mesh.agent("a").wait_for_metric("istio_tcp_connections_opened_total", &[], before + 1.0)
}

/// An agent that ends takes nothing new for as long as it has something open.
#[test]
fn pod_that_fails_open_does_not_wait_for_the_end_of_a_drain() -> Result<()> {
    harness::require!();
    let mut mesh = Mesh::two_nodes_builder()
        .pod(PodSpec::new("a1", "a").annotation("malla.dev/fail-open", "true"))
        .flag("--drain-s=60")
        .start()?;
    let _server = mesh.pod("b1").serve(8080, Serve::Echo)?;
    let to = mesh.pod("b1").v4(8080);
    let mut held = mesh.pod("a2").connect(to)?;
    exchange(&mut held, b"through the mesh")?;
    mesh.agent_mut("a").terminate()?;
    harness::wait::until(Duration::from_secs(20), "the pod to bypass the mesh", || {
        mesh.pod("a1").connect(to).and_then(|mut s| exchange(&mut s, b"plain")).is_ok()
    })?;
    mesh.pod("a2").refused(to)?;
    exchange(&mut held, b"it drains still")?;
    Ok(())
}

#[test]
fn pod_that_fails_open_is_reached_without_its_agent_unless_it_is_strict() -> Result<()> {
    harness::require!();
    let open = |name| PodSpec::new(name, "b").annotation("malla.dev/fail-open", "true");
    let mut mesh = Mesh::two_nodes_builder()
        .pod(open("b1"))
        .pod(open("b3").annotation("malla.dev/mode", "strict"))
        .pod(PodSpec::new("far", "a").annotation("malla.dev/mesh", "disabled"))
        .start()?;
    let server = mesh.pod("b1").serve(8080, Serve::Echo)?;
    let _others = ["b2", "b3"].map(|pod| mesh.pod(pod).serve(8080, Serve::Echo));
    mesh.agent_mut("b").kill()?;
    mesh.pod("far").refused(mesh.pod("b1").v4(8080))?;
    for family in Family::BOTH {
        let to = mesh.pod("b1").addr(family, 8080);
        harness::wait::until(Duration::from_secs(20), "the pod to be reached", || {
            mesh.pod("far").connect(to).and_then(|mut s| exchange(&mut s, b"plain")).is_ok()
        })?;
        let mut stream = mesh.pod("far").connect(to)?;
        exchange(&mut stream, b"nobody in between")?;
        assert_eq!(server.clients().pop(), Some(stream.local_addr()?));
        // Who does not ask for it stays closed, and who wants no plain text never gets any.
        for pod in ["b2", "b3"] {
            mesh.pod("far").refused(mesh.pod(pod).addr(family, 8080))?;
        }
    }
    Ok(())
}
