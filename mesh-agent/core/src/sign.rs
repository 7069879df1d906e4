//! Whether an agent's request for a workload's certificate is signed.
//!
//! ```text
//! Request ──► Claim ──► Grant
//!        check     confirm
//!   who asks, for what    what the cluster says of it
//! ```
//!
//! A node that is taken over must gain what its own pods have, and nothing else. So a request counts
//! only if the agent's service account made it, with a token that is bound to a node, and if the
//! cluster has an enrolled pod with the service account asked for on that very node. And nothing is
//! taken from a request but its key and its identity: what else it asks for is refused rather than
//! dropped, since who asks for more is not our agent.

use std::fmt;
use std::time::Duration;

use crate::names::is_subdomain;
use crate::spiffe::{SpiffeId, TrustDomain};

/// The longest life of a certificate: what a stolen key is worth.
pub const MAX_LIFETIME: Duration = Duration::from_secs(86_400);

/// What a key is for, by the names of `certificates.k8s.io/v1`. All of these and no other: workloads
/// are clients and servers, and a key that signs needs no more.
pub const USAGES: [&str; 3] = ["digital signature", "client auth", "server auth"];

/// What a PKCS#10 request asks for. Whoever read it has checked its signature.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    /// Every subject alternative name.
    pub names: Vec<Name>,
    /// What kind of key.
    pub key: Key,
    /// Whether the subject says something.
    pub has_subject: bool,
    /// Whether it asks for basic constraints or key usages of a CA.
    pub is_ca: bool,
    /// Whether it asks for something else that is not a name.
    pub has_more: bool,
}

/// A subject alternative name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Name {
    /// A URI.
    Uri(String),
    /// A name of another kind.
    Other,
}

/// The key to certify.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    /// ECDSA on P-256.
    EcdsaP256,
    /// Another one.
    Other,
}

/// Why a request's bytes ask for nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unread {
    /// They are no PKCS#10 request.
    Malformed,
    /// They are not signed with the key that they name.
    Unproven,
}

/// A request as the API has it.
#[derive(Clone, Debug)]
pub struct Request<'a> {
    /// What its bytes ask for.
    pub asked: Result<Asked, Unread>,
    /// `spec.usages`.
    pub usages: &'a [String],
    /// `spec.expirationSeconds`.
    pub expiration_s: Option<i64>,
    /// Who made it, as the API server has found out.
    pub requester: Requester<'a>,
}

/// Who made a request. Only the API server writes these fields.
#[derive(Clone, Copy, Debug)]
pub struct Requester<'a> {
    /// `spec.username`.
    pub username: &'a str,
    /// `authentication.kubernetes.io/node-name` of `spec.extra`: where the pod runs that the token
    /// is bound to.
    pub node_names: &'a [String],
    /// `authentication.kubernetes.io/node-uid`.
    pub node_uids: &'a [String],
}

/// Whom a signer signs for.
#[derive(Clone, Debug)]
pub struct Rules {
    /// Of every identity.
    pub trust_domain: TrustDomain,
    /// `system:serviceaccount:<namespace>:<name>`: the agents.
    pub agent: String,
}

/// A request that is in order by itself: its place is not known yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    identity: SpiffeId,
    lifetime: Duration,
    node: String,
    node_uid: String,
}

/// What the cluster says of a claim.
#[derive(Clone, Debug)]
pub struct Facts<'a> {
    /// The unique id of the node with the claim's name, if there is one.
    pub node_uid: Option<&'a str>,
    /// Pods; those that have nothing to do with the claim do no harm.
    pub pods: &'a [Placed],
}

/// A pod that has not ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placed {
    /// In which namespace.
    pub namespace: String,
    /// As whom it runs.
    pub service_account: String,
    /// Where it runs.
    pub node: String,
    /// Whether it takes part in the mesh.
    pub is_enrolled: bool,
}

/// What is to be signed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// The only name.
    pub identity: SpiffeId,
    /// From now on.
    pub lifetime: Duration,
}

