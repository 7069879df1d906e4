//! Whatever a snapshot takes for unread is read when somebody connects to it, and is known by that.

use std::sync::Arc;

use mesh_core::addr::Cidr;
use serde_json::{Value, json};

use super::*;
use crate::discovery::translate::{Context, NetnsFrom, translate};
use mesh_core::spiffe::TrustDomain;

const VIP: &str = "10.96.0.1";
const OWN: &str = "a";

fn pod(uid: &str, node: &str, ip: &str) -> Object {
    let pod = json!({
        "metadata": {"namespace": "default", "name": "x", "uid": uid},
        "spec": {"nodeName": node},
        "status": {"phase": "Running", "podIPs": [{"ip": ip}]},
    });
    Object::Pod(Arc::new(serde_json::from_value(pod).unwrap()))
}

/// A cluster with a service of one endpoint.
fn cluster(endpoint: &Value) -> Objects {
    let mut objects = Objects::on_demand();
    let namespace =
        json!({"metadata": {"name": "default", "annotations": {"malla.dev/mesh": "enabled"}}});
    objects.insert(Object::Namespace(Arc::new(serde_json::from_value(namespace).unwrap())));
    for (name, ips) in [(OWN, &["10.0.3.6"][..]), ("b", &["10.0.3.7", "192.168.0.7"])] {
        let ips: Vec<_> =
            ips.iter().map(|ip| json!({"type": "InternalIP", "address": ip})).collect();
        let node = json!({"metadata": {"name": name}, "status": {"addresses": ips}});
        objects.insert(Object::Node(Arc::new(serde_json::from_value(node).unwrap())));
    }
    let service = json!({
        "metadata": {"namespace": "default", "name": "web"},
        "spec": {"clusterIP": VIP, "clusterIPs": [VIP], "ports": [{"port": 80}]},
    });
    objects.insert(Object::Service(Arc::new(serde_json::from_value(service).unwrap())));
    let labels = json!({"kubernetes.io/service-name": "web"});
    let slice = json!({
        "metadata": {"namespace": "default", "name": "web-1", "labels": labels},
        "addressType": "IPv4",
        "ports": [{"port": 80}],
        "endpoints": [endpoint],
    });
    objects.insert(Object::EndpointSlice(Arc::new(serde_json::from_value(slice).unwrap())));
    objects
}

/// What the API says.
fn found(there: Option<&Object>, wanted: &Wanted) -> Found {
    let is_meant = |object: &&Object| match (object, wanted) {
        (Object::Pod(pod), Wanted::Pod { name, uid, .. }) => {
            pod.metadata.name.as_ref() == Some(name)
                && (uid.is_none() || pod.metadata.uid.as_ref() == uid.as_ref())
        }
        (pod, Wanted::Address { ip, .. }) => has(pod, *ip),
        _ => false,
    };
    there.filter(is_meant).map_or(Found::None, |pod| Found::Pods(vec![pod.clone()]))
}

fn context(pod_cidrs: &[Cidr]) -> Context {
    Context {
        node: OWN.into(),
        trust_domain: TrustDomain::new("cluster.local").unwrap(),
        tunnel_port: 15019,
        netns: NetnsFrom::Processes,
        pod_cidrs: pod_cidrs.to_vec(),
    }
}

/// Connects to the service until nothing of it is unread, and says what was read meanwhile.
fn connect(
    mut objects: Objects,
    there: Option<&Object>,
    pod_cidrs: &[Cidr],
) -> Result<Vec<Wanted>, String> {
    let context = context(pod_cidrs);
    let (here, vip) = (Here { node: OWN, pod_cidrs }, VIP.parse().unwrap());
    let (mut remote, now, mut all) = (Remote::default(), Instant::now(), Vec::new());
    for changes in 0..3 {
        if !translate(&objects, &context, 1).0.is_unread(vip) {
            return Ok(all);
        }
        let (done, _answer) = oneshot::channel();
        let asked = remote.need((&objects, changes), here, (vip, None), done, now);
        for wanted in asked {
            if matches!(wanted, Wanted::Address { ip, .. } if ip == vip) {
                return Err("it looks for a pod with the service's address".into());
            }
            let found = found(there, &wanted);
            remote.take(&mut objects, OWN, wanted.clone(), found, now);
            all.push(wanted);
        }
    }
    Err(format!("it is unread for ever, after {all:?}"))
}

/// Such as an imported one of the Multi-Cluster Services API.
#[test]
fn slice_of_another_controllers_service_is_no_problem() {
    let mut objects = cluster(&json!({"addresses": ["10.0.9.9"]}));
    let labels = json!({"multicluster.kubernetes.io/service-name": "web"});
    let slice = json!({
        "metadata": {"namespace": "default", "name": "web-imported", "labels": labels},
        "addressType": "IPv4",
        "endpoints": [{"addresses": ["10.9.0.1"]}],
    });
    objects.insert(Object::EndpointSlice(Arc::new(serde_json::from_value(slice).unwrap())));
    let (snapshot, problems) = translate(&objects, &context(&[]), 1);
    assert!(problems.is_empty(), "{problems:?}");
    assert!(!snapshot.is_unread("10.9.0.1".parse().unwrap()));
}

#[test]
fn every_endpoint_that_is_unread_is_read_by_whoever_connects() {
    let pod_cidrs: [&[Cidr]; 2] = [&[], &["10.0.0.0/16".parse().unwrap()]];
    let targets = [
        None,
        Some(json!({"name": "x"})),
        Some(json!({"name": "x", "uid": ""})),
        Some(json!({"name": "x", "uid": "uid-x"})),
        // As good as none: nobody could read it.
        Some(json!({"uid": "uid-x"})),
        Some(json!({"name": "", "uid": "uid-x"})),
    ];
    let (mut tried, mut reads) = (0, 0);
    // A node's in the pods' network and beside it, one that nobody has, and a pod's.
    for ip in ["10.0.3.7", "192.168.0.7", "10.0.9.9", "10.0.1.1"] {
        let there = [
            None,
            Some(pod("uid-x", "b", ip)),
            Some(pod("uid-x", "b", "10.0.1.2")),
            Some(pod("uid-x", OWN, "10.0.1.2")),
            Some(pod("uid-y", "b", ip)),
            Some(pod("uid-y", OWN, "10.0.1.2")),
        ];
        for (on, target) in [None, Some(OWN), Some("b")]
            .into_iter()
            .flat_map(|on| targets.iter().map(move |target| (on, target)))
        {
            let mut endpoint = json!({"addresses": [ip], "nodeName": on});
            if let Some(target) = target {
                endpoint["targetRef"] = target.clone();
                endpoint["targetRef"]["kind"] = json!("Pod");
            }
            for (there, is_known, pod_cidrs) in there.iter().flat_map(|there| {
                [false, true].into_iter().flat_map(move |is_known| {
                    pod_cidrs.map(|cidrs| (there.as_ref(), is_known, cidrs))
                })
            }) {
                let mut objects = cluster(&endpoint);
                // This node's are followed.
                if let Some(there) = there.filter(|there| is_known || is_on(there, OWN)) {
                    objects.insert(there.clone());
                }
                let connected = connect(objects, there, pod_cidrs);
                let all = connected.unwrap_or_else(|why| {
                    panic!("{endpoint} where {there:?} is, known: {is_known}, pods in {pod_cidrs:?}: {why}")
                });
                (tried, reads) = (tried + 1, reads + all.len());
            }
        }
    }
    assert!(tried > 500 && reads > 200, "{tried} tried, {reads} reads");
}
