//! What is captured and what is not, by what the mesh is and what the pods ask for.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};

use anyhow::Result;
use harness::{Family, Mesh, PodSpec, Serve, exchange};

use super::LIMIT;

#[test]
fn what_is_not_in_the_mesh_is_left_alone() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes_builder()
        .pod(PodSpec::new("outsider", "b").annotation("malla.dev/mesh", "disabled"))
        .start()?;
    let _server = mesh.pod("outsider").serve(8080, Serve::Echo)?;
    let before = mesh.agent("a").metric("istio_tcp_connections_opened_total", &[])?;
    // The node itself: known to no manifest as a pod or a service.
    let outside =
        mesh.node("b").netns().run(|| Ok(TcpListener::bind((Ipv4Addr::UNSPECIFIED, 9))?))?;
    let dialled = mesh.pod("a1").connect((mesh.node("b").v4(), 9).into())?;
    let (_accepted, client) = outside.accept()?;
    assert_eq!(client, dialled.local_addr()?, "nothing stands between them");

    // Programs talk to themselves and over UDP as ever.
    let inside = mesh.pod("a1").serve(7000, Serve::Echo)?;
    let mut stream = mesh.pod("a1").connect((Ipv6Addr::LOCALHOST, 7000).into())?;
    exchange(&mut stream, b"loopback")?;
    assert_eq!(inside.clients(), [stream.local_addr()?]);
    let receiver = mesh.pod("b1").run(|| Ok(UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 53))?))?;
    receiver.set_read_timeout(Some(LIMIT))?;
    let sender = mesh.pod("a1").run(|| {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        socket.connect(mesh.pod("b1").v4(53))?;
        socket.send(b"query")?;
        Ok(socket)
    })?;
    let (n, from) = receiver.recv_from(&mut [0; 16])?;
    assert_eq!((n, from.port()), (5, sender.local_addr()?.port()));

    let after = mesh.agent("a").metric("istio_tcp_connections_opened_total", &[])?;
    assert_eq!(after, before, "the agent carried none of these");
    Ok(())
}

#[test]
fn everything_is_captured_where_the_namespace_asks_for_it() -> Result<()> {
    harness::require!();
    let mesh =
        Mesh::two_nodes_builder().namespace("default", &[("malla.dev/outbound", "all")]).start()?;
    let outside =
        mesh.node("b").netns().run(|| Ok(TcpListener::bind((Ipv4Addr::UNSPECIFIED, 9))?))?;
    let to = SocketAddr::from((mesh.node("b").v4(), 9));
    let mut dialled = mesh.pod("a1").connect(to)?;
    let (mut accepted, client) = outside.accept()?;
    assert_eq!(client.ip(), mesh.pod("a1").v4_ip(), "it leaves from inside the pod");
    dialled.write_all(b"out")?;
    let mut heard = [0; 3];
    accepted.read_exact(&mut heard)?;
    assert_eq!(&heard, b"out");
    assert_eq!(dialled.peer_addr()?, to);
    drop((dialled, accepted));

    let record = mesh.agent("a").wait_for_record(&[("way", "passthrough")])?;
    assert_eq!(record.text("dst.addr"), to.to_string());
    assert_eq!(record.number("bytes_sent"), 3);
    Ok(())
}

#[test]
fn skip_lists_are_left_alone() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes_builder()
        .pod(PodSpec::new("a1", "a").annotation("malla.dev/skip-outbound-ports", "8081,9000-9010"))
        .start()?;
    let (a1, b1) = (mesh.pod("a1"), mesh.pod("b1"));
    let opened = || mesh.agent("a").metric("istio_tcp_connections_opened_total", &[]);
    for (port, captured) in
        [(8080, true), (8081, false), (9000, false), (9010, false), (9011, true)]
    {
        let _server = b1.serve(port, Serve::Echo)?;
        let before = opened()?;
        let mut stream = a1.connect(b1.v4(port))?;
        exchange(&mut stream, b"hello")?;
        drop(stream);
        if captured {
            mesh.agent("a").wait_for_metric(
                "istio_tcp_connections_opened_total",
                &[],
                before + 1.0,
            )?;
        } else {
            assert_eq!(opened()?, before, "port {port} is not for the mesh");
        }
    }
    Ok(())
}

#[test]
fn address_blocks_of_the_skip_list_are_left_alone() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes_builder()
        .namespace("default", &[("malla.dev/skip-outbound-cidrs", "10.0.0.0/8")])
        .start()?;
    let _server = mesh.pod("b1").serve(8080, Serve::Echo)?;
    let before = mesh.agent("a").metric("istio_tcp_connections_opened_total", &[])?;
    exchange(&mut mesh.pod("a1").connect(mesh.pod("b1").v4(8080))?, b"plain")?;
    assert_eq!(mesh.agent("a").metric("istio_tcp_connections_opened_total", &[])?, before);
    exchange(&mut mesh.pod("a1").connect(mesh.pod("b1").v6(8080))?, b"carried")?;
    mesh.agent("a").wait_for_metric("istio_tcp_connections_opened_total", &[], before + 1.0)
}

#[test]
fn block_of_all_ipv6_addresses_leaves_ipv4_in_the_mesh() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes_builder()
        .namespace("default", &[("malla.dev/skip-outbound-cidrs", "::/0")])
        .start()?;
    let server = mesh.pod("b1").serve(8080, Serve::Echo)?;
    // Dialled as IPv4 and as IPv6: the address is an IPv4 one in either case.
    let v4 = mesh.pod("b1").v4(8080);
    for to in [v4, (mesh.pod("b1").v4_ip().to_ipv6_mapped(), 8080).into()] {
        let mut stream = mesh.pod("a1").connect(to)?;
        exchange(&mut stream, b"carried")?;
        let source = SocketAddr::from((mesh.pod("a1").v4_ip(), stream.local_addr()?.port()));
        drop(stream);
        let source = source.to_string();
        mesh.agent("a").wait_for_record(&[("src.addr", &source), ("way", "tunnel")])?;
    }
    let before = mesh.agent("a").metric("istio_tcp_connections_opened_total", &[])?;
    let mut stream = mesh.pod("a1").connect(mesh.pod("b1").v6(8080))?;
    exchange(&mut stream, b"plain")?;
    assert_eq!(server.clients().pop().map(|seen| seen.ip()), Some(mesh.pod("a1").ip(Family::V6)));
    assert_eq!(mesh.agent("a").metric("istio_tcp_connections_opened_total", &[])?, before);
    Ok(())
}