/// Why a request is not signed, in the order in which is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Denied {
    /// Made by somebody else.
    NotAnAgent,
    /// Made with a token that is bound to no node.
    NoNode,
    /// Not a PKCS#10 request.
    Malformed,
    /// Not signed with its key.
    Unproven,
    /// A key of another kind.
    KeyType,
    /// For a CA.
    Ca,
    /// With a subject, or with extensions besides the name.
    MoreThanAName,
    /// No URI, more than one, or another name beside it.
    Names,
    /// The URI is no workload's SPIFFE ID.
    NotSpiffe,
    /// For another trust domain.
    TrustDomain,
    /// Not exactly the usages of a workload's key.
    Usages,
    /// For longer than a day, or for ever.
    Lifetime,
    /// The token was bound to a node that is gone, though there may be another with its name.
    NodeGone,
    /// No pod of the node runs as that service account.
    NoPod,
    /// There is one, and it takes no part in the mesh.
    NotEnrolled,
}

impl Denied {
    /// Every reason.
    pub const ALL: [Self; 15] = [
        Self::NotAnAgent,
        Self::NoNode,
        Self::Malformed,
        Self::Unproven,
        Self::KeyType,
        Self::Ca,
        Self::MoreThanAName,
        Self::Names,
        Self::NotSpiffe,
        Self::TrustDomain,
        Self::Usages,
        Self::Lifetime,
        Self::NodeGone,
        Self::NoPod,
        Self::NotEnrolled,
    ];

    /// The `reason` label, and that of the condition: a closed set.
    pub fn reason(self) -> &'static str {
        match self {
            Self::NotAnAgent => "not_an_agent",
            Self::NoNode => "no_node",
            Self::Malformed => "malformed",
            Self::Unproven => "unproven",
            Self::KeyType => "key_type",
            Self::Ca => "ca",
            Self::MoreThanAName => "more_than_a_name",
            Self::Names => "names",
            Self::NotSpiffe => "not_spiffe",
            Self::TrustDomain => "trust_domain",
            Self::Usages => "usages",
            Self::Lifetime => "lifetime",
            Self::NodeGone => "node_gone",
            Self::NoPod => "no_pod",
            Self::NotEnrolled => "not_enrolled",
        }
    }
}

impl fmt::Display for Denied {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotAnAgent => "the requester is not the agent's service account",
            Self::NoNode => "the requester's token is not bound to a pod of a node",
            Self::Malformed => "the request is not one PKCS#10 request in PEM",
            Self::Unproven => "the request is not signed with the key that it names",
            Self::KeyType => "the key is not ECDSA on P-256",
            Self::Ca => "the request is for a CA",
            Self::MoreThanAName => "the request asks for more than a name",
            Self::Names => "the request does not have exactly one URI as its name",
            Self::NotSpiffe => "the URI is not spiffe://<trust domain>/ns/<ns>/sa/<sa>",
            Self::TrustDomain => "the URI is of another trust domain",
            Self::Usages => "the usages are not: digital signature, client auth, server auth",
            Self::Lifetime => "expirationSeconds is missing or over 86400",
            Self::NodeGone => "the node of the requester's token is gone",
            Self::NoPod => "no pod of the requester's node runs as this service account",
            Self::NotEnrolled => "the pod is not enrolled in the mesh",
        })
    }
}

impl std::error::Error for Denied {}

impl Request<'_> {
    /// Whether the request is in order, so that it is worth asking the cluster about.
    ///
    /// # Errors
    ///
    /// The first rule that it breaks.
    pub fn check(&self, rules: &Rules) -> Result<Claim, Denied> {
        if self.requester.username != rules.agent {
            return Err(Denied::NotAnAgent);
        }
        let ([node], [node_uid]) = (self.requester.node_names, self.requester.node_uids) else {
            return Err(Denied::NoNode);
        };
        // It becomes a part of a path.
        if !is_subdomain(node) || node_uid.is_empty() {
            return Err(Denied::NoNode);
        }
        let asked = match &self.asked {
            Ok(asked) => asked,
            Err(Unread::Malformed) => return Err(Denied::Malformed),
            Err(Unread::Unproven) => return Err(Denied::Unproven),
        };
        let identity = asked.identity()?;
        if *identity.trust_domain() != rules.trust_domain {
            return Err(Denied::TrustDomain);
        }
        let is_whole = USAGES.iter().all(|usage| self.usages.iter().any(|asked| asked == usage));
        if !is_whole || self.usages.len() != USAGES.len() {
            return Err(Denied::Usages);
        }
        let seconds = self.expiration_s.and_then(|seconds| u64::try_from(seconds).ok());
        let lifetime = seconds.map(Duration::from_secs).filter(|life| *life <= MAX_LIFETIME);
        let lifetime = lifetime.filter(|life| !life.is_zero()).ok_or(Denied::Lifetime)?;
        Ok(Claim { identity, lifetime, node: node.clone(), node_uid: node_uid.clone() })
    }
}

