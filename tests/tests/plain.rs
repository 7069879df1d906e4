//! The harness itself, without a mesh: what every other test takes for granted.

use std::io::{Read as _, Write as _};

use anyhow::{Result, ensure};
use harness::{Family, Mesh, Pattern, Serve, exchange, exchange_patterns, is_reset};

#[test]
fn pods_reach_each_other_across_the_link_in_both_families() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes_builder().plain().start()?;
    let server = mesh.pod("b1").serve(8080, Serve::Echo)?;
    for family in Family::BOTH {
        let mut stream = mesh.pod("a1").connect(mesh.pod("b1").addr(family, 8080))?;
        exchange(&mut stream, b"hello")?;
        assert_eq!(server.clients().pop(), Some(stream.local_addr()?));
    }
    Ok(())
}

#[test]
fn services_are_translated_where_there_is_no_mesh() -> Result<()> {
    harness::require!("nft");
    let mesh = Mesh::two_nodes_builder().plain().start()?;
    let servers = [
        mesh.pod("b1").serve(8080, Serve::Echo)?,
        mesh.pod("b2").serve(8080, Serve::Echo)?,
        mesh.pod("a2").serve(8080, Serve::Greet("a2"))?,
    ];
    for family in Family::BOTH {
        for _ in 0..8 {
            let mut stream = mesh.pod("a1").connect(mesh.service("both").addr(family, 80))?;
            exchange(&mut stream, b"hello")?;
        }
        let mut stream = mesh.pod("a1").connect(mesh.service("a").addr(family, 80))?;
        let mut greeting = [0; 2];
        stream.read_exact(&mut greeting)?;
        assert_eq!(&greeting, b"a2");
    }
    assert_eq!(servers[0].clients().len() + servers[1].clients().len(), 16);
    assert_eq!(servers[2].clients().len(), 2);
    Ok(())
}

#[test]
fn bulk_crosses_both_ways_at_once() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes_builder().plain().start()?;
    let bytes = 20_000_000;
    let server = mesh.pod("b1").serve(8080, Serve::Exchange(bytes))?;
    let stream = mesh.pod("a1").connect(mesh.pod("b1").v4(8080))?;
    exchange_patterns(&stream, bytes, Pattern::CLIENT, Pattern::SERVER)?;
    harness::wait::until(harness::wait::SOON, "the server to have seen it all", || {
        server.outcomes() == [Ok(())]
    })
}

#[test]
fn reset_is_told_from_an_end() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes_builder().plain().start()?;
    let _resets = mesh.pod("b1").serve(1, Serve::ResetAfter(1))?;
    let _ends = mesh.pod("b1").serve(2, Serve::Source(0))?;
    let mut stream = mesh.pod("a1").connect(mesh.pod("b1").v4(1))?;
    stream.write_all(b"x")?; // Not before the client knows that it is connected.
    assert!(is_reset(&mut stream));
    assert!(!is_reset(&mut mesh.pod("a1").connect(mesh.pod("b1").v4(2))?));
    Ok(())
}

#[test]
fn nothing_stays_behind() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes_builder().plain().start()?;
    let mut places = vec![mesh.state_dir().to_owned()];
    places.extend(mesh.pods().iter().map(|pod| pod.netns().path()));
    places.extend(mesh.nodes().iter().map(|node| node.netns().path()));
    for place in &places {
        ensure!(place.exists(), "{} is not there", place.display());
    }
    drop(mesh);
    for place in &places {
        ensure!(!place.exists(), "{} is still there", place.display());
    }
    Ok(())
}
