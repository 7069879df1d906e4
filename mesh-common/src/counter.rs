//! What the programs count: one number per exit that is not "not enrolled".

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident = $label:literal,)*) => {
        /// Why a program returned what it did. Per CPU and not atomic: statistics, never quotas.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u32)]
        pub enum Counter {
            $($(#[$doc])* $name,)*
        }

        impl Counter {
            /// All of them; the position is the index in the map.
            pub const ALL: &[Self] = &[$(Self::$name),*];

            /// The `reason` label: stable across releases.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$name => $label,)*
                }
            }
        }
    };
}

counters! {
    /// `connect`: sent to the agent.
    Captured = "captured",
    /// `connect`: a socket of the agent itself.
    ConnectAgent = "connect_agent",
    /// `connect`: a loopback or unspecified destination.
    ConnectLoopback = "connect_loopback",
    /// `connect`: the pod's own address.
    ConnectSelf = "connect_self",
    /// `connect`: a link-local destination, such as a cloud's metadata service.
    ConnectLinkLocal = "connect_link_local",
    /// `connect`: a port of `skip-outbound-ports`.
    ConnectSkippedPort = "connect_skipped_port",
    /// `connect`: an address of `skip-outbound-cidrs`.
    ConnectSkippedCidr = "connect_skipped_cidr",
    /// `connect`: not a destination of the mesh.
    ConnectNotMesh = "connect_not_mesh",
    /// `connect`: bypassed, since the agent is silent and the pod fails open.
    ConnectFailOpen = "connect_fail_open",
    /// `connect`: bypassed, since the agent has been gone for a day.
    ConnectDeadMan = "connect_dead_man",
    /// `connect`: refused; the destination is one of the agent's own listeners.
    ConnectOwnListener = "connect_own_listener",
    /// `connect`: refused; the pod has no listener for the destination's family, or its agent is gone.
    ConnectNoListener = "connect_no_listener",
    /// `connect`: refused; the kernel had no memory to remember the destination.
    ConnectNoStorage = "connect_no_storage",
    /// `connect`: refused; the pod's entry was written, or became another pod's, also during the second look.
    ConnectChanged = "connect_changed",
    /// `connect`: the kubelet's, to a pod that is enrolled.
    ConnectKubelet = "connect_kubelet",
    /// `connect`: refused; a pod that is to be in the mesh is not captured yet.
    ConnectPending = "connect_pending",
    /// `connect`: refused; the agent does not know this pod yet.
    ConnectUnknown = "connect_unknown",
    /// `connect`: passed; the agent has not come to know this pod in time.
    ConnectStillUnknown = "connect_still_unknown",
    /// `connect`: sent straight to an endpoint on this node.
    DirectTaken = "direct_taken",
    /// `connect`: a verdict chose an endpoint that the agent is to carry it to.
    DirectAgent = "direct_agent",
    /// `connect`: left to the agent; the verdict is not of the generations that hold now, or is due.
    DirectStale = "direct_stale",
    /// `connect`: left to the agent; nothing listens at the endpoint, or its namespace is gone.
    DirectNoListener = "direct_no_listener",
    /// `connect`: left to the agent; the socket is bound to another address than the pod's own.
    DirectBound = "direct_bound",
    /// `connect`: left to the agent; it follows as many direct connections as it may.
    DirectFull = "direct_full",
    /// `sock_ops`: a direct connection is not in the list of open ones, which is full.
    DirectUnlisted = "direct_unlisted",
    /// `sock_ops`: what happened to a direct connection could not be told.
    DirectEventLost = "direct_event_lost",
    /// `sock_ops`: a captured connection's origin was published.
    FlowPublished = "flow_published",
    /// `sock_ops`: it could not be published; the agent will reset the connection.
    FlowLost = "flow_lost",
    /// `sock_ops`: a delivery was announced to the lookup program.
    DeliveryAnnounced = "delivery_announced",
    /// `sock_ops`: it could not be announced; the connection will be steered or refused.
    DeliveryLost = "delivery_lost",
    /// `getpeername`: the original destination was shown.
    PeerShown = "peer_shown",
    /// `sk_lookup`: steered to the agent.
    LookupSteered = "lookup_steered",
    /// `sk_lookup`: the pod connects to itself.
    LookupSelf = "lookup_self",
    /// `sk_lookup`: a delivery by the agent.
    LookupDelivery = "lookup_delivery",
    /// `sk_lookup`: refused; a direct connection to the pod that had this address before.
    LookupAnother = "lookup_another",
    /// `sk_lookup`: a direct connection whose source port the node has changed.
    LookupTranslated = "lookup_translated",
    /// `sk_lookup`: `connect` asked whether somebody listens; no connection.
    LookupProbe = "lookup_probe",
    /// `sk_lookup`: a port of `skip-inbound-ports`.
    LookupSkippedPort = "lookup_skipped_port",
    /// `sk_lookup`: refused; plain text in strict mode.
    LookupStrict = "lookup_strict",
    /// `sk_lookup`: refused; aimed at one of the agent's own listeners.
    LookupOwnListener = "lookup_own_listener",
    /// `sk_lookup`: refused; the agent's listener is gone.
    LookupListenerGone = "lookup_listener_gone",
    /// `sk_lookup`: refused; the pod's entry was written, or became another pod's, also during the second look.
    LookupChanged = "lookup_changed",
    /// `sk_lookup`: bypassed, since the agent is silent and the pod fails open.
    LookupFailOpen = "lookup_fail_open",
    /// `sk_lookup`: bypassed, since the agent has been gone for a day.
    LookupDeadMan = "lookup_dead_man",
    /// `redirect`: a packet went from pod to pod past the node.
    Redirected = "redirected",
    /// `redirect`: left to the node; its connection did not begin this way, or was forgotten.
    RedirectUnknown = "redirect_unknown",
    /// `redirect`: left to the node; not from the sender's own address, or to itself.
    RedirectForeign = "redirect_foreign",
    /// `redirect`: left to the node, as is the rest of its connection, which could not be remembered.
    RedirectLost = "redirect_lost",
    /// `redirect`: a connection left to the node, since the agent has been gone for a day.
    RedirectDeadMan = "redirect_dead_man",
    /// `sk_lookup`: refused; plain text to a strict pod at an address that the agent does not know as its.
    LookupStrictElsewhere = "lookup_strict_elsewhere",
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn index_is_position_and_names_are_distinct() {
        for (index, counter) in Counter::ALL.iter().enumerate() {
            assert_eq!(*counter as usize, index);
        }
        let names: HashSet<_> = Counter::ALL.iter().map(|counter| counter.name()).collect();
        assert_eq!(names.len(), Counter::ALL.len());
    }
}