impl Asked {
    fn identity(&self) -> Result<SpiffeId, Denied> {
        if self.key != Key::EcdsaP256 {
            return Err(Denied::KeyType);
        }
        if self.is_ca {
            return Err(Denied::Ca);
        }
        if self.has_subject || self.has_more {
            return Err(Denied::MoreThanAName);
        }
        let [Name::Uri(uri)] = self.names.as_slice() else { return Err(Denied::Names) };
        SpiffeId::parse(uri).map_err(|_no_workload| Denied::NotSpiffe)
    }
}

impl Claim {
    /// Who is to be certified.
    pub fn identity(&self) -> &SpiffeId {
        &self.identity
    }

    /// The node whose agent asks.
    pub fn node(&self) -> &str {
        &self.node
    }

    /// Whether the cluster bears it out.
    ///
    /// # Errors
    ///
    /// What it says instead.
    pub fn confirm(self, facts: &Facts<'_>) -> Result<Grant, Denied> {
        if facts.node_uid != Some(self.node_uid.as_str()) {
            return Err(Denied::NodeGone);
        }
        let is_meant = |pod: &&Placed| {
            pod.namespace == self.identity.namespace()
                && pod.service_account == self.identity.service_account()
                && pod.node == self.node
        };
        let mut pods = facts.pods.iter().filter(is_meant).peekable();
        if pods.peek().is_none() {
            return Err(Denied::NoPod);
        }
        if !pods.any(|pod| pod.is_enrolled) {
            return Err(Denied::NotEnrolled);
        }
        Ok(Grant { identity: self.identity, lifetime: self.lifetime })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AGENT: &str = "system:serviceaccount:malla-system:malla-agent";
    const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";

    /// Everything that a decision is made from, in one value that a case changes.
    struct Case {
        asked: Result<Asked, Unread>,
        usages: Vec<String>,
        expiration_s: Option<i64>,
        username: String,
        node_names: Vec<String>,
        node_uids: Vec<String>,
        node_uid: Option<String>,
        pods: Vec<Placed>,
    }

    fn texts(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|text| (*text).to_owned()).collect()
    }

    fn pod(namespace: &str, service_account: &str, node: &str) -> Placed {
        Placed {
            namespace: namespace.to_owned(),
            service_account: service_account.to_owned(),
            node: node.to_owned(),
            is_enrolled: true,
        }
    }

    impl Case {
        fn good() -> Self {
            let asked = Asked {
                names: vec![Name::Uri(WEB.to_owned())],
                key: Key::EcdsaP256,
                has_subject: false,
                is_ca: false,
                has_more: false,
            };
            Self {
                asked: Ok(asked),
                usages: texts(&["client auth", "digital signature", "server auth"]),
                expiration_s: Some(86_400),
                username: AGENT.to_owned(),
                node_names: texts(&["node-1"]),
                node_uids: texts(&["uid-1"]),
                node_uid: Some("uid-1".to_owned()),
                pods: vec![pod("shop", "web", "node-1")],
            }
        }

        fn asked(&mut self) -> &mut Asked {
            self.asked.as_mut().unwrap()
        }

        fn decide(&self) -> Result<Grant, Denied> {
            let request = Request {
                asked: self.asked.clone(),
                usages: &self.usages,
                expiration_s: self.expiration_s,
                requester: Requester {
                    username: &self.username,
                    node_names: &self.node_names,
                    node_uids: &self.node_uids,
                },
            };
            let rules = Rules {
                trust_domain: TrustDomain::new("cluster.local").unwrap(),
                agent: AGENT.to_owned(),
            };
            let facts = Facts { node_uid: self.node_uid.as_deref(), pods: &self.pods };
            request.check(&rules)?.confirm(&facts)
        }
    }

    #[test]
    fn request_of_the_node_where_the_workload_runs_is_granted() {
        let granted = Case::good().decide().unwrap();
        assert_eq!(granted.identity.to_string(), WEB);
        assert_eq!(granted.lifetime, Duration::from_secs(86_400));
        let mut short = Case::good();
        short.expiration_s = Some(600);
        // One of several pods, and what is elsewhere, does not matter.
        short.pods.push(Placed { is_enrolled: false, ..pod("shop", "web", "node-1") });
        short.pods.push(pod("shop", "web", "node-2"));
        assert_eq!(short.decide().unwrap().lifetime, Duration::from_secs(600));
    }

