//! What the pure stages cost: route, balance, authorize, and the frames of the wire.
//!
//! In a cluster of 5,000 pods and 1,000 services: what a decision takes must not grow with it.
#![expect(clippy::expect_used, reason = "a benchmark that cannot be set up has nothing to tell")]

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use divan::counter::ItemsCount;
use divan::{Bencher, black_box};
use mesh_core::addr::{EndpointAddr, OrigDst, PeerAddr};
use mesh_core::authorize::{Request, Via, authorize};
use mesh_core::balance::{Loads, Policy};
use mesh_core::locality::InternalTraffic;
use mesh_core::route::{route, way};
use mesh_core::settings::Settings;
use mesh_core::snapshot::{
    Endpoint, Enrolment, Node, Parts, Service, ServicePort, Snapshot, Workload, WorkloadNames,
};
use mesh_core::spiffe::{SpiffeId, TrustDomain};
use mesh_core::wire::{Decoder, HEADER_LEN, OPEN_LEN, Open, Role, data_header, encode_answer};

const PODS: u16 = 5_000;
const SERVICES: u16 = 1_000;
const NODES: u16 = 50;

fn main() {
    divan::main();
}

fn pod_ip(number: u16) -> IpAddr {
    let [high, low] = number.to_be_bytes();
    Ipv4Addr::new(10, 1, high, low).into()
}

fn vip(number: u16) -> IpAddr {
    let [high, low] = number.to_be_bytes();
    Ipv4Addr::new(10, 96, high, low).into()
}

fn at(ip: IpAddr, port: u16) -> SocketAddr {
    SocketAddr::new(ip, port)
}

fn pod(number: u16) -> Arc<Workload> {
    let name: Arc<str> = format!("pod-{number}").into();
    let domain = TrustDomain::new("cluster.local").expect("a trust domain");
    let account = format!("account-{}", number % SERVICES);
    Arc::new(Workload {
        uid: (&*name).into(),
        namespace: "shop".into(),
        name: Arc::clone(&name),
        identity: SpiffeId::new(domain, "shop", &account).expect("an identity"),
        node: format!("node-{}", number % NODES).into(),
        ips: vec![pod_ip(number)],
        names: WorkloadNames {
            workload: Arc::clone(&name),
            app: Arc::clone(&name),
            version: "v1".into(),
            canonical_service: Arc::clone(&name),
            canonical_revision: "v1".into(),
        },
        enrolment: Enrolment::Enrolled,
        settings: Settings::default(),
        provisional: false,
        netns: None,
    })
}

fn endpoint(workload: &Arc<Workload>) -> Endpoint {
    Endpoint { addr: EndpointAddr(at(workload.ips[0], 8080)), workload: Some(Arc::clone(workload)) }
}

/// What `node-1` knows. Service `n` has pods `n`, `n + 1000`, … behind it.
fn cluster() -> Snapshot {
    let workloads: Vec<_> = (0..PODS).map(pod).collect();
    let services = (0..SERVICES).map(|number| {
        let behind = workloads.iter().skip(number.into()).step_by(SERVICES.into());
        let endpoints: Arc<[_]> = behind.map(endpoint).collect();
        Arc::new(Service {
            namespace: "shop".into(),
            name: format!("service-{number}").into(),
            host: format!("service-{number}.shop.svc.cluster.local").into(),
            vips: vec![vip(number)],
            selector: true,
            ports: vec![ServicePort::everywhere(80, "", endpoints)],
            traffic: InternalTraffic::Cluster,
            distribution: None,
            affinity: None,
        })
    });
    let nodes: HashMap<Arc<str>, Node> = (0..NODES)
        .map(|number| {
            let peer = PeerAddr(at(Ipv4Addr::new(192, 0, 2, 1).into(), 15_000 + number));
            (format!("node-{number}").into(), Node { peers: vec![peer] })
        })
        .collect();
    let parts = Parts { services: services.collect(), workloads, nodes, ..Parts::default() };
    let domain = TrustDomain::new("cluster.local").expect("a trust domain");
    Snapshot::new(1, "node-1".into(), domain, parts)
}

