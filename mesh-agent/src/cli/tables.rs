//! The tables of what a running agent is asked, with the headers that `istioctl` users know.

use std::net::IpAddr;

use super::output::{Table, Tabular};
use crate::admin::view::{
    CertificateView, ConnectionCounts, ConnectionView, ServiceView, StatusView, TunnelView,
    WorkloadView,
};

impl Tabular for Vec<WorkloadView> {
    fn table(&self) -> Table {
        let mut table = Table::new([
            "NAMESPACE",
            "POD NAME",
            "ADDRESS",
            "NODE",
            "ENROLLED",
            "MODE",
            "WAY",
            "IDENTITY",
        ]);
        for view in self {
            let enrolled = match &view.reason {
                None => "yes".into(),
                Some(reason) => format!("no ({reason})"),
            };
            table.row([
                view.namespace.clone(),
                view.pod.clone(),
                joined(&view.addresses),
                view.node.clone(),
                enrolled,
                view.mode.clone(),
                view.way.clone(),
                view.identity.clone(),
            ]);
        }
        table
    }
}

impl Tabular for Vec<ServiceView> {
    fn table(&self) -> Table {
        let mut table = Table::new([
            "NAMESPACE",
            "SERVICE NAME",
            "SERVICE VIP",
            "PORTS",
            "ENDPOINTS",
            "ENROLLED",
            "IN REACH",
            "AFFINITY",
            "PROTOCOLS",
        ]);
        for view in self {
            let vips = match view.vips.as_slice() {
                [] => "None".into(),
                vips => joined(vips),
            };
            table.row([
                view.namespace.clone(),
                view.service.clone(),
                vips,
                view.ports.join(","),
                view.endpoints.to_string(),
                format!("{}/{}", view.enrolled, view.endpoints),
                in_reach(view),
                view.affinity_s
                    .map_or_else(String::new, |seconds| format!("ClientIP {}", age(seconds))),
                view.protocols.join(","),
            ]);
        }
        table
    }
}

impl Tabular for Vec<CertificateView> {
    fn table(&self) -> Table {
        let mut table = Table::new([
            "CERTIFICATE NAME",
            "TYPE",
            "STATUS",
            "VALID CERT",
            "SERIAL NUMBER",
            "NOT AFTER",
            "NOT BEFORE",
            "PROBLEM",
        ]);
        for view in self {
            table.row([
                view.name.clone(),
                view.kind.clone(),
                view.status.clone(),
                view.valid.to_string(),
                view.serial.clone(),
                view.not_after.clone(),
                view.not_before.clone(),
                view.problem.clone(),
            ]);
        }
        table
    }
}

impl Tabular for Vec<ConnectionView> {
    fn table(&self) -> Table {
        let mut table = Table::new([
            "WORKLOAD",
            "DIRECTION",
            "SOURCE",
            "DESTINATION",
            "SERVICE",
            "PEER IDENTITY",
            "CARRIER",
            "WAY",
            "AGE",
            "SENT",
            "RECEIVED",
        ]);
        for view in self {
            let workload = match &*view.workload {
                "" => String::new(),
                pod => format!("{pod}.{}", view.namespace),
            };
            table.row([
                workload,
                view.direction.clone(),
                view.source.clone(),
                view.destination.clone(),
                view.service.clone(),
                view.peer_identity.clone(),
                view.carrier.clone(),
                view.way.clone(),
                age(view.age_ms / 1000),
                bytes(view.bytes_sent),
                bytes(view.bytes_received),
            ]);
        }
        table
    }
}

impl Tabular for Vec<TunnelView> {
    fn table(&self) -> Table {
        let mut table = Table::new(["NODE", "FROM", "TO", "CARRIER", "STATE", "FLOWS", "AGE"]);
        for view in self {
            table.row([
                view.node.clone(),
                view.from.clone(),
                view.to.clone(),
                view.carrier.clone(),
                view.state.clone(),
                view.flows.to_string(),
                age(view.age_s),
            ]);
        }
        table
    }
}