    #[test]
    fn whatever_is_wrong_is_denied_for_that_reason() {
        type Change = fn(&mut Case);
        let cases: &[(Denied, Change)] = &[
            (Denied::NotAnAgent, |c| c.username = "alice".into()),
            (Denied::NotAnAgent, |c| {
                c.username = "system:serviceaccount:shop:malla-agent".into();
            }),
            (Denied::NotAnAgent, |c| c.username.push('2')),
            (Denied::NotAnAgent, |c| c.username = "system:node:node-1".into()),
            (Denied::NoNode, |c| c.node_names.clear()),
            (Denied::NoNode, |c| c.node_uids.clear()),
            (Denied::NoNode, |c| c.node_names.push("node-2".into())),
            (Denied::NoNode, |c| c.node_uids.push("uid-2".into())),
            (Denied::NoNode, |c| c.node_names = texts(&[""])),
            (Denied::NoNode, |c| c.node_names = texts(&["node-1/../node-2"])),
            (Denied::NoNode, |c| c.node_uids = texts(&[""])),
            (Denied::Malformed, |c| c.asked = Err(Unread::Malformed)),
            (Denied::Unproven, |c| c.asked = Err(Unread::Unproven)),
            (Denied::KeyType, |c| c.asked().key = Key::Other),
            (Denied::Ca, |c| c.asked().is_ca = true),
            (Denied::MoreThanAName, |c| c.asked().has_subject = true),
            (Denied::MoreThanAName, |c| c.asked().has_more = true),
            (Denied::Names, |c| c.asked().names.clear()),
            (Denied::Names, |c| c.asked().names.push(Name::Uri(WEB.into()))),
            (Denied::Names, |c| c.asked().names.push(Name::Other)),
            (Denied::Names, |c| c.asked().names = vec![Name::Other]),
            (Denied::NotSpiffe, |c| {
                c.asked().names = vec![Name::Uri("https://cluster.local/ns/shop/sa/web".into())];
            }),
            (Denied::NotSpiffe, |c| {
                c.asked().names = vec![Name::Uri("spiffe://cluster.local".into())];
            }),
            (Denied::TrustDomain, |c| {
                c.asked().names = vec![Name::Uri("spiffe://elsewhere/ns/shop/sa/web".into())];
            }),
            (Denied::Usages, |c| c.usages.clear()),
            (Denied::Usages, |c| c.usages.truncate(2)),
            (Denied::Usages, |c| c.usages.push("cert sign".into())),
            (Denied::Usages, |c| c.usages[0] = "server auth".into()),
            (Denied::Usages, |c| c.usages.push("server auth".into())),
            (Denied::Lifetime, |c| c.expiration_s = None),
            (Denied::Lifetime, |c| c.expiration_s = Some(86_401)),
            (Denied::Lifetime, |c| c.expiration_s = Some(i64::MAX)),
            (Denied::Lifetime, |c| c.expiration_s = Some(-1)),
            (Denied::Lifetime, |c| c.expiration_s = Some(0)),
            (Denied::NodeGone, |c| c.node_uid = None),
            (Denied::NodeGone, |c| c.node_uid = Some("uid-2".into())),
            (Denied::NoPod, |c| c.pods.clear()),
            (Denied::NoPod, |c| c.pods[0].node = "node-2".into()),
            (Denied::NoPod, |c| c.pods[0].namespace = "bank".into()),
            (Denied::NoPod, |c| c.pods[0].service_account = "default".into()),
            (Denied::NotEnrolled, |c| c.pods[0].is_enrolled = false),
            (Denied::NotEnrolled, |c| {
                c.pods[0].is_enrolled = false;
                c.pods.push(pod("shop", "web", "node-2"));
                c.pods.push(pod("bank", "web", "node-1"));
            }),
        ];
        for (index, (denied, change)) in cases.iter().enumerate() {
            let mut case = Case::good();
            change(&mut case);
            assert_eq!(case.decide(), Err(*denied), "case {index}");
        }
        for denied in Denied::ALL {
            assert!(cases.iter().any(|(told, _)| *told == denied), "{denied:?} has no case");
        }
    }

    #[test]
    fn reasons_are_told_apart() {
        let mut reasons: Vec<_> = Denied::ALL.iter().map(|denied| denied.reason()).collect();
        reasons.sort_unstable();
        reasons.dedup();
        assert_eq!(reasons.len(), Denied::ALL.len());
    }
}
