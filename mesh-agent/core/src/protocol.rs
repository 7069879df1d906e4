//! What is spoken at a port, as its Service declares it; nobody looks at the bytes.
//!
//! `appProtocol` goes before the port's name (KEP-3726 lists the names, IANA's are RFC 6335 service
//! names), and what is neither known is opaque: carried as it is. A port that somebody lists in
//! `malla.dev/opaque-ports` is opaque whatever is declared.

use crate::snapshot::{Endpoint, ServicePort};

/// What is spoken at a port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// Bytes: TLS, a protocol that is not known, or one of which nothing is said.
    #[default]
    Opaque,
    /// HTTP/1.1.
    Http,
    /// HTTP/2 in clear text by prior knowledge (RFC 9113 section 3.3), gRPC included.
    H2c,
    /// HTTP/1.1 that becomes a WebSocket (RFC 6455).
    Ws,
}

impl Protocol {
    /// The word that `services` and the access log show.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Opaque => "opaque",
            Self::Http => "http",
            Self::H2c => "h2c",
            Self::Ws => "ws",
        }
    }

    /// What a Service's port with this `appProtocol`, if any, and this name declares.
    pub fn declared(app_protocol: Option<&str>, name: &str) -> Self {
        match app_protocol.filter(|text| !text.is_empty()) {
            Some(text) => Self::of_word(text),
            // Istio's convention: `<protocol>[-<suffix>]`.
            None => Self::of_word(name.split_once('-').map_or(name, |(protocol, _)| protocol)),
        }
    }

    /// What is spoken with `endpoint` of `port`.
    pub fn of(port: &ServicePort, endpoint: &Endpoint) -> Self {
        let is_opaque = endpoint.workload.as_ref().is_some_and(|workload| {
            workload.settings.opaque_ports.contains(endpoint.addr.0.port())
        });
        if is_opaque { Self::Opaque } else { port.protocol }
    }

    fn of_word(word: &str) -> Self {
        // RFC 6335 section 5.1: names of services are compared without regard to case.
        match word.to_ascii_lowercase().as_str() {
            "http" => Self::Http,
            "http2" | "grpc" | "kubernetes.io/h2c" => Self::H2c,
            "kubernetes.io/ws" => Self::Ws,
            _ => Self::Opaque,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::addr::EndpointAddr;
    use crate::fixtures::{service, workload};
    use crate::snapshot::Workload;

    #[test]
    fn app_protocol_goes_before_the_name() {
        use Protocol::{H2c, Http, Opaque, Ws};
        for (app_protocol, name, expected) in [
            (Some("http"), "tcp", Http),
            (Some("HTTP"), "", Http),
            (Some("kubernetes.io/h2c"), "http", H2c),
            (Some("grpc"), "", H2c),
            (Some("kubernetes.io/ws"), "http", Ws),
            (Some("kubernetes.io/wss"), "http", Opaque),
            (Some("https"), "http", Opaque),
            (Some("tls"), "http", Opaque),
            (Some("tcp"), "http", Opaque),
            (Some("example.com/own"), "http", Opaque),
            (Some(""), "http", Http),
            (None, "http", Http),
            (None, "http-web", Http),
            (None, "http2-api", H2c),
            (None, "grpc", H2c),
            (None, "https", Opaque),
            (None, "httpbin", Opaque),
            (None, "tcp-http", Opaque),
            (None, "web", Opaque),
            (None, "", Opaque),
        ] {
            assert_eq!(Protocol::declared(app_protocol, name), expected, "{app_protocol:?} {name}");
        }
    }

    #[test]
    fn pods_own_list_makes_its_ports_opaque() {
        let mut pod = Workload::clone(&workload("a", "node-1", &["10.0.1.1"]));
        pod.settings.opaque_ports = "8000-8080".parse().unwrap();
        let pod = Arc::new(pod);
        let endpoint = |port| Endpoint {
            addr: EndpointAddr((pod.ips[0], port).into()),
            workload: Some(Arc::clone(&pod)),
        };
        let mut service = (*service("web", &["10.96.0.1"], 80, vec![])).clone();
        service.ports[0].protocol = Protocol::Http;
        assert_eq!(Protocol::of(&service.ports[0], &endpoint(8080)), Protocol::Opaque);
        assert_eq!(Protocol::of(&service.ports[0], &endpoint(8081)), Protocol::Http);
        let stranger = Endpoint { workload: None, ..endpoint(8080) };
        assert_eq!(Protocol::of(&service.ports[0], &stranger), Protocol::Http);
    }
}