impl Tabular for StatusView {
    fn table(&self) -> Table {
        let ready = match &self.not_ready_reason {
            _ if self.ready => "yes".to_owned(),
            Some(reason) => format!("no: {reason}"),
            None => "no".to_owned(),
        };
        let snapshot = format!(
            "{} ({} old): {} pods, {} of this node enrolled, {} services, {} nodes",
            self.snapshot.generation,
            age(self.snapshot.age_s),
            self.snapshot.workloads,
            self.snapshot.enrolled_here,
            self.snapshot.services,
            self.snapshot.nodes,
        );
        let mut carriers = self.carrier.clone();
        for (node, carrier) in &self.carriers {
            carriers.push_str(&format!(", {node}: {carrier}"));
        }
        let mut table = Table::new(["STATUS", ""]);
        let mut line = |key: &str, value: String| table.row([key.to_owned(), value]);
        line("Node", self.node.clone());
        line("Ready", ready);
        line("Version", format!("{}, up {}", self.version, age(self.uptime_s)));
        line("Trust domain", self.trust_domain.clone());
        line("State", snapshot);
        let ConnectionCounts { outbound, inbound } = self.connections;
        line("Connections", format!("{outbound} outbound, {inbound} inbound"));
        line("Workers", self.workers.to_string());
        line("Carrier", carriers);
        line("Verdicts", format!("{} held by the kernel", self.verdicts));
        for (pod, how) in &self.redirect_peer {
            line(&format!("Redirect {pod}"), how.clone());
        }
        for (event, count) in self.kernel.iter().filter(|(_, count)| **count > 0) {
            line(&format!("Kernel {event}"), count.to_string());
        }
        if self.network_policies > 0 {
            let told = format!("{}, not enforced between pods of the mesh", self.network_policies);
            line("NetworkPolicies", told);
        }
        line("Problems", self.problems.len().to_string());
        for problem in &self.problems {
            let told = format!("{}: {}: {}", problem.field, problem.message, problem.remedy);
            line(&problem.place, told);
        }
        table
    }
}

/// `2/3 (same-zone)`.
fn in_reach(view: &ServiceView) -> String {
    let count = format!("{}/{}", view.in_reach, view.endpoints);
    let unread = (view.unread > 0).then(|| format!("{} not read", view.unread));
    let notes: Vec<String> = view.reach.iter().cloned().chain(unread).collect();
    match notes.as_slice() {
        [] => count,
        notes => format!("{count} ({})", notes.join(",")),
    }
}

fn joined(addresses: &[IpAddr]) -> String {
    addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

/// As `kubectl` shows ages: the two largest units.
fn age(seconds: u64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{minutes}m{}s", seconds % 60),
        3600..86_400 => format!("{hours}h{}m", minutes % 60),
        _ => format!("{days}d{}h", hours % 24),
    }
}

