//! A pod that dials address after address, in a large cluster. No server.

use std::net::{IpAddr, Ipv4Addr};

use tokio::time::Instant;

use super::state::nothing;
use super::*;
use crate::discovery::cluster::State;
use crate::discovery::cluster::demand::Wanted;
use crate::discovery::kube::{Endpoint, EndpointSlice, ObjectMeta, Service, ServiceSpec};
use crate::discovery::objects::Object;
use crate::discovery::objects::testing::walks;
use crate::discovery::services::SERVICE_NAME;

const SERVICES: u32 = 2000;
const ENDPOINTS: u32 = 10;
/// Those that are dialled are from here on.
const FREE: u32 = Ipv4Addr::new(10, 200, 0, 0).to_bits();

fn address(n: u32) -> IpAddr {
    Ipv4Addr::from_bits(n).into()
}

fn meta(name: String) -> ObjectMeta {
    ObjectMeta { name: Some(name), ..ObjectMeta::default() }
}

/// Services at 10.96.0.0 and further, their endpoints at 10.100.0.0 and further, on another node.
fn large() -> State {
    let mut state = nothing();
    let spec = json!({"podCIDRs": ["10.100.0.0/16", "10.200.0.0/16"]});
    let node = json!({"metadata": {"name": "b"}, "spec": spec});
    state.objects.insert(Object::Node(Arc::new(serde_json::from_value(node).unwrap())));
    for n in 0..SERVICES {
        let vip = address(Ipv4Addr::new(10, 96, 0, 0).to_bits() + n).to_string();
        let spec = Some(ServiceSpec { cluster_ip: Some(vip), ..ServiceSpec::default() });
        let service = Service { metadata: meta(format!("s{n}")), spec };
        state.objects.insert(Object::Service(Arc::new(service)));
        let endpoint = |of_it: u32| {
            let first = Ipv4Addr::new(10, 100, 0, 0).to_bits() + n * ENDPOINTS;
            let address = Some(address(first + of_it).to_string().into());
            Endpoint { address, node_name: Some("b".into()), ..Endpoint::default() }
        };
        let mut metadata = meta(format!("s{n}-1"));
        metadata.labels = Some([(SERVICE_NAME, format!("s{n}"))].into_iter().collect());
        let endpoints = Some((0..ENDPOINTS).map(endpoint).collect());
        let slice = EndpointSlice { metadata, endpoints, ..EndpointSlice::default() };
        state.objects.insert(Object::EndpointSlice(Arc::new(slice)));
    }
    state
}

/// One turn for one demand.
fn dial(state: &mut State, ip: IpAddr, now: Instant) -> Vec<Wanted> {
    let (done, _answer) = oneshot::channel();
    let to_read = state.demand(Demand::Know { ip, caller: None, done }, now);
    state.answer();
    to_read
}

#[test]
fn address_that_nobody_knows_costs_no_look_at_every_service() {
    let mut state = large();
    let now = Instant::now();
    let before = walks();
    let asked: usize = (0..10_000).map(|n| dial(&mut state, address(FREE + n), now).len()).sum();
    assert_eq!(asked, 4096, "as many as may be looked for");
    assert_eq!(walks(), before);
    dial(&mut state, ip("10.96.0.7"), now);
    assert!(walks() > before, "otherwise they are not counted");
}

/// Also where no address may be looked for any more.
#[test]
fn address_of_a_service_or_an_endpoint_is_still_read_in_the_midst_of_a_scan() {
    let mut state = large();
    let now = Instant::now();
    for n in 0..5000 {
        dial(&mut state, address(FREE + n), now);
    }
    let vip = dial(&mut state, ip("10.96.0.7"), now);
    assert_eq!(vip.len(), ENDPOINTS as usize);
    assert_eq!(dial(&mut state, ip("10.100.1.0"), now).len(), 1);
}