/// To a service, to a pod by its address, and to a place that the mesh does not know.
#[divan::bench(args = [("service", vip(77)), ("pod", pod_ip(4_321)), ("outside", Ipv4Addr::new(203, 0, 113, 9).into())])]
fn route_to(bencher: Bencher<'_, '_>, (_what, ip): (&str, IpAddr)) {
    let snapshot = cluster();
    let dst = OrigDst(at(ip, 80));
    bencher.bench_local(|| route(black_box(&snapshot), black_box(dst)));
}

/// Which way leads to a pod of another node.
#[divan::bench]
fn way_to_another_node(bencher: Bencher<'_, '_>) {
    let snapshot = cluster();
    let workload = snapshot.workload_at(pod_ip(2)).cloned();
    bencher.bench_local(|| way(black_box(&snapshot), black_box(workload.as_ref())));
}

/// One endpoint chosen, accepted and done with, of so many.
#[divan::bench(args = [2, 32, 1_000])]
fn balance_among(bencher: Bencher<'_, '_>, endpoints: u16) {
    let endpoints: Vec<_> = (0..endpoints).map(|number| endpoint(&pod(number))).collect();
    let (mut loads, mut draws) = (Loads::default(), 0usize);
    #[expect(clippy::disallowed_methods, reason = "a bench may ask what time it is")]
    let start = Instant::now();
    let mut now = start;
    bencher.bench_local(|| {
        now += Duration::from_micros(100);
        let draw = |among: usize| {
            draws = draws.wrapping_add(0x9e37_79b9);
            draws % among
        };
        let index = loads.pick(Policy::LeastLoaded, &endpoints, &[], now, draw);
        let addr = endpoints[index.expect("an endpoint")].addr;
        loads.accepted(addr, &endpoints, now, Duration::from_micros(300));
        loads.finished(addr);
    });
}

/// A request from another node for a pod of this one.
#[divan::bench]
fn authorize_from_another_node(bencher: Bencher<'_, '_>) {
    let snapshot = cluster();
    let find = |number| snapshot.workload_at(pod_ip(number)).expect("a pod");
    let (server, client) = (find(1), find(2));
    let request = Request {
        to: EndpointAddr(at(server.ips[0], 8080)),
        client: at(client.ips[0], 40_000),
        via: Via::Tunnel { caller: &client.identity, served_as: &server.identity },
    };
    bencher.bench_local(|| authorize(black_box(&snapshot), black_box(&request)));
}

fn open() -> Open {
    Open {
        flow: 7,
        trace: [3; 16],
        destination: EndpointAddr(at(pod_ip(1), 8080)),
        source: at(pod_ip(2), 40_000),
    }
}

/// OPEN with 64 bytes of payload and the end behind it, and the answer, as frames.
#[divan::bench]
fn wire_small_flow(bencher: Bencher<'_, '_>) {
    let (mut server, mut client) = (Decoder::new(Role::Server), Decoder::new(Role::Client));
    let mut frames = [0; OPEN_LEN + HEADER_LEN + 64 + HEADER_LEN];
    bencher.bench_local(|| {
        frames[..OPEN_LEN].copy_from_slice(&black_box(open()).encode());
        frames[OPEN_LEN..OPEN_LEN + HEADER_LEN].copy_from_slice(&data_header(64));
        frames[OPEN_LEN + HEADER_LEN + 64..].copy_from_slice(&mesh_core::wire::FIN);
        drain(&mut server, &frames);
        drain(&mut client, &encode_answer(Ok(())));
        drain(&mut client, &mesh_core::wire::FIN);
    });
}

/// Frames of bulk: 64 KiB each, a header and payload that is only walked over.
#[divan::bench]
fn wire_bulk_frame(bencher: Bencher<'_, '_>) {
    const LEN: usize = 64 * 1024;
    let mut decoder = Decoder::new(Role::Server);
    drain(&mut decoder, &open().encode());
    let mut frame = vec![0; HEADER_LEN + LEN];
    frame[..HEADER_LEN].copy_from_slice(&data_header(LEN));
    bencher.counter(ItemsCount::new(1usize)).bench_local(|| drain(&mut decoder, black_box(&frame)));
}

fn drain(decoder: &mut Decoder, mut input: &[u8]) {
    while let Some(event) = decoder.next(&mut input).expect("frames in order") {
        black_box(event);
    }
}