fn bytes(count: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let power = count.checked_ilog2().unwrap_or(0) / 10;
    let whole = count >> (10 * power);
    match power {
        0 => format!("{count}B"),
        _ => {
            // One digit behind the point, rounded down: 1.9 GiB must not read as 2.0.
            let rest = (count >> (10 * (power - 1))) & 1023;
            format!("{whole}.{}{}", rest * 10 / 1024, units[power as usize])
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::view::ProblemView;
    use crate::cli::output::{Format, print};

    fn text(value: &impl Tabular, format: Format) -> String {
        let mut out = Vec::new();
        print(&mut out, format, value).unwrap();
        String::from_utf8(out).unwrap()
    }

    fn workloads() -> Vec<WorkloadView> {
        let view = WorkloadView {
            namespace: "default".into(),
            pod: "reviews-v1-7".into(),
            uid: "u1".into(),
            workload: "reviews-v1".into(),
            node: "node-1".into(),
            addresses: vec!["10.0.1.2".parse().unwrap(), "fd00::2".parse().unwrap()],
            identity: "spiffe://cluster.local/ns/default/sa/reviews".into(),
            enrolled: true,
            reason: None,
            mode: "strict".into(),
            outbound: "mesh".into(),
            way: "tunnel".into(),
        };
        let left_alone = WorkloadView {
            pod: "db-0".into(),
            enrolled: false,
            reason: Some("host network".into()),
            addresses: Vec::new(),
            mode: "permissive".into(),
            way: "passthrough".into(),
            ..view.clone()
        };
        vec![view, left_alone]
    }

    #[test]
    fn workloads_are_aligned_under_the_known_headers() {
        let expected = "\
NAMESPACE   POD NAME       ADDRESS            NODE     ENROLLED            MODE         WAY           IDENTITY
default     reviews-v1-7   10.0.1.2,fd00::2   node-1   yes                 strict       tunnel        spiffe://cluster.local/ns/default/sa/reviews
default     db-0           -                  node-1   no (host network)   permissive   passthrough   spiffe://cluster.local/ns/default/sa/reviews
";
        assert_eq!(text(&workloads(), Format::Table), expected);
    }

    #[test]
    fn json_and_yaml_have_the_stable_keys() {
        let workloads = &workloads()[..1].to_vec();
        let json = r#"[
  {
    "namespace": "default",
    "pod": "reviews-v1-7",
    "uid": "u1",
    "workload": "reviews-v1",
    "node": "node-1",
    "addresses": [
      "10.0.1.2",
      "fd00::2"
    ],
    "identity": "spiffe://cluster.local/ns/default/sa/reviews",
    "enrolled": true,
    "reason": null,
    "mode": "strict",
    "outbound": "mesh",
    "way": "tunnel"
  }
]
"#;
        assert_eq!(text(workloads, Format::Json), json);
        let yaml = text(workloads, Format::Yaml);
        assert!(yaml.starts_with("- namespace: default\n  pod: reviews-v1-7\n"), "{yaml}");
    }

    #[test]
    fn services_are_aligned_under_the_known_headers() {
        let view = ServiceView {
            namespace: "default".into(),
            service: "ratings".into(),
            host: "ratings.default.svc.cluster.local".into(),
            vips: vec!["10.96.0.7".parse().unwrap()],
            ports: vec!["9080/http".into(), "9090".into()],
            endpoints: 2,
            enrolled: 1,
            in_reach: 1,
            unread: 0,
            reach: vec!["same-zone".into()],
            distribution: Some("PreferSameZone".into()),
            affinity_s: Some(10_800),
            protocols: vec!["9080/http".into(), "9090/opaque".into()],
        };
        let headless = ServiceView {
            vips: Vec::new(),
            ports: Vec::new(),
            unread: 2,
            reach: Vec::new(),
            affinity_s: None,
            protocols: Vec::new(),
            ..view.clone()
        };
        let expected = "\
NAMESPACE   SERVICE NAME   SERVICE VIP   PORTS            ENDPOINTS   ENROLLED   IN REACH           AFFINITY        PROTOCOLS
default     ratings        10.96.0.7     9080/http,9090   2           1/2        1/2 (same-zone)    ClientIP 3h0m   9080/http,9090/opaque
default     ratings        None          -                2           1/2        1/2 (2 not read)   -               -
";
        assert_eq!(text(&vec![view, headless], Format::Table), expected);
    }

    #[test]
    fn certificates_are_aligned_under_the_known_headers() {
        let view = CertificateView {
            name: "spiffe://cluster.local/ns/default/sa/reviews".into(),
            kind: "Leaf".into(),
            status: "Available".into(),
            valid: true,
            serial: "0f3a".into(),
            not_after: "2026-01-02T00:00:00Z".into(),
            not_before: "2026-01-01T00:00:00Z".into(),
            problem: "the signer refused: no_pod".into(),
        };
        let expected = "\
CERTIFICATE NAME                               TYPE   STATUS      VALID CERT   SERIAL NUMBER   NOT AFTER              NOT BEFORE             PROBLEM
spiffe://cluster.local/ns/default/sa/reviews   Leaf   Available   true         0f3a            2026-01-02T00:00:00Z   2026-01-01T00:00:00Z   the signer refused: no_pod
";
        assert_eq!(text(&vec![view], Format::Table), expected);
    }

    #[test]
    fn connections_and_tunnels_are_aligned() {
        let connection = ConnectionView {
            id: 7,
            namespace: "default".into(),
            workload: "web-1".into(),
            direction: "outbound".into(),
            source: "10.0.0.5:40000".into(),
            destination: "10.0.1.2:9080".into(),
            orig_dst: "10.96.0.7:9080".into(),
            service: "reviews.default.svc.cluster.local".into(),
            peer_identity: "spiffe://cluster.local/ns/default/sa/reviews".into(),
            peer_node: "node-2".into(),
            carrier: "lane".into(),
            way: "tunnel".into(),
            age_ms: 65_300,
            bytes_sent: 999,
            bytes_received: 1_572_864,
        };
        let expected = "\
WORKLOAD        DIRECTION   SOURCE           DESTINATION     SERVICE                             PEER IDENTITY                                  CARRIER   WAY      AGE    SENT   RECEIVED
web-1.default   outbound    10.0.0.5:40000   10.0.1.2:9080   reviews.default.svc.cluster.local   spiffe://cluster.local/ns/default/sa/reviews   lane      tunnel   1m5s   999B   1.5MiB
";
        assert_eq!(text(&vec![connection], Format::Table), expected);

        let tunnel = TunnelView {
            node: "node-2".into(),
            from: "spiffe://cluster.local/ns/a/sa/x".into(),
            to: "spiffe://cluster.local/ns/b/sa/y".into(),
            carrier: "quic".into(),
            state: "busy".into(),
            flows: 12,
            age_s: 90_000,
        };
        let expected = "\
NODE     FROM                               TO                                 CARRIER   STATE   FLOWS   AGE
node-2   spiffe://cluster.local/ns/a/sa/x   spiffe://cluster.local/ns/b/sa/y   quic      busy    12      1d1h
";
        assert_eq!(text(&vec![tunnel], Format::Table), expected);
    }

    #[test]
    fn status_tells_reason_and_problems() {
        let status = StatusView {
            version: "0.1.0".into(),
            node: "node-1".into(),
            trust_domain: "cluster.local".into(),
            uptime_s: 5,
            not_ready_reason: Some("no certificate yet".into()),
            problems: vec![ProblemView {
                place: "pods.yaml, document 2".into(),
                field: "spec.nodeName".into(),
                message: "missing".into(),
                remedy: "add it".into(),
            }],
            connections: ConnectionCounts { outbound: 3, inbound: 4 },
            workers: 2,
            carrier: "auto".into(),
            carriers: [("node-2".to_owned(), "quic".to_owned())].into(),
            verdicts: 3,
            kernel: [("captured".to_owned(), 9), ("orig_dst_full".to_owned(), 0)].into(),
            redirect_peer: [("shop/web".to_owned(), "the pod's cable is down".to_owned())].into(),
            network_policies: 2,
            ..StatusView::default()
        };
        let expected = "\
STATUS
Node                    node-1
Ready                   no: no certificate yet
Version                 0.1.0, up 5s
Trust domain            cluster.local
State                   0 (0s old): 0 pods, 0 of this node enrolled, 0 services, 0 nodes
Connections             3 outbound, 4 inbound
Workers                 2
Carrier                 auto, node-2: quic
Verdicts                3 held by the kernel
Redirect shop/web       the pod's cable is down
Kernel captured         9
NetworkPolicies         2, not enforced between pods of the mesh
Problems                1
pods.yaml, document 2   spec.nodeName: missing: add it
";
        assert_eq!(text(&status, Format::Table), expected);
    }

    #[test]
    fn ages_and_bytes_are_short() {
        for (seconds, shown) in
            [(0, "0s"), (59, "59s"), (60, "1m0s"), (3_661, "1h1m"), (90_061, "1d1h")]
        {
            assert_eq!(age(seconds), shown);
        }
        for (count, shown) in [
            (0, "0B"),
            (1023, "1023B"),
            (1024, "1.0KiB"),
            ((1 << 30) - 1, "1023.9MiB"),
            (u64::MAX, "15.9EiB"),
        ] {
            assert_eq!(bytes(count), shown);
        }
    }
}
